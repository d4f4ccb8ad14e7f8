"""Labels, in rounds, for a generator that draws almost nothing benign.

  python -m dpo_jax.tools.censor_rounds --config=configs/reward.py:tench \\
    --model=MODEL --prompts=prompts.txt --workdir=runs/censor \\
    [--labeller=reward=FOLDER] [--iterations=501,1501,3001 --per_class=10] \\
    [--reward_scale=5] [--eval_prompts=others.txt] \\
    [--sampler=ddpm --steps=100 ...] [--config.reward.widths='(32,64)' ...]

Imitation learning of Yoon et al., 2023 (arXiv 2307.02770). A round draws
pictures with the censor of the round before (the first one with none), takes
--per_class benign labels of them and as many malign ones, or all there are, and
trains the reward anew on the labels of all rounds. There are as many rounds as
numbers of --iterations.

Without --labeller a person labels: the tool ends with code 5 and says how, and
the same command goes on. They may stop when there are enough of both classes. A
labeller is a scorer of single pictures as tools.vote takes it.

Every stage is a command of its own, printed before it runs: tools.generate,
tools.judge or tools.vote, main. WORKDIR/rounds.json knows which are done; the
same command goes on where it stopped. With --eval_prompts the same pictures are
drawn without a censor and with that of each round (samples.png), and, given a
labeller or an --eval_labeller, rounds.json tells the malign share of each.
Flags of tools.generate are those of all pictures, those of a reward of all that
are drawn with one; --config.KEY=VALUE of all trainings.
Exit code: 0, 2 when the input is wrong, 5 when labels are waited for, else that
of the stage that failed.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax import flags, limits
from dpo_jax.data import images as images_lib
from dpo_jax.evaluate import comparison, grid, vote_stats
from dpo_jax.judging import items as items_lib
from dpo_jax.judging import votes as votes_lib
from dpo_jax.tools import arguments, censoring, stages, vote

# Pictures on samples.png.
SHOWN = 32
WAITING = 5
VOTES, MEASURED = 'votes.jsonl', 'measured.jsonl'
# What this tool itself sets of a config.
OWN = ('data.path', 'model.folder', 'train.num_steps', 'seed')


class Waiting(Exception):
  """A person has to label first."""


def _iterations(text: str) -> tuple[int, ...]:
  whole = arguments.number(int, low=1)
  return tuple(whole(word) for word in text.split(','))


def _parse(argv: Sequence[str]):
  """(own flags, flags of tools.generate, those with a reward, overrides)."""
  parser = arguments.Parser('dpo_jax.tools.censor_rounds', __doc__)
  add, number = parser.add_argument, arguments.number
  add('--config', required=True, help='recipe of the reward')
  add('--workdir', required=True)
  add('--model', required=True, help='the generator, which stays as it is')
  add('--prompts', required=True, help='to draw pictures of in each round')
  add('--labeller', help='NAME=FOLDER; default: a person')
  add('--threshold', type=number(float, low=-float('inf')), help="labeller's")
  add('--iterations', type=_iterations, default=(501, 1501, 3001))
  add('--per_class', type=number(int, low=1), default=10, help='each round')
  add('--eval_prompts', help='to compare the rounds on')
  add('--eval_labeller', help='who measures; default: the labeller')
  add('--eval_threshold', type=number(float, low=-float('inf')))
  add('--tokenizer', default='', help='folder of vocab.json and merges.txt')
  add('--seed', type=number(int, low=0, high=10**6), default=0)
  add('--dry_run', action='store_true', help='print the commands only')
  values, rest = parser.parse_known_args(list(argv))
  drawing, overrides = stages.split_overrides(rest)
  guiding = [
    word
    for word in drawing
    if word.partition('=')[0].removeprefix('--') in censoring.OF_A_REWARD
  ]
  loose = [word for word in guiding if '=' not in word]
  if loose:
    raise ValueError(f'{loose[0]} VALUE: write it as {loose[0]}=VALUE')
  drawing = [word for word in drawing if word not in guiding]
  if not any(word.startswith('--reward_scale=') for word in guiding):
    # Of one network, the paper's.
    guiding.append('--reward_scale=5.0')
  return values, drawing, guiding, overrides


def _check(values, overrides: Sequence[str]) -> None:
  """ValueError for what a later stage would refuse."""
  for key in OWN:
    if any(word.startswith(f'--config.{key}=') for word in overrides):
      raise ValueError(f'--config.{key}: follows from the flags of this tool')
  config, _ = flags.parse(
    [
      'main',
      f'--config={values.config}',
      f'--workdir={values.workdir}',
      *overrides,
      f'--config.model.folder={values.model}',
      # Each round's own, which is not there yet.
      '--config.data.path=.',
    ]
  )
  if config.task != 'reward':
    raise ValueError(
      f'--config={values.config}: trains task {config.task}; name a recipe of '
      'rewards'
    )
  limits.validate(config)
  for text, threshold in (_labeller(values), _judge(values)):
    if text:
      vote.check_scorer(text, threshold)
  if values.eval_labeller and not values.eval_prompts:
    raise ValueError('--eval_labeller: give --eval_prompts too')
  for name in ('prompts', 'eval_prompts'):
    given = getattr(values, name)
    if given and not pathlib.Path(given).is_file():
      raise ValueError(f'--{name}={given}: no such file')


def _labeller(values) -> tuple[str | None, float | None]:
  return values.labeller, values.threshold


def _judge(values) -> tuple[str | None, float | None]:
  """Who measures, with its threshold."""
  if values.eval_labeller:
    return values.eval_labeller, values.eval_threshold
  return _labeller(values)


def plan(argv: Sequence[str]) -> list[stages.Stage]:
  """All stages in their order; ValueError says what is wrong."""
  values, drawing, guiding, overrides = _parse(argv)
  _check(values, overrides)
  root, found = pathlib.Path(values.workdir), []
  if values.eval_prompts:
    found += _measure(values, root / 'base', drawing)
  censor: list[str] = []
  for number in range(1, len(values.iterations) + 1):
    folder = root / f'round_{number}'
    # Other pictures in each round, and others than are compared.
    seed = values.seed + 1000 * number
    drawn = [*drawing, f'--seed={seed}', *censor]
    made = [
      *_make_labels(values, folder, drawn),
      _train(values, root, number, overrides),
    ]
    censor = [f'--reward={folder / "run" / "export"}', *guiding]
    if values.eval_prompts:
      made += _measure(values, folder / 'eval', [*drawing, *censor])
    found += [
      stage._replace(name=f'round {number}: {stage.name}') for stage in made
    ]
  return found


def _make_labels(
  values, folder: pathlib.Path, drawn: Sequence[str]
) -> list[stages.Stage]:
  """The pictures of a round and their labels, as tools.judge exports them."""
  pictures, votes = folder / 'pictures', folder / VOTES
  draw = [
    f'--model={values.model}',
    f'--prompts={values.prompts}',
    f'--out={pictures}',
    *drawn,
  ]
  given = [f'--likes={pictures}', f'--votes={votes}']
  label = stages.Stage('label', 'dpo_jax.tools.judge', tuple(given))
  if values.labeller:
    label = _vote(values, 'label', pictures, votes, _labeller(values))
  export = [
    *given,
    f'--export={folder / "labels"}',
    f'--per_class={values.per_class}',
  ]
  return [
    stages.Stage('draw', 'dpo_jax.tools.generate', tuple(draw)),
    label,
    stages.Stage('export', 'dpo_jax.tools.judge', tuple(export)),
  ]


def _vote(values, name, pictures, votes, voter) -> stages.Stage:
  text, threshold = voter
  words = [f'--likes={pictures}', f'--votes={votes}', f'--scorer={text}']
  if threshold is not None:
    words.append(f'--threshold={threshold}')
  if values.tokenizer:
    words.append(f'--tokenizer={values.tokenizer}')
  return stages.Stage(name, 'dpo_jax.tools.vote', tuple(words))


def _train(
  values, root: pathlib.Path, number: int, overrides: Sequence[str]
) -> stages.Stage:
  """On the labels of all rounds so far, from random weights."""
  labels = [f'{root / f"round_{n}" / "labels"}' for n in range(1, number + 1)]
  words = [
    f'--config={values.config}',
    f'--workdir={root / f"round_{number}" / "run"}',
    # As many of each class as there are of the rarer one.
    '--config.reward.per_class=0',
    *overrides,
    f'--config.seed={values.seed}',
    f'--config.model.folder={values.model}',
    f'--config.data.path={",".join(labels)}',
    f'--config.train.num_steps={values.iterations[number - 1]}',
  ]
  return stages.Stage('train', 'dpo_jax.main', tuple(words))


def _measure(
  values, folder: pathlib.Path, drawing: Sequence[str]
) -> list[stages.Stage]:
  """The pictures that are compared, and who of them is malign."""
  pictures = folder / 'pictures'
  draw = [
    f'--model={values.model}',
    f'--prompts={values.eval_prompts}',
    f'--out={pictures}',
    f'--seed={values.seed}',
    *drawing,
  ]
  name = 'base: ' if folder.name == 'base' else ''
  made = [
    stages.Stage(
      f'{name}draw to compare', 'dpo_jax.tools.generate', tuple(draw)
    )
  ]
  if _judge(values)[0]:
    votes = folder / MEASURED
    made.append(
      _vote(values, f'{name}measure', pictures, votes, _judge(values))
    )
  return made


def main(argv: Sequence[str]) -> None:
  """Runs what is not done; ValueError says what is wrong with the input.

  Raises StageError where a stage failed, Waiting where a person has to label.
  """
  planned = plan(argv)
  values, *_ = _parse(argv)
  if values.dry_run:
    print('\n'.join(stage.text for stage in planned))
    return
  root = pathlib.Path(values.workdir)
  record = stages.Record(root)

  def is_made(stage):
    if not values.labeller and stage.name.endswith(': label'):
      check_labels(stage, values.per_class)
      return True
    return stage.is_made()

  stages.run_missing(planned, record, is_made=is_made)
  rounds = range(1, len(values.iterations) + 1)
  folders = [root / f'round_{number}' for number in rounds]
  record.values['rounds'] = [read_round(folder) for folder in folders]
  if values.eval_prompts:
    record.values['base'] = read_share(root / 'base' / MEASURED)
    _save_samples(root / 'samples.png', [root / 'base', *folders])
  record.write()
  print(describe(record.values))


def check_labels(stage: stages.Stage, per_class: int) -> None:
  """Raises Waiting while labels of a person are missing.

  They are enough when there are `per_class` of each class, or when no picture
  is without.
  """
  given = dict(word.removeprefix('--').split('=', 1) for word in stage.words)
  items = items_lib.open_pictures(given['likes'])
  choices = read_choices(pathlib.Path(given['votes']))
  counts = {name: choices.count(name) for name in ('malign', 'benign')}
  if min(counts.values()) < per_class and len(choices) < len(items):
    raise Waiting(
      f'{stage.name}: {per_class} malign and {per_class} benign labels are '
      f'needed and there are {counts["malign"]} and {counts["benign"]}, of '
      f'{len(items)} pictures {len(choices)} are labelled; label more with '
      f'{stage.text} and give the same command again'
    )


def read_choices(path: pathlib.Path) -> list[str]:
  """What each picture that was voted on is, by majority; [] for no file."""
  if not path.is_file():
    return []
  votes = votes_lib.VoteFile(path)
  try:
    found = vote_stats.by_item(votes.votes(), items_lib.LIKES_QUESTION)
  finally:
    votes.close()
  return [
    vote_stats.majority(list(given.values()), even='unsure')
    for given in found.values()
  ]


def read_share(path: pathlib.Path) -> dict[str, Any] | None:
  """The malign share of a file of votes, with Wilson's interval."""
  choices = read_choices(path)
  items = {str(i): {'all': one} for i, one in enumerate(choices)}
  return vote_stats.shares(items, items_lib.CHOICES[items_lib.LIKES]).get(
    'malign'
  )


def read_round(folder: pathlib.Path) -> dict[str, Any]:
  """What a finished round says: its labels, what was drawn, malign share."""
  lines = (folder / 'labels' / 'likes.jsonl').read_text().splitlines()
  liked = [json.loads(line)['liked'] for line in lines]
  return {
    'labels': {'malign': liked.count(False), 'benign': liked.count(True)},
    'labelled': len(read_choices(folder / VOTES)),
    'malign_among_labelled': read_share(folder / VOTES),
    'malign': read_share(folder / 'eval' / MEASURED),
  }


def describe(found: dict[str, Any]) -> str:
  """A line a round."""
  lines = []
  if found.get('base'):
    lines.append(f'without a censor: {_percent(found["base"])}')
  for number, one in enumerate(found['rounds'], 1):
    labels = one['labels']
    line = (
      f'round {number}: {labels["malign"]} malign and {labels["benign"]} '
      f'benign labels, of {one["labelled"]} pictures'
    )
    if one['malign']:
      line += f'; with its censor {_percent(one["malign"])}'
    lines.append(line)
  return '\n'.join(lines)


def _percent(share: dict[str, Any]) -> str:
  value, low, high = (100 * share[key] for key in ('value', 'low', 'high'))
  return f'{value:.1f}% [{low:.1f}, {high:.1f}] malign of {share["n"]}'


def _save_samples(path: pathlib.Path, folders: Sequence[pathlib.Path]) -> None:
  """The same noise without a censor and round by round."""
  base, *rounds = folders
  places = [base / 'pictures', *(one / 'eval' / 'pictures' for one in rounds)]
  entries = comparison.read_entries(places[0])[:SHOWN]
  grid.save_columns(
    path,
    [
      np.stack([images_lib.load(place / entry['file']) for entry in entries])
      for place in places
    ],
    [entry['prompt'] for entry in entries],
    labels=['none', *(f'round {n}' for n in range(1, len(places)))],
  )


def run(argv: Sequence[str]) -> int:
  """The exit code."""
  try:
    return stages.exit_code(main, argv)
  except Waiting as found:
    print(found, file=sys.stderr)
    return WAITING


if __name__ == '__main__':
  sys.exit(run(sys.argv[1:]))
