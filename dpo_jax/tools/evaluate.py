"""Compares two models: paired win rates with intervals, and a page.

  python -m dpo_jax.tools.evaluate --a=BASE --b=BASE --b_weights=runs/sd15 \\
    --prompts=parti.tsv --scorers=pickscore=PICKSCORE,aesthetic=CLIP_L \\
    --out=compare [--steps=50 --guidance_scale=7.5 ...]

a and b are models, which draw the prompts into OUT/a and OUT/b with the flags
of dpo_jax.tools.generate that follow, the same for both; or folders that
dpo_jax.tools.generate made, which must have been made alike. PROMPTS may sort
its prompts (PartiPrompts' categories and challenges, HPSv2's styles). The first
scorer gives the headline. The same command
goes on where it stopped: pictures and scores that are there are kept.

It writes OUT/report.html, which stands alone, and OUT/report.json. Exit code:
0, 2 when the input is wrong.
"""

import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from dpo_jax import scoring, sharding
from dpo_jax.data import images as images_lib
from dpo_jax.evaluate import compare_report, comparison, manifest, scorers
from dpo_jax.tools import arguments, generate, ticker


def _parse(argv: Sequence[str]):
  """(own flags, flags of tools.generate)."""
  parser = arguments.Parser('dpo_jax.tools.evaluate', __doc__)
  add, whole = parser.add_argument, arguments.number(int, low=1)
  add('--a', required=True, help='a model, or a folder of its pictures')
  add('--b', required=True, help='a model, or a folder of its pictures')
  for side in 'ab':
    add(f'--{side}_weights', help=f"a run's workdir or a UNet, on {side}")
    add(f'--{side}_lora', help=f'adapters on {side}')
  add('--prompts', help='needed where a model draws; sorts prompts')
  add('--scorers', required=True, help='NAME=FOLDER,...')
  add('--tokenizer', default='', help='folder of vocab.json and merges.txt')
  add('--out', required=True, help='folder for the report')
  add('--score_batch', type=whole, help='pictures at once; default: 8 a device')
  add('--score_dtype', default='auto', choices=('auto', 'float32', 'bfloat16'))
  add('--max_pairs', type=whole, default=60, help='pairs shown on the page')
  return parser.parse_known_args(list(argv))


def main(argv: Sequence[str]) -> None:
  """Compares; ValueError says what is wrong with the input."""
  values, more = _parse(argv)
  wanted = scoring.parse(values.scorers)
  out = pathlib.Path(values.out)
  folders = [_pictures(values, side, more, out) for side in 'ab']
  drawn = [not comparison.is_pictures(getattr(values, side)) for side in 'ab']
  if more and not any(drawn):
    raise ValueError(
      f'{more[0]}: is for drawing pictures; --a and --b are pictures already'
    )
  pairs = comparison.open_pairs(*folders)
  groups = comparison.read_groups(values.prompts) if values.prompts else {}
  mesh = sharding.make_mesh()
  scores, results, sources = {}, {}, {}
  for name, folder in wanted.items():
    scorer = scoring.open_scorer(
      name,
      folder,
      mesh=mesh,
      tokenizer=values.tokenizer,
      dtype=values.score_dtype,
      batch_size=values.score_batch or 0,
    )
    sources[name] = scorer.source
    scores[name] = _score(out, scorer, pairs, folders)
    results[name] = comparison.compare(*scores[name], pairs, groups=groups)
  shown = tuple(_name(values, side) for side in 'ab')
  _, page = compare_report.write(
    out,
    results=results,
    scores=scores,
    pairs=pairs,
    names=shown,
    settings={
      'pictures': json.loads(
        (pathlib.Path(folders[1]) / manifest.SETTINGS).read_text()
      ),
      'prompts': values.prompts,
      'scorers': sources,
    },
    max_pairs=values.max_pairs,
  )
  for name, one in results.items():
    print(
      f'{name}: b wins {100 * one["value"]:.1f}% [{100 * one["low"]:.1f}, '
      f'{100 * one["high"]:.1f}] of {one["n"]} prompts, sign test p '
      f'{one["p_value"]:.2g}'
    )
  print(page)


def _name(values, side: str) -> str:
  words = [getattr(values, side)]
  for part in ('weights', 'lora'):
    given = getattr(values, f'{side}_{part}')
    words += [given] if given else []
  return ' + '.join(words)


def _pictures(values, side: str, more: Sequence[str], out: pathlib.Path) -> str:
  """The folder of a side's pictures, drawn unless it is one."""
  given = getattr(values, side)
  parts = {
    name: getattr(values, f'{side}_{name}') for name in ('weights', 'lora')
  }
  if comparison.is_pictures(given):
    for name, value in parts.items():
      if value:
        raise ValueError(
          f'--{side}_{name}={value}: is for a model, and --{side}={given} is a '
          'folder of pictures'
        )
    return given
  if not values.prompts:
    raise ValueError(
      f'--{side}={given} is a model: name the --prompts that it draws'
    )
  folder = str(out / side)
  words = [f'--model={given}', f'--prompts={values.prompts}', f'--out={folder}']
  words += [f'--{name}={value}' for name, value in parts.items() if value]
  generate.main([*words, *more])
  return folder


def _score(
  out: pathlib.Path,
  scorer: scorers.Scorer,
  pairs: Sequence[comparison.Pair],
  folders: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
  """Scores (a [n], b [n]), read where this very scorer gave them before."""
  digest = hashlib.sha256(json.dumps(scorer.source).encode())
  for folder in folders:
    digest.update((pathlib.Path(folder) / manifest.MANIFEST).read_bytes())
  path = out / 'scores' / f'{scorer.name}-{digest.hexdigest()[:16]}.npy'
  if path.is_file():
    found = np.load(path, allow_pickle=False)
    if found.shape == (len(pairs), 2) and np.isfinite(found).all():
      return found[:, 0], found[:, 1]
  done, made = 0, []
  with ticker.Ticker(len(pairs), label=scorer.name) as bar:
    for scores in scorer.batches(_questions(pairs), read=images_lib.load):
      made.append(scores)
      done += len(scores)
      bar.update(done)
  found = np.concatenate(made)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.partial.npy')
  np.save(partial, found)
  partial.replace(path)
  return found[:, 0], found[:, 1]


def _questions(pairs: Sequence[comparison.Pair]) -> Iterator[scorers.Question]:
  for pair in pairs:
    yield pair.prompt, (pair.a, pair.b)


if __name__ == '__main__':
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
  sys.exit(arguments.run(main, sys.argv[1:]))
