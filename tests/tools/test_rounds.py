"""python -m dpo_jax.tools.rounds: draw, rank, prepare, train, compare."""

import importlib
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dpo_jax import main as main_lib
from dpo_jax.tools import rounds, stages

JUDGE = 'classifier=examples/emoji/judge'
TINY = [
  '--config.train.num_steps=2',
  '--config.train.batch_size=8',
  '--config.train.eval_every=0',
  '--config.train.log_every=1',
  '--config.train.checkpoint_every=2',
  '--config.optim.warmup_steps=1',
  '--config.eval.num_prompts=2',
  '--config.eval.num_steps=2',
  '--config.eval.batch_size=8',
  '--config.eval.num_draws=1',
]
# The run evaluates in batches of 8 on 8 virtual devices.
DRAWING = ['--sampler=ddim', '--steps=2', '--guidance_scale=2', '--batch=8']


@pytest.fixture
def words(tmp_path):
  shutil.copytree('examples/emoji/judge', tmp_path / 'other')
  captions = ['dog face', 'red apple', 'trumpet', 'bread', 'hammer', 'key']
  captions += ['crab', 'owl', 'rocket', 'anchor', 'cactus', 'candle']
  (tmp_path / 'train.txt').write_text('\n'.join(captions) + '\n')
  (tmp_path / 'eval.txt').write_text('cat face\nlemon\nbus\n')
  return [
    '--config=configs/emoji_rounds.py',
    f'--workdir={tmp_path / "loop"}',
    f'--prompts={tmp_path / "train.txt"}',
    f'--eval_prompts={tmp_path / "eval.txt"}',
    f'--labeller={JUDGE}:twemoji',
    f'--scorers=classifier={tmp_path / "other"}:noto',
    '--rounds=1',
    '--images_per_prompt=2',
    *DRAWING,
    *TINY,
  ]


def in_process(stage):
  """The command of a stage, without a process of its own."""
  module = importlib.import_module(stage.module)
  if module is main_lib:
    assert main_lib.run(['main', *stage.words]) == 0
  else:
    module.main(list(stage.words))


def find(stages, name):
  return next(stage for stage in stages if stage.name == name)


def flag(stage, name):
  found = [word for word in stage.words if word.startswith(f'--{name}=')]
  assert len(found) == 1
  return found[0].partition('=')[2]


def test_each_round_goes_on_from_the_last(words, tmp_path):
  planned = rounds.plan([*words, '--rounds=2', '--min_gap=2.5', '--pairs=all'])
  root = tmp_path / 'loop'
  assert len(planned) == 1 + 2 * 6
  assert len({stage.name for stage in planned}) == len(planned)
  first = 'examples/emoji/model'
  assert flag(find(planned, 'base'), 'model') == first
  export = str(root / 'round_1' / 'run' / 'export')
  for number, model in ((1, first), (2, export)):
    draw = find(planned, f'round {number}: draw')
    train = find(planned, f'round {number}: train')
    assert flag(draw, 'model') == model
    assert flag(train, 'config.model.folder') == model
    assert flag(train, 'config.data.path').endswith(f'round_{number}/pairs')
    rank = find(planned, f'round {number}: rank')
    assert flag(rank, 'min_gap') == '2.5' and flag(rank, 'pairs') == 'all'
    # Both are compared with the first model.
    compare = find(planned, f'round {number}: compare')
    assert flag(compare, 'a') == str(root / 'base')
  seeds = [flag(s, 'seed') for s in planned if s.module.endswith('generate')]
  base, one, again, two, last = seeds
  assert base == again == last and len({base, one, two}) == 3


def test_a_whole_round_that_was_stopped(words, tmp_path, monkeypatch, capsys):
  done = []

  def count(stage):
    done.append(stage.name)
    in_process(stage)

  monkeypatch.setattr(stages, 'run', count)
  root = tmp_path / 'loop'

  def stop(stage):
    count(stage)
    if stage.name == 'round 1: prepare':
      # Killed before anybody wrote down that it is done.
      raise stages.StageError(stage, 4)

  monkeypatch.setattr(stages, 'run', stop)
  assert rounds.run(words) == 4
  assert 'round 1: prepare ended with exit code 4' in capsys.readouterr().err
  monkeypatch.setattr(stages, 'run', count)
  assert rounds.run(words) == 0
  # Nothing twice, all in order.
  assert done == [stage.name for stage in rounds.plan(words)]
  out = capsys.readouterr().out
  record = json.loads((root / 'rounds.json').read_text())
  assert len(record['rounds']) == 1
  for number, one in enumerate(record['rounds'], 1):
    rate = one['over_base']['classifier']
    report = json.loads(
      (root / f'round_{number}' / 'compare' / 'report.json').read_text()
    )
    assert rate['value'] == report['scorers']['classifier']['value']
    assert rate['n'] == 3
    assert f'round {number} ({one["pairs"]} pairs): classifier' in out
  with Image.open(root / 'samples.png') as sheet:
    assert np.asarray(sheet).std() > 1
  # Done is done, and other flags are another loop.
  assert rounds.run(words) == 0
  assert len(done) == len(rounds.plan(words))
  assert rounds.run([*words, '--seed=7']) == 2
  assert 'give the same flags' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('word', 'text'),
  [
    (f'--scorers={JUDGE}:twemoji', 'is also the labeller'),
    # The same weights, asked for the other class and by another path.
    (
      '--scorers=classifier=./examples/../examples/emoji/judge:noto',
      'is also the labeller',
    ),
    ('--scorers=beauty=x', 'names are pickscore'),
    (f'--labeller={JUDGE}:twemoji,clip=x', 'name one judge'),
    ('--prompts=missing.txt', 'missing.txt: no such file'),
    ('--config.optim.lr=fast', 'must be float'),
    ('--config.optim.rl=1', 'there is no such key'),
    ('--rounds=0', 'at least 1'),
    ('--images_per_prompt=1', 'at least 2'),
  ],
)
def test_bad_input_is_found_before_anything_runs(
  words, word, text, monkeypatch, capsys, tmp_path
):
  monkeypatch.setattr(stages, 'run', None)
  assert rounds.run([*words, word]) == 2
  error = capsys.readouterr().err
  assert text in error and error.count('\n') == 1
  assert not (tmp_path / 'loop').exists()


def test_commands_can_be_read_first(words, capsys, tmp_path):
  assert rounds.run([*words, '--dry_run']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines == [stage.text for stage in rounds.plan(words)]
  assert lines[0].startswith('python -m dpo_jax.tools.generate --model=')
  assert not (tmp_path / 'loop').exists()


def test_a_stage_that_fails_ends_the_loop():
  with pytest.raises(stages.StageError) as caught:
    stages.run(stages.Stage('rank', 'dpo_jax.tools.rank', ('--help_me',)))
  assert caught.value.code == 2


def test_sigterm_reaches_the_stage(tmp_path):
  """The stage ends first, by its own handler."""
  (tmp_path / 'stage.py').write_text(
    'import signal, sys, time\n'
    'def stop(*_):\n'
    "  open('stopped', 'w').close()\n"
    '  sys.exit(4)\n'
    'signal.signal(signal.SIGTERM, stop)\n'
    "print('ready', flush=True)\n"
    'time.sleep(60)\n'
  )
  code = (
    'import sys\n'
    'from dpo_jax.tools import stages\n'
    'try:\n'
    "  stages.run(stages.Stage('x', 'stage', ()))\n"
    'except stages.StageError as error:\n'
    '  sys.exit(error.code)\n'
  )
  root = pathlib.Path(stages.__file__).parents[2]
  process = subprocess.Popen(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    env={'PYTHONPATH': f'{root}:{tmp_path}', 'PATH': '/usr/bin'},
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'ready\n'
  process.terminate()
  assert process.wait(timeout=60) == 4
  assert (tmp_path / 'stopped').exists()
