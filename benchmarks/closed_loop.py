"""The closed loop on the emoji model: AI feedback on its own pictures.

  python -m benchmarks.closed_loop --workdir=runs/closed_loop [--seeds=0,1,2]
  python -m benchmarks.closed_loop --workdir=runs/closed_loop --table

Two judges of style are trained first, on real pictures of different captions:
the labeller on those that are drawn for training, the evaluator on the held-out
ones, which are drawn for comparing. They share no picture, no seed. Then, for
each seed, `dpo_jax.tools.rounds`: draw four pictures of each training caption,
let the labeller choose the best and the worst where these differ enough, train,
compare with the base by the evaluator; two rounds of DPO, and of SFT on the
winners, whose first round has the same pictures and pairs. The same command
goes on where it stopped.

The table: win rate over the base by the evaluator (a prompt's outcome is its
mean over the seeds; bootstrap over prompts), the share of pictures in the
preferred style by either judge, and how many show their caption (retrieval
among all real pictures, which has no part in anything).
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from configs import quickstart
from dpo_jax import datasets, scoring, sharding
from dpo_jax.data import images as images_lib
from dpo_jax.evaluate import comparison, retrieval, stats

RECIPE = 'configs/emoji_rounds.py'
ROUNDS = 2
ARMS = ('dpo', 'sft')
STYLE = 'twemoji'
DRAWING = (
  '--sampler=ddim',
  '--steps=25',
  '--guidance_scale=2.0',
  '--batch=64',
  # In log odds: the labeller is sure of one of the two at least.
  '--min_gap=10',
  '--images_per_prompt=4',
)


def run_command(*words: str) -> None:
  """Runs a module of ours to its end; raises CalledProcessError."""
  subprocess.run([sys.executable, '-m', *words], check=True)


def write_prompts(root: pathlib.Path) -> None:
  """train.txt, held.txt, and held.parquet with the held-out pictures."""
  config = quickstart.get_config()
  data = datasets.read_parquet(
    [config.data.path], holdout=config.data.holdout, paired=True
  )
  held = data.find_prompts(10**6)
  table = parquet.read_table(config.data.path)
  train = sorted(set(table['caption'].to_pylist()) - set(held))
  root.mkdir(parents=True, exist_ok=True)
  for name, captions in (('train', train), ('held', held)):
    (root / f'{name}.txt').write_text('\n'.join(captions) + '\n')
  chosen = pc.is_in(table['caption'], value_set=pa.array(held))
  parquet.write_table(table.filter(chosen), root / 'held.parquet')


def train_judges(root: pathlib.Path) -> None:
  """The labeller and the evaluator, unless they are there."""
  holdout = quickstart.get_config().data.holdout
  for name, changes in (
    ('labeller', {'data.holdout': holdout, 'seed': 1}),
    ('evaluator', {'data.path': root / 'held.parquet', 'seed': 2}),
  ):
    if (root / name / 'export' / 'config.json').is_file():
      continue
    run_command(
      'dpo_jax.main',
      '--config=configs/emoji_judge.py',
      f'--workdir={root / name}',
      *(f'--config.{key}={value}' for key, value in changes.items()),
    )


def judge(root: pathlib.Path, name: str) -> str:
  """As the tools name it."""
  return f'classifier={root / name / "export"}:{STYLE}'


def run_loop(root: pathlib.Path, arm: str, seed: int, rounds: int) -> None:
  """One arm; its first round draws nothing that another has drawn."""
  folder, first = root / f'{arm}-{seed}', root / f'{ARMS[0]}-{seed}'
  for part in ('base', 'round_1/pictures'):
    if arm != ARMS[0] and not (folder / part).exists():
      shutil.copytree(first / part, folder / part)
  run_command(
    'dpo_jax.tools.rounds',
    f'--config={RECIPE}:{arm}',
    f'--workdir={folder}',
    f'--prompts={root / "train.txt"}',
    f'--eval_prompts={root / "held.txt"}',
    f'--labeller={judge(root, "labeller")}',
    f'--scorers={judge(root, "evaluator")}',
    f'--rounds={rounds}',
    f'--seed={seed}',
    *DRAWING,
  )


def measure(root: pathlib.Path, seeds: list[int]) -> list[dict[str, Any]]:
  """A row a model: base, and each round of each arm that all seeds have."""
  gallery = datasets.read_parquet(
    [quickstart.get_config().data.path], holdout=0.0, paired=False
  ).all_images
  real = _as_float([images_lib.decode(data) for data in gallery.images])
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  judges = {
    name: scoring.open_scorer(
      *judge(root, name).split('=', 1), mesh=mesh, batch_size=64
    )
    for name in ('evaluator', 'labeller')
  }
  models = {'base': ('dpo', 'base')} | {
    f'{arm}, round {n}': (arm, f'round_{n}/aligned')
    for arm in ARMS
    for n in range(1, ROUNDS + 1)
  }
  rows = []
  for name, (arm, part) in models.items():
    folders = [root / f'{arm}-{seed}' / part for seed in seeds]
    if not all(comparison.is_pictures(str(folder)) for folder in folders):
      continue
    row: dict[str, Any] = {'model': name, 'seeds': seeds}
    scores, shown = {key: [] for key in judges}, []
    for folder in folders:
      entries = comparison.read_entries(folder)
      captions = [entry['prompt'] for entry in entries]
      images = [images_lib.load(folder / entry['file']) for entry in entries]
      for key, one in judges.items():
        scores[key].append(one.score(images, captions))
      shown.append(
        retrieval.retrieval_accuracy(
          _as_float(images), captions, real, gallery.captions
        )
      )
    for key in judges:
      row[f'style_by_{key}'] = float(np.mean(np.stack(scores[key]) > 0))
    row['retrieval'] = [float(value) for value in shown]
    if name == 'base':
      base = scores['evaluator']
    else:
      outcomes = np.mean(
        [
          stats.wins(ours, theirs)
          for ours, theirs in zip(scores['evaluator'], base, strict=True)
        ],
        axis=0,
      )
      row['win_rate'] = stats.bootstrap(outcomes)
    rows.append(row)
  return rows


def _as_float(images: list[np.ndarray]) -> np.ndarray:
  return np.stack(images).astype(np.float32) / 127.5 - 1


def markdown(rows: list[dict[str, Any]]) -> str:
  """The table of RESULTS.md."""
  lines = [
    '| model | win rate over base | style, evaluator | style, labeller | '
    'retrieval (seeds) |',
    '|---|---|---|---|---|',
  ]
  for row in rows:
    rate = row.get('win_rate')
    shown = '' if rate is None else _percent(rate)
    by_seed = ', '.join(f'{100 * value:.1f}' for value in row['retrieval'])
    lines.append(
      f'| {row["model"]} | {shown} | {100 * row["style_by_evaluator"]:.1f} | '
      f'{100 * row["style_by_labeller"]:.1f} | '
      f'{100 * np.mean(row["retrieval"]):.1f} ({by_seed}) |'
    )
  return '\n'.join(lines)


def _percent(rate: dict[str, Any]) -> str:
  low, high = 100 * rate['low'], 100 * rate['high']
  return f'{100 * rate["value"]:.1f} [{low:.1f}, {high:.1f}]'


def main(argv: list[str]) -> int:
  """Runs what is missing and prints the table."""
  parser = argparse.ArgumentParser(
    'benchmarks.closed_loop',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', default='0,1,2')
  parser.add_argument('--arms', default=','.join(ARMS))
  parser.add_argument('--rounds', type=int, default=ROUNDS)
  parser.add_argument('--table', action='store_true', help='run nothing')
  values = parser.parse_args(argv)
  seeds = [int(word) for word in values.seeds.split(',')]
  root = values.workdir
  if not values.table:
    write_prompts(root)
    train_judges(root)
    for seed in seeds:
      for arm in values.arms.split(','):
        run_loop(root, arm, seed, values.rounds)
  rows = measure(root, seeds)
  (root / 'table.json').write_text(json.dumps(rows, indent=2) + '\n')
  print(markdown(rows))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
