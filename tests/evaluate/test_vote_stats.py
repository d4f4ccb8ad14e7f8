"""Majorities, win rates and agreement of votes."""

import numpy as np
import pytest

from dpo_jax.evaluate import stats, vote_stats
from dpo_jax.judging import votes as votes_lib


def test_krippendorffs_own_example():
  """Four observers, twelve units: alpha 0.743, in the paper's section C."""
  rows = [
    '1 2 3 3 2 1 4 1 2 . . .',
    '1 2 3 3 2 2 4 1 2 5 . 3',
    '. 3 3 3 2 3 4 2 2 5 1 .',
    '1 2 3 3 2 4 4 1 2 5 1 .',
  ]
  items = {}
  for judge, row in enumerate(rows):
    for unit, value in enumerate(row.split()):
      if value != '.':
        items.setdefault(str(unit), {})[str(judge)] = value
  assert vote_stats.krippendorff(items) == pytest.approx(0.743, abs=5e-4)


def test_agreement_at_its_ends():
  same = {'x': {'1': 'a', '2': 'a'}, 'y': {'1': 'b', '2': 'b'}}
  assert vote_stats.krippendorff(same) == 1.0
  opposite = {'x': {'1': 'a', '2': 'b'}, 'y': {'1': 'b', '2': 'a'}}
  # n = 4, n_a = n_b = 2: 1 - 3 * 4 / (16 - 8).
  assert vote_stats.krippendorff(opposite) == pytest.approx(-0.5)
  assert vote_stats.krippendorff({'x': {'1': 'a'}}) is None
  assert vote_stats.krippendorff({'x': {'1': 'a', '2': 'a'}}) is None
  rng = np.random.default_rng(0)
  chance = {
    str(i): {str(j): 'ab'[rng.integers(2)] for j in range(3)}
    for i in range(4000)
  }
  assert abs(vote_stats.krippendorff(chance)) < 0.03


def test_majorities():
  assert vote_stats.majority(['a', 'b', 'a'], even='tie') == 'a'
  assert vote_stats.majority(['a', 'b'], even='tie') == 'tie'
  assert vote_stats.majority(['a', 'b', 'tie', 'tie'], even='x') == 'tie'


def test_win_rate_of_majorities():
  votes = [
    votes_lib.Vote(item, question, choice, judge)
    for item, question, choice, judge in (
      ('x', 'q1', 'b', 'ann'),
      ('x', 'q1', 'b', 'bob'),
      ('x', 'q1', 'a', 'eve'),
      ('y', 'q1', 'a', 'ann'),
      ('z', 'q1', 'a', 'ann'),
      ('z', 'q1', 'b', 'bob'),
      ('x', 'q2', 'a', 'ann'),
    )
  ]
  items = vote_stats.by_item(votes, 'q1')
  found = vote_stats.win_rate(items)
  assert (found['wins'], found['losses'], found['ties']) == (1, 1, 1)
  assert found['value'] == 0.5 and found['n'] == 3
  assert vote_stats.win_rate(items, min_votes=2)['n'] == 2
  assert vote_stats.win_rate(items, min_votes=4) == {'value': None, 'n': 0}
  assert vote_stats.win_rate(vote_stats.by_item(votes, 'q2'))['losses'] == 1
  found = vote_stats.shares(items, ('a', 'b', 'tie'))
  assert found['a']['value'] == pytest.approx(1 / 3)
  assert found['a']['low'] == stats.share([1, 0, 0])['low']
