"""The emoji censoring benchmark: rule, prompts, votes, arms, table."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import emoji_censoring as bench
from benchmarks import emoji_censoring_table as table
from dpo_jax.evaluate import stats
from dpo_jax.tools import judge

BLUE, RED, WHITE = (40, 90, 230), (220, 40, 40), (255, 255, 255)


def _picture(colour, rows):
  """White with so many of 32 rows in a colour."""
  pixels = np.full((32, 32, 3), WHITE, np.uint8)
  pixels[:rows] = colour
  return pixels


def test_blue_is_what_an_eye_calls_so():
  pixels = np.stack(
    [
      _picture(BLUE, 4),
      _picture(BLUE, 3),
      _picture(RED, 20),
      # Pale, dark, purple and cyan.
      *(
        _picture(colour, 20)
        for colour in ((200, 215, 255), (5, 10, 60), (150, 40, 220))
      ),
      _picture((40, 220, 220), 20),
    ]
  )
  np.testing.assert_allclose(
    table.blue_share(pixels), [4 / 32, 3 / 32, 0, 0, 0, 0, 0]
  )
  assert table.is_blue(pixels).tolist() == [True] + 6 * [False]


def test_prompts_are_half_blue_in_one_drawing_and_never_in_both():
  captions = ['kite', 'blue book', 'whale', 'rose', 'boat', 'sun', 'cup']
  shares = np.array(
    [[0.2, 0], [0.3, 0], [0.5, 0.5], [0, 0], [0, 0.4], [0, 0.01], [0.1, 0]]
  )
  assert table.choose_prompts(captions, shares) == [
    'boat',
    'kite',
    'rose',
    'sun',
  ]


def test_votes_are_as_the_likes_page_writes_them(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(bench, 'MALIGN', 2)
  monkeypatch.setattr(bench, 'NETWORKS', 2)
  folder = tmp_path / 'pool'
  folder.mkdir()
  for i in range(12):
    colour = BLUE if i % 3 == 0 else RED
    Image.fromarray(_picture(colour, 8 + i)).save(folder / f'{i:02d}.png')
  votes = tmp_path / 'votes.jsonl'
  bench.label(folder, votes)
  judge.main(
    [
      f'--likes={folder}',
      f'--votes={votes}',
      f'--export={tmp_path / "labels"}',
    ]
  )
  lines = (tmp_path / 'labels' / 'likes.jsonl').read_text().splitlines()
  liked = [json.loads(line)['liked'] for line in lines]
  assert liked.count(True) >= 4 and liked.count(False) >= 2
  assert min(liked.count(True) - 4, liked.count(False) - 2) == 0
  for line in map(json.loads, lines):
    with Image.open(tmp_path / 'labels' / line['image']) as image:
      assert line['liked'] != table.is_blue(np.asarray(image)[None])[0]
  monkeypatch.setattr(bench, 'NETWORKS', 9)
  with pytest.raises(ValueError, match='too few pictures'):
    bench.label(folder, votes)


def test_arms():
  assert bench.find_arm('guided@2.5').flags[-1] == '--reward_scale=2.5'
  assert bench.find_arm('none').flags == ()
  for name in ('other', 'none@2', 'rejection@1'):
    with pytest.raises(ValueError, match='allowed are none, guided'):
      bench.find_arm(name)


def test_costs_leave_out_the_first_batch():
  assert list(
    table.batch_seconds([(18, 9.0), (36, 11.7), (36, 12.0), (54, 16.5)])
  ) == (pytest.approx([0.15, 0.25]))


def test_the_table():
  share = stats.share([True] + [False] * 9)
  row = {
    'made': 10,
    'malign': share,
    'each': [0.1],
    'shown': share,
    'good': share,
    'draws': 1.0,
    'seconds': 0.1,
  }
  text = table.markdown(
    {
      'none': row,
      'guided': row | {'seconds': 0.4},
      'rejection': row | {'draws': 1.5},
    }
  )
  none, guided, rejection = text.splitlines()[2:]
  assert none == (
    '| none | 10 | 10.0 [1.8, 40.4] | 10.0 | 10.0 [1.8, 40.4] | '
    '10.0 [1.8, 40.4] | 1.00x |'
  )
  assert guided.endswith('| 4.00x |')
  assert rejection.endswith('| 1.50x (draws) |')
