"""What tools.label costs beyond the scorer's own forward pass.

  python -m benchmarks.label_overhead [--size=b32] [--pairs=32] [--rounds=5]

Pairs of 512-pixel JPEGs (as heavy as photographs) are scored by CLIP at random
weights: as tools.label does it, records read, decoded, scaled, tokenized and
stored; and its compiled network alone, on batches that are there already. They
take turns; the overhead is the ratio of the medians, less 1. Both are compiled
before. Sizes: b32 (ViT-B/32, where a picture is cheapest), l14, h14.
"""

import argparse
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import data
from dpo_jax import sharding
from dpo_jax.data import records, score_files
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.evaluate import clip_pixels, scorers
from dpo_jax.models import clip_pair
from dpo_jax.tools import label, prepare

TOKENIZER = 'examples/emoji/architecture/tokenizer'
# (image width, layers, patch), (text width, layers), width of both.
SIZES = {
  'b32': ((768, 12, 32), (512, 12), 512),
  'l14': ((1024, 24, 14), (768, 12), 768),
  'h14': ((1280, 32, 14), (1024, 24), 1024),
}


def make_config(size: str) -> clip_pair.CLIPConfig:
  """The published shapes."""
  (width, layers, patch), (text_width, text_layers), both = SIZES[size]
  return clip_pair.CLIPConfig.from_dict(
    {
      'projection_dim': both,
      'vision_config': {
        'hidden_size': width,
        'intermediate_size': 4 * width,
        'num_hidden_layers': layers,
        'num_attention_heads': width // (80 if size == 'h14' else 64),
        'image_size': 224,
        'patch_size': patch,
      },
      'text_config': {
        'hidden_size': text_width,
        'intermediate_size': 4 * text_width,
        'num_hidden_layers': text_layers,
        'num_attention_heads': text_width // 64,
      },
    }
  )


def make_scorer(size: str, batch_size: int) -> scorers.Scorer:
  """PickScore's arithmetic on random weights."""
  config, mesh = make_config(size), sharding.make_mesh()
  model = clip_pair.CLIP(config)
  tokenizer = tokenizer_lib.load(TOKENIZER, max_length=77)
  params = jax.jit(lambda: {'clip': model.init(jax.random.key(0))})()
  return scorers.Scorer(
    name='pickscore',
    compute=scorers.clip_compute('pickscore', model),
    params=jax.device_put(params, sharding.replicated(mesh)),
    preprocess=clip_pixels.Preprocess(224),
    encode=lambda captions: tokenizer.encode(captions)[0],
    mesh=mesh,
    source={'name': 'random', 'sha256': size},
    batch_size=batch_size,
  )


def time_whole(folder: str, scorer: scorers.Scorer) -> float:
  """Seconds of tools.label's pass; what it wrote is removed after."""
  given = records.open_folder(folder)
  shutil.rmtree(score_files.place(given, 'pairs'), ignore_errors=True)
  started = time.perf_counter()
  label.score(given, 'pairs', scorer)
  return time.perf_counter() - started


def make_forward(scorer: scorers.Scorer, pairs: int):
  """() -> seconds of the network on as many batches, one after the other."""
  compute = jax.jit(
    scorer.compute, out_shardings=sharding.batch_sharding(scorer.mesh)
  )
  rng = np.random.default_rng(0)
  size = scorer.batch_size
  batch = sharding.put_batch(
    {
      'pixels': rng.normal(size=(size, 2, 224, 224, 3)).astype(np.float32),
      'input_ids': scorer.encode(['a picture of a thing'] * size),
    },
    scorer.mesh,
  )

  def run():
    started = time.perf_counter()
    for _ in range(-(-pairs // size)):
      scores = compute(scorer.params, batch['pixels'], batch['input_ids'])
      scores.block_until_ready()
    return time.perf_counter() - started

  return run


def main(argv: list[str]) -> int:
  """Measures and prints a line a round and the medians."""
  parser = argparse.ArgumentParser(
    'benchmarks.label_overhead',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--size', default='b32', choices=SIZES)
  parser.add_argument('--pairs', type=int, default=32)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--rounds', type=int, default=5)
  values = parser.parse_args(argv)
  scorer = make_scorer(values.size, values.batch)
  with tempfile.TemporaryDirectory() as root:
    source, folder = pathlib.Path(root) / 'pairs.parquet', f'{root}/prepared'
    jpegs = data.make_jpegs()
    each = 2 * sum(map(len, jpegs)) // len(jpegs)
    # The last group may be one pair short.
    data.write_parquet(source, (values.pairs + 1) * each)
    prepare.main(
      [
        f'--source={source}',
        '--format=pickapic',
        f'--out={folder}',
        f'--limit={values.pairs}',
      ]
    )
    count = len(records.open_folder(folder))
    forward = make_forward(scorer, count)
    forward()
    time_whole(folder, scorer)
    found = []
    for number in range(values.rounds):
      found.append((forward(), time_whole(folder, scorer)))
      print(
        f'round {number + 1}/{values.rounds}: forward {found[-1][0]:.2f} s, '
        f'label {found[-1][1]:.2f} s',
        flush=True,
      )
  alone, whole = map(statistics.median, zip(*found, strict=True))
  ratios = [100 * (b / a - 1) for a, b in found]
  print(
    f'{values.size}, {count} pairs, {scorer.batch_size} a batch, '
    f'{jax.device_count()} x {jax.devices()[0].device_kind}: forward '
    f'{alone:.2f} s, label {whole:.2f} s, overhead '
    f'{100 * (whole / alone - 1):.1f}% (rounds {min(ratios):.1f} to '
    f'{max(ratios):.1f}%)'
  )
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
