"""Our ImageReward beside its own program: greatest differences.

  python -m benchmarks.imagereward_parity --theirs=FOLDER [--full]
  python -m benchmarks.imagereward_parity --ours=FOLDER

The first writes weights and the scores of the peer, image-reward 1.5, to
FOLDER; it wants transformers below 5 (4.36.2 was taken), timm, fairscale (less
its top-level `benchmarks`) and torchvision, installed in a folder of their own
on PYTHONPATH. The second wants what our package needs. The weights are random
and the same in both; tiny, or with --full those of the released sizes
(1.8 GB). What --theirs prints for tiny ones is kept in
tests/test_imagereward.py.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import sys
import types

import jax
import numpy as np
from PIL import Image

from benchmarks import scorer_parity
from dpo_jax.models import blip, blip_text, blip_vision
from dpo_jax.weights import blip_files, mapping, safetensors_io

WORDS = (
  '[PAD] [UNK] [CLS] [SEP] [MASK] a an the red apple ##s cat dog , . ! ? \' " -'
  ' ( ) grin ##ning face flag of cafe naive b c d e 1 ##2 ##3 $ & sun ##set on'
  ' by ang ##strom istanbul'
).split()
MED_CONFIG = {
  'architectures': ['BertModel'],
  'attention_probs_dropout_prob': 0.1,
  'hidden_act': 'gelu',
  'hidden_dropout_prob': 0.1,
  'hidden_size': 24,
  'initializer_range': 0.02,
  'intermediate_size': 40,
  'layer_norm_eps': 1e-12,
  'max_position_embeddings': 40,
  'model_type': 'bert',
  'num_attention_heads': 3,
  'num_hidden_layers': 2,
  'pad_token_id': 0,
  'type_vocab_size': 2,
  'vocab_size': len(WORDS) + 2,
  'encoder_width': 24,
  'add_cross_attention': True,
}
VISION = blip_vision.VisionConfig(
  hidden_size=128,
  intermediate_size=512,
  num_hidden_layers=2,
  num_attention_heads=2,
  image_size=32,
  patch_size=8,
)
FULL = MED_CONFIG | {
  'hidden_size': 768,
  'intermediate_size': 3072,
  'max_position_embeddings': 512,
  'num_attention_heads': 12,
  'num_hidden_layers': 12,
  'vocab_size': 30524,
  'encoder_width': 768,
}
CAPTIONS = [
  'grinning face',
  '  A red  apple, caf\u00e9 & sunset\n',
  '',
  'the cat (12) - [DEC] [SEP] [pad] [PAD] dog!',
  'Angstrom \u0130stanbul \u6771 \U0001f600 na\u00efve $12.3',
  'a red cat on the sunset by the dog ' * 6,
  "it's \u201cred\u201d? the\u00a0dog\u200b.",
]


def make_config(*, full: bool) -> blip.Config:
  """Of the released sizes, or tiny."""
  values = FULL if full else MED_CONFIG
  vision = blip_vision.VisionConfig() if full else VISION
  return blip.Config(blip_text.TextConfig.from_dict(values), vision)


def write_folder(folder: pathlib.Path, *, full: bool = False) -> pathlib.Path:
  """What `imagereward` opens, with random tensors that matter."""
  folder.mkdir(parents=True, exist_ok=True)
  values = FULL if full else MED_CONFIG
  (folder / blip_files.CONFIG).write_text(json.dumps(values))
  count = values['vocab_size'] - 2 - len(WORDS)
  words = WORDS + [f'[unused{i}]' for i in range(count)]
  (folder / 'vocab.txt').write_text('\n'.join(words) + '\n', encoding='utf-8')
  shapes = mapping.file_shapes(
    blip_files.shapes(make_config(full=full)), blip_files.RULES
  )
  rng, tensors = np.random.default_rng(0), {}
  for name in sorted(shapes):
    shape = shapes[name]
    # Weights that keep sizes as they are; tables, biases and norms of 1.
    scale = np.prod(shape[1:]) ** -0.5 if len(shape) in (2, 4) else 0.5
    tensors[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    if 'mlp.layers' not in name and shape and 'orm' in name:
      tensors[name] += name.endswith('weight')
  safetensors_io.save(folder / 'model.safetensors', tensors)
  return folder


def open_theirs(folder: pathlib.Path, *, full: bool):
  """ImageReward's own module with the tensors of a folder.

  Tiny ones take the place of the image encoder and the head, whose sizes it
  does not ask for. Its package is not imported whole: it wants more than the
  score does.
  """
  scorer_parity.declare_torchvision_ops()
  import torch

  sys.modules['clip'] = types.ModuleType('clip')
  package = types.ModuleType('ImageReward')
  package.__path__ = importlib.util.find_spec(
    'ImageReward'
  ).submodule_search_locations
  sys.modules['ImageReward'] = package
  from ImageReward import ImageReward as program
  from ImageReward.models.BLIP import blip_pretrain, vit

  # The tokenizer is found by this name in the folder we stand in.
  named = folder / 'bert-base-uncased'
  named.mkdir(exist_ok=True)
  (named / 'vocab.txt').write_bytes((folder / 'vocab.txt').read_bytes())
  os.chdir(folder)
  if not full:
    blip_pretrain.create_vit = lambda *_: (
      vit.VisionTransformer(
        img_size=VISION.image_size,
        patch_size=VISION.patch_size,
        embed_dim=VISION.hidden_size,
        depth=VISION.num_hidden_layers,
        num_heads=VISION.num_attention_heads,
      ),
      VISION.hidden_size,
    )
  model = program.ImageReward(med_config=blip_files.CONFIG)
  if not full:
    model.mlp = program.MLP(MED_CONFIG['hidden_size'])
    model.preprocess = program._transform(VISION.image_size)
  tensors = safetensors_io.load('model.safetensors')
  state = {name: torch.tensor(value) for name, value in tensors.items()}
  result = model.load_state_dict(state, strict=False)
  print('unread by ours:', *result.missing_keys)
  if result.unexpected_keys:
    raise ValueError(f'it has no {result.unexpected_keys}')
  return model.eval()


def write_theirs(folder: pathlib.Path, *, full: bool) -> None:
  """Its scores and token ids beside the weights."""
  import torch

  model = open_theirs(write_folder(folder.resolve(), full=full), full=full)
  pictures = [Image.fromarray(x) for x in scorer_parity.make_pictures()]
  captions = CAPTIONS[:1] if full else CAPTIONS
  with torch.no_grad():
    scores = [model.inference_rank(text, pictures)[1] for text in captions]
    alone = model.score(captions[0], pictures[0])
  print('one by one:', abs(alone - scores[0][0]))
  ids = model.blip.tokenizer(
    CAPTIONS, padding='max_length', truncation=True, max_length=35
  )['input_ids']
  pathlib.Path('theirs.json').write_text(
    json.dumps({'scores': scores, 'ids': ids})
  )
  for row in scores:
    print('    [' + ', '.join(f'{value:.5f}' for value in row) + '],')
  for row in ids:
    print('   ', [number for number in row if number])


def print_ours(folder: pathlib.Path) -> None:
  from dpo_jax import scoring, sharding
  from dpo_jax.data import tokenizer

  theirs = json.loads((folder / 'theirs.json').read_text())
  ids = tokenizer.load_bert(folder).encode(CAPTIONS)[0]
  print('token ids', scorer_parity.gap(ids, theirs['ids']))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  scorer = scoring.open_scorer(
    'imagereward', str(folder), mesh=mesh, batch_size=1
  )
  pictures = scorer_parity.make_pictures()
  questions = [(text, pictures) for text in CAPTIONS[: len(theirs['scores'])]]
  found = np.concatenate(list(scorer.batches(questions)))
  print(f'scores {scorer_parity.gap(found, theirs["scores"]):.2g}')


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--theirs', type=pathlib.Path)
  parser.add_argument('--ours', type=pathlib.Path)
  parser.add_argument('--full', action='store_true')
  options = parser.parse_args()
  if options.theirs:
    write_theirs(options.theirs, full=options.full)
  if options.ours:
    print_ours(options.ours)


if __name__ == '__main__':
  main()
