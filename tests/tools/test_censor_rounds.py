"""python -m dpo_jax.tools.censor_rounds: draw, label, train, in rounds."""

import importlib
import json

import pytest
import reward_folder
from PIL import Image

from dpo_jax import main as main_lib
from dpo_jax.judging import items as items_lib
from dpo_jax.judging import votes as votes_lib
from dpo_jax.tools import censor_rounds, stages

TINY = [
  '--config.data.resolution=8',
  '--config.reward.widths=(8,)',
  '--config.train.batch_size=8',
  '--config.train.eval_every=0',
  '--config.train.log_every=1',
  '--config.train.checkpoint_every=1',
  '--config.eval.batch_size=8',
]
DRAWING = ['--sampler=ddim', '--steps=2', '--batch=8', '--images_per_prompt=4']
ITEMS = 8


@pytest.fixture
def words(tiny_pixel_folder, tmp_path):
  """A loop of two rounds, whose labels a random network gives."""
  for name in ('train', 'eval'):
    (tmp_path / f'{name}.txt').write_text('a\nb\n')
  labeller = reward_folder.write(
    tmp_path / 'labeller', 'clean', 3, (8, 8), 'pixels'
  )
  return [
    '--config=configs/reward.py:tench',
    f'--workdir={tmp_path / "loop"}',
    f'--model={tiny_pixel_folder}',
    f'--prompts={tmp_path / "train.txt"}',
    f'--labeller=reward={labeller}',
    '--iterations=1,2',
    '--per_class=2',
    '--reward_scale=3',
    *DRAWING,
    *TINY,
  ]


def by_a_person(words):
  return [word for word in words if not word.startswith('--labeller')]


def in_process(stage):
  """The command of a stage, without a process of its own."""
  module = importlib.import_module(stage.module)
  if module is main_lib:
    assert main_lib.run(['main', *stage.words]) == 0
  else:
    module.main(list(stage.words))


def flag(stage, name):
  found = [word for word in stage.words if word.startswith(f'--{name}=')]
  return found[-1].partition('=')[2] if found else None


def test_each_round_draws_with_the_last_censor(words, tmp_path):
  compared = [f'--eval_prompts={tmp_path / "eval.txt"}', '--seed=3']
  planned = {s.name: s for s in censor_rounds.plan([*words, *compared])}
  root = tmp_path / 'loop'
  assert len(planned) == 2 + 2 * 6
  base = planned['base: draw to compare']
  first, second = (planned[f'round {n}: draw'] for n in (1, 2))
  export = str(root / 'round_1' / 'run' / 'export')
  for stage in (base, first):
    assert flag(stage, 'reward') is flag(stage, 'reward_scale') is None
  compared = planned['round 1: draw to compare']
  for stage in (second, compared):
    assert flag(stage, 'reward') == export
    assert flag(stage, 'reward_scale') == '3'
  # The compared have equal noise, what is labelled has other noise each round.
  assert flag(base, 'seed') == flag(compared, 'seed') == '3'
  assert len({flag(stage, 'seed') for stage in (base, first, second)}) == 3
  assert all('--steps=2' in s.words for s in (base, first, second, compared))
  # All labels so far, for as long as it was asked.
  labels = [str(root / f'round_{n}' / 'labels') for n in (1, 2)]
  for number in (1, 2):
    train = planned[f'round {number}: train']
    assert flag(train, 'config.data.path') == ','.join(labels[:number])
    assert flag(train, 'config.train.num_steps') == str(number)
    assert flag(planned[f'round {number}: export'], 'per_class') == '2'
  # Without that flag the scale is the paper's for one network.
  rest = [word for word in words if not word.startswith('--reward_scale')]
  assert (
    '--reward_scale=5.0'
    in {s.name: s for s in censor_rounds.plan(rest)}['round 2: draw'].words
  )


def by_turns(stage):
  """Votes for a scorer: every second picture is malign."""
  items = items_lib.open_pictures(flag(stage, 'likes'))
  votes = votes_lib.open_for(flag(stage, 'votes'), items, mode=items_lib.LIKES)
  sent = [
    {'item': item.key, 'question': 'likes', 'choice': choice}
    for item, choice in zip(items, ['malign', 'benign'] * ITEMS, strict=False)
  ]
  votes.add('sending0', 'reward', sent)
  votes.close()


def test_a_loop_that_was_stopped(
  words, tiny_pixel_folder, tmp_path, monkeypatch, capsys
):
  done = []

  def stop(stage):
    if stage.name == 'round 2: draw':
      raise stages.StageError(stage, 3)
    done.append(stage.name)
    (by_turns if stage.module.endswith('vote') else in_process)(stage)

  words += [
    f'--model={tiny_pixel_folder}',
    f'--eval_prompts={tmp_path / "eval.txt"}',
    '--iterations=1',
  ]
  longer = [*words, '--iterations=1,1']
  monkeypatch.setattr(stages, 'run', stop)
  assert censor_rounds.run(longer) == 3
  assert 'round 2: draw ended with exit code 3' in capsys.readouterr().err
  before = list(done)
  # One round is the beginning of two: nothing is made twice.
  assert censor_rounds.run(words) == 0
  assert done == before
  out = capsys.readouterr().out
  root = tmp_path / 'loop'
  found = json.loads((root / 'rounds.json').read_text())
  (one,) = found['rounds']
  lines = (root / 'round_1' / 'labels' / 'likes.jsonl').read_text().splitlines()
  liked = [json.loads(line)['liked'] for line in lines]
  assert liked.count(True) == one['labels']['benign'] == 2
  assert liked.count(False) == one['labels']['malign'] == 2
  assert one['labelled'] == ITEMS
  text = '2 malign and 2 benign labels, of 8 pictures; with its censor'
  assert f'round 1: {text}' in out and 'without a censor: ' in out
  for share in (found['base'], one['malign'], one['malign_among_labelled']):
    assert share['n'] == ITEMS
    assert share['low'] < share['value'] == 0.5 < share['high']
  with Image.open(root / 'samples.png') as sheet:
    assert sheet.width > sheet.height > 96
  assert censor_rounds.run([*words, '--per_class=1']) == 2
  assert 'give the same flags' in capsys.readouterr().err


def _vote(folder, choices, number):
  """A person's votes on some pictures, by their numbers."""
  items = items_lib.open_pictures(str(folder / 'pictures'))
  votes = votes_lib.open_for(
    folder / 'votes.jsonl', items, mode=items_lib.LIKES
  )
  given = [
    {'item': items[i].key, 'question': 'likes', 'choice': choice}
    for i, choice in choices.items()
  ]
  votes.add(f'sending{number}', 'ann', given)
  votes.close()


@pytest.mark.parametrize('enough', [True, False])
def test_a_person_is_waited_for(words, tmp_path, monkeypatch, capsys, enough):
  ran = []

  def run(stage):
    ran.append(stage.name)
    if stage.name.endswith('draw'):
      folder = tmp_path / 'loop' / 'round_1' / 'pictures'
      folder.mkdir(parents=True)
      for i in range(ITEMS):
        Image.new('L', (8, 8), 9 * i).save(folder / f'{i}.png')
    elif stage.name.endswith('export'):
      in_process(stage)
    else:
      raise stages.StageError(stage, 3)

  monkeypatch.setattr(stages, 'run', run)
  words = by_a_person(words)
  root = tmp_path / 'loop' / 'round_1'
  assert censor_rounds.run(words) == censor_rounds.WAITING
  error = capsys.readouterr().err.splitlines()[-1]
  assert 'there are 0 and 0, of 8 pictures 0 are labelled' in error
  command = (
    f'python -m dpo_jax.tools.judge --likes={root / "pictures"} '
    f'--votes={root / "votes.jsonl"} and give the same command again'
  )
  assert error.endswith(command)
  _vote(root, {0: 'malign', 1: 'malign', 2: 'malign', 3: 'benign'}, 1)
  assert censor_rounds.run(words) == censor_rounds.WAITING
  assert 'there are 3 and 1, of 8 pictures 4' in capsys.readouterr().err
  # Enough of both, or no picture left.
  more = {4: 'benign'} if enough else dict.fromkeys(range(4, ITEMS), 'malign')
  _vote(root, more, 2)
  assert censor_rounds.run(words) == 3
  assert ran == [f'round 1: {name}' for name in ('draw', 'export', 'train')]
  lines = (root / 'labels' / 'likes.jsonl').read_text().splitlines()
  liked = [json.loads(line)['liked'] for line in lines]
  assert (liked.count(False), liked.count(True)) == (2, 1 + enough)


@pytest.mark.parametrize(
  ('word', 'text'),
  [
    ('--labeller=beauty=x', 'names are pickscore'),
    ('--labeller=clip=x,aesthetic=y', 'one scorer votes'),
    ('--labeller=pickscore=x', 'give a threshold'),
    ('--eval_labeller=pickscore=x', 'give a threshold'),
    ('--eval_labeller=reward=x', 'give --eval_prompts too'),
    ('--prompts=missing.txt', 'missing.txt: no such file'),
    ('--config=configs/mnist.py', 'trains task denoise'),
    ('--config.train.num_steps=4', 'follows from the flags of this tool'),
    ('--config.optim.lr=fast', 'must be float'),
    ('--iterations=5,0', 'iterations'),
    ('--per_class=0', 'at least 1'),
    ('--reward_scale', 'write it as --reward_scale=VALUE'),
  ],
)
def test_bad_input_is_found_before_anything_runs(
  words, word, text, monkeypatch, capsys, tmp_path
):
  monkeypatch.setattr(stages, 'run', None)
  assert censor_rounds.run([*words, word]) == 2
  error = capsys.readouterr().err
  assert text in error and error.count('\n') == 1
  assert not (tmp_path / 'loop').exists()


def test_commands_can_be_read_first(words, capsys, tmp_path):
  assert censor_rounds.run([*words, '--dry_run']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines == [stage.text for stage in censor_rounds.plan(words)]
  assert not (tmp_path / 'loop').exists()
