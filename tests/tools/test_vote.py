"""python -m dpo_jax.tools.vote: a scorer's votes on single pictures."""

import json

import jax
import numpy as np
import pytest
import reward_folder
from PIL import Image

from dpo_jax import scoring, sharding
from dpo_jax.tools import arguments, judge, vote

COUNT = 13


@pytest.fixture(scope='module')
def reward(tmp_path_factory):
  folder = tmp_path_factory.mktemp('reward')
  return reward_folder.write(folder, 'clean', 3, (8, 8), 'pixels')


@pytest.fixture
def given(reward, tmp_path):
  """(pictures [n 8 8 3], flags)."""
  pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
  (tmp_path / 'pictures').mkdir()
  for i, picture in enumerate(pixels):
    Image.fromarray(picture).save(tmp_path / 'pictures' / f'{i:02d}.png')
  # Pages of tools.generate's, which are no pictures to vote on.
  for name in ('contact_sheet.png', 'contact_sheet-02.png'):
    Image.fromarray(pixels[0]).save(tmp_path / 'pictures' / name)
  return pixels, [
    f'--likes={tmp_path / "pictures"}',
    f'--votes={tmp_path / "votes.jsonl"}',
    f'--scorer=reward={reward}',
  ]


def _run(*words):
  return arguments.run(vote.main, words)


def _choices(path):
  lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
  votes = [one for line in lines for one in line['votes']]
  return {one['item']: one['choice'] for one in votes}, len(votes)


def test_votes_are_those_of_the_scores(given, reward, tmp_path, capsys):
  pixels, words = given
  scorer = scoring.open_scorer(
    'reward',
    str(reward),
    mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    batch_size=COUNT,
  )
  # Two networks: even odds are two times log 0.5.
  assert vote.even_odds(scorer) == 2 * np.log(0.5)
  scores = scorer.score(list(pixels), [''] * COUNT)
  middle = np.sort(scores)[4:6].mean()
  words = [*words, f'--threshold={middle}']
  assert _run(*words, '--batch=8') == 0, capsys.readouterr().err
  path = tmp_path / 'votes.jsonl'
  # A killed run's file: one line, a bit of another.
  whole = path.read_bytes()
  path.write_bytes(whole[: whole.rfind(b'{"id"') + 9])
  assert _run(*words, '--batch=8') == 0
  wanted = {
    f'{i:02d}.png': 'benign' if score > middle else 'malign'
    for i, score in enumerate(scores)
  }
  assert _choices(path) == (wanted, COUNT)
  # Nothing twice, and no other threshold in the same file.
  before = path.read_bytes()
  assert _run(*words) == 0 and path.read_bytes() == before
  assert f'{COUNT} votes of 1 judges' in capsys.readouterr().out
  assert _run(*words, '--threshold=-1') == 2
  error = capsys.readouterr().err
  assert 'has voted, by other weights or another threshold' in error
  assert path.read_bytes() == before
  # Few of each class are exported.
  export = [*words[:2], f'--export={tmp_path / "labels"}', '--per_class=3']
  assert arguments.run(judge.main, export) == 0
  lines = (tmp_path / 'labels' / 'likes.jsonl').read_text().splitlines()
  liked = [json.loads(line)['liked'] for line in lines]
  assert liked.count(True) == liked.count(False) == 3
  assert len(list((tmp_path / 'labels' / 'pictures').iterdir())) == 6
  assert f'more_of_its_class {COUNT - 6}' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('word', 'text'),
  [
    ('--scorer=pickscore=x', 'nothing says which score of pickscore is benign'),
    ('--scorer=reward=missing', 'missing'),
    ('--likes=missing', 'no pictures there'),
    ('--threshold=high', 'give a number'),
  ],
)
def test_errors_are_one_line(given, word, text, capsys):
  assert _run(*given[1], word) == 2
  error = capsys.readouterr().err
  assert text in error and error.count('\n') == 1
