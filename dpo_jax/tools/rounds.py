"""Aligns a model on its own pictures, round by round, with AI feedback.

  python -m dpo_jax.tools.rounds --config=configs/sd15.py --workdir=runs/loop \\
    --prompts=train.txt --labeller=pickscore=PICKSCORE \\
    --eval_prompts=parti.tsv --scorers=hpsv2=HPS --rounds=2 \\
    [--steps=50 --guidance_scale=7.5 ...] [--config.optim.lr=1e-5 ...]

A round draws several pictures of each prompt with the model of the round
before, lets the labeller choose the best and the worst, trains on these pairs
(from that model, which is also the reference), and compares the outcome with
the first model on prompts and by judges that have no part in the training.

Every stage is a command of its own, printed before it runs: tools.generate,
tools.rank, tools.prepare, main, tools.evaluate. WORKDIR/rounds.json knows which
are done; the same command goes on where it stopped. It also holds the win
rates, and WORKDIR/samples.png shows the same prompts round by round. Flags of
tools.generate are those of all pictures; --config.KEY=VALUE of all trainings.
Exit code: 0, 2 when the input is wrong, else that of the stage that failed.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax import flags, limits, scoring
from dpo_jax.data import images as images_lib
from dpo_jax.evaluate import comparison, grid, ranking
from dpo_jax.tools import arguments, stages

# Prompts on samples.png.
SHOWN = 32


def _parse(argv: Sequence[str]):
  """(own flags, flags of tools.generate, overrides of the config)."""
  parser = arguments.Parser('dpo_jax.tools.rounds', __doc__)
  add, whole = parser.add_argument, arguments.number(int, low=1)
  add('--config', required=True, help='recipe of the training')
  add('--workdir', required=True)
  add('--prompts', required=True, help='to draw training pictures of')
  add('--labeller', required=True, help='NAME=FOLDER, who chooses')
  add('--eval_prompts', required=True, help='to compare on')
  add('--scorers', required=True, help='NAME=FOLDER,... who compare')
  add('--tokenizer', default='', help='folder of vocab.json and merges.txt')
  add('--rounds', type=whole, default=1)
  add('--images_per_prompt', type=arguments.number(int, low=2), default=4)
  add('--pairs', default='extremes', choices=ranking.MODES)
  add(
    '--min_gap',
    type=arguments.number(float, low=0),
    default=0.0,
    help="of a pair's scores, see tools.rank",
  )
  add('--seed', type=arguments.number(int, low=0, high=10**6), default=0)
  add('--dry_run', action='store_true', help='print the commands only')
  values, rest = parser.parse_known_args(list(argv))
  return values, *stages.split_overrides(rest)


def _check(values, overrides: Sequence[str]) -> str:
  """The first model; ValueError for what a later stage would refuse."""
  config, _ = flags.parse(
    [
      'main',
      f'--config={values.config}',
      f'--workdir={values.workdir}',
      *overrides,
      # Each round's own, which is not there yet.
      '--config.data.path=.',
    ]
  )
  limits.validate(config)
  labeller = scoring.parse(values.labeller)
  if len(labeller) > 1:
    raise ValueError(f'--labeller={values.labeller}: name one judge')
  ((who, place),) = labeller.items()
  for name, folder in scoring.parse(values.scorers).items():
    if name == who and _weights(name, folder) == _weights(who, place):
      raise ValueError(
        f'--scorers={name}={folder}: is also the labeller; a judge that the '
        'training pleases says nothing: compare by another one'
      )
  for name in ('prompts', 'eval_prompts'):
    if not pathlib.Path(getattr(values, name)).is_file():
      raise ValueError(f'--{name}={getattr(values, name)}: no such file')
  return config.model.folder


def _weights(name: str, folder: str) -> pathlib.Path:
  """Where a judge's weights lie, however that is written."""
  if name in scoring.IN_PARTS:
    folder = folder.rpartition(':')[0]
  return pathlib.Path(folder).resolve()


def plan(argv: Sequence[str]) -> list[stages.Stage]:
  """All stages in their order; ValueError says what is wrong."""
  values, drawing, overrides = _parse(argv)
  policy = first = _check(values, overrides)
  root = pathlib.Path(values.workdir)
  compared = [f'--prompts={values.eval_prompts}', f'--seed={values.seed}']
  base = root / 'base'
  found = [
    stages.Stage(
      'base',
      'dpo_jax.tools.generate',
      (f'--model={first}', f'--out={base}', *compared, *drawing),
    )
  ]
  for number in range(1, values.rounds + 1):
    folder = root / f'round_{number}'
    # Other pictures in each round, and others than are compared.
    seed = values.seed + 1000 * number
    drawn = [*drawing, f'--seed={seed}']
    made = [
      *_make_pairs(values, folder, policy, drawn),
      _train(values, folder, policy, overrides),
      *_compare(values, folder, base, [*compared, *drawing]),
    ]
    found += [
      stage._replace(name=f'round {number}: {stage.name}') for stage in made
    ]
    policy = str(folder / 'run' / 'export')
  return found


def _tokenizer(values) -> list[str]:
  return [f'--tokenizer={values.tokenizer}'] if values.tokenizer else []


def _make_pairs(
  values, folder: pathlib.Path, policy: str, drawing: Sequence[str]
) -> list[stages.Stage]:
  """The policy's own pictures, ranked, as a prepared folder."""
  pictures, pairs = folder / 'pictures', folder / 'pairs'
  draw = [
    f'--model={policy}',
    f'--prompts={values.prompts}',
    f'--out={pictures}',
    f'--images_per_prompt={values.images_per_prompt}',
    *drawing,
  ]
  rank = [
    f'--pictures={pictures}',
    f'--scorer={values.labeller}',
    f'--pairs={values.pairs}',
    f'--min_gap={values.min_gap}',
    *_tokenizer(values),
  ]
  source = pictures / ranking.PAIRS
  prepare = ['--format=jsonl', f'--source={source}', f'--out={pairs}']
  return [
    stages.Stage('draw', 'dpo_jax.tools.generate', tuple(draw)),
    stages.Stage('rank', 'dpo_jax.tools.rank', tuple(rank)),
    stages.Stage(
      'prepare', 'dpo_jax.tools.prepare', tuple(prepare), whole=pairs
    ),
  ]


def _train(
  values, folder: pathlib.Path, policy: str, overrides: Sequence[str]
) -> stages.Stage:
  """From the policy, which is also the reference."""
  words = [
    f'--config={values.config}',
    f'--workdir={folder / "run"}',
    f'--config.seed={values.seed}',
    *overrides,
    f'--config.model.folder={policy}',
    f'--config.data.path={folder / "pairs"}',
  ]
  return stages.Stage('train', 'dpo_jax.main', tuple(words))


def _compare(
  values, folder: pathlib.Path, base: pathlib.Path, drawing: Sequence[str]
) -> list[stages.Stage]:
  """What was trained against the first model."""
  aligned = folder / 'aligned'
  draw = [f'--model={folder / "run" / "export"}', f'--out={aligned}', *drawing]
  compare = [
    f'--a={base}',
    f'--b={aligned}',
    f'--prompts={values.eval_prompts}',
    f'--scorers={values.scorers}',
    f'--out={folder / "compare"}',
    *_tokenizer(values),
  ]
  return [
    stages.Stage('draw the comparison', 'dpo_jax.tools.generate', tuple(draw)),
    stages.Stage('compare', 'dpo_jax.tools.evaluate', tuple(compare)),
  ]


def main(argv: Sequence[str]) -> None:
  """Runs what is not done; ValueError says what is wrong with the input.

  Raises StageError where a stage failed.
  """
  planned = plan(argv)
  values, _, _ = _parse(argv)
  if values.dry_run:
    print('\n'.join(stage.text for stage in planned))
    return
  root = pathlib.Path(values.workdir)
  record = stages.Record(root)
  stages.run_missing(planned, record)
  record.values['rounds'] = [
    read_round(root / f'round_{number}')
    for number in range(1, values.rounds + 1)
  ]
  record.write()
  _save_samples(root, values.rounds)
  print(describe(record.values['rounds']))


def read_round(folder: pathlib.Path) -> dict[str, Any]:
  """What a finished round says: win rates over the first model, labels."""
  report = json.loads((folder / 'compare' / 'report.json').read_text())
  ranked = json.loads((folder / 'pictures' / ranking.REPORT).read_text())
  return {
    'pairs': ranked['pairs']['kept'],
    'labeller_mean_score': ranked['mean_score'],
    'over_base': {
      name: {
        key: one[key]
        for key in (
          *('value', 'low', 'high', 'n', 'wins', 'losses', 'ties'),
          *('p_value', 'median_a', 'median_b'),
        )
      }
      for name, one in report['scorers'].items()
    },
  }


def describe(found: Sequence[dict[str, Any]]) -> str:
  """A line a round and judge."""
  return '\n'.join(
    f'round {number} ({one["pairs"]} pairs): {name} prefers it to the first '
    f'model on {100 * rate["value"]:.1f}% [{100 * rate["low"]:.1f}, '
    f'{100 * rate["high"]:.1f}] of {rate["n"]} prompts'
    for number, one in enumerate(found, 1)
    for name, rate in one['over_base'].items()
  )


def _save_samples(root: pathlib.Path, rounds: int) -> None:
  """The same prompts and seeds, one column a model."""
  places = [root / 'base']
  places += [root / f'round_{n}' / 'aligned' for n in range(1, rounds + 1)]
  entries = comparison.read_entries(places[0])[:SHOWN]
  grid.save_columns(
    root / 'samples.png',
    [
      np.stack([images_lib.load(place / entry['file']) for entry in entries])
      for place in places
    ],
    [entry['prompt'] for entry in entries],
    labels=['base', *(f'round {n}' for n in range(1, rounds + 1))],
  )


def run(argv: Sequence[str]) -> int:
  """The exit code."""
  return stages.exit_code(main, argv)


if __name__ == '__main__':
  sys.exit(run(sys.argv[1:]))
