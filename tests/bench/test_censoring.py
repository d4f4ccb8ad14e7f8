"""The censoring benchmark's pure parts: labels, distance, table, resuming."""

import pathlib

import numpy as np
import pytest

from benchmarks import censoring, censoring_parts, censoring_sampling
from benchmarks import censoring_table as table


def test_labels_are_shared_where_malign_and_own_where_benign():
  benign = np.tile([1, 1, 1, 1, 1, 1, 1, 0], 25)
  drawn = censoring_parts.draw_labels(benign, seed=3)
  assert len(np.unique(drawn.rows)) == len(drawn.rows) == 60
  np.testing.assert_array_equal(benign[drawn.rows], drawn.benign)
  bad = drawn.benign == 0
  assert bad.sum() == 10 and (drawn.members[bad] == 1).all()
  np.testing.assert_array_equal(drawn.members[~bad].sum(0), [10] * 5)
  assert (drawn.members[~bad].sum(1) == 1).all()
  again = censoring_parts.draw_labels(benign, seed=3)
  np.testing.assert_array_equal(again.rows, drawn.rows)
  other = censoring_parts.draw_labels(benign, seed=4)
  assert set(other.rows) != set(drawn.rows)
  with pytest.raises(ValueError, match='10 malign pictures are needed'):
    censoring_parts.draw_labels(np.ones(80), seed=0)


def test_frechet_of_gaussians_by_hand():
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(2000, 3))
  rows = (rows - rows.mean(0)) @ np.linalg.inv(
    np.linalg.cholesky(np.cov(rows, rowvar=False))
  ).T
  assert censoring_parts.frechet(rows, rows) == pytest.approx(0, abs=1e-9)
  # Means 2 apart in one direction, deviations 1 and 3 in each of three:
  # 4 + 3 (1 - 3)^2.
  moved = 3 * rows + np.array([2.0, 0.0, 0.0])
  assert censoring_parts.frechet(rows, moved) == pytest.approx(16)


def test_quality_of_labels_by_hand():
  found = censoring_parts.quality_of_labels(
    np.array([0, 0, 1, 1, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 1, 1, 1, 1])
  )
  assert found == {
    'accuracy': 0.625,
    'balanced_accuracy': 0.625,
    'precision': pytest.approx(2 / 3),
    'recall': 0.5,
    'n': 8,
  }


def _record(arm, draw, malign, seconds):
  return {
    'method': arm,
    'seed': draw,
    'config': '',
    'n': 200,
    'malign': malign,
    'sevens': 0.99,
    'sampling_seconds': seconds,
    'calls': 1.25 if arm == 'rejection' else 1.0,
  }


def test_the_table():
  records = [_record('none', i, 0.1 + 0.02 * i, 10.0) for i in range(3)]
  records += [_record('rejection', i, 0.0, 12.5) for i in range(2)]
  rng = np.random.default_rng(0)
  real = rng.normal(size=(300, 4))
  features = {
    'none': rng.normal(size=(600, 4)) + 1,
    'rejection': rng.normal(size=(400, 4)),
  }
  arms = ['none', 'rejection', 'union']
  rows = table.summarise(records, features, real, arms)
  assert [row.arm for row in rows] == arms[:2]
  none, kept = rows
  assert none.n == 600 and none.malign.value == pytest.approx(0.12)
  # p = 0.12, n = 600, z = 1.96: (p + z^2/2n) / (1 + z^2/n) = 0.122417, and
  # z sqrt(p (1-p)/n + z^2/4n^2) / (1 + z^2/n) = 0.026032 either way.
  assert none.malign.low == pytest.approx(0.096385, abs=1e-5)
  assert none.malign.high == pytest.approx(0.148449, abs=1e-5)
  # Wilson's bound of nothing seen: z^2 / (n + z^2).
  assert kept.malign.high == pytest.approx(3.8415 / 403.8415, abs=1e-5)
  assert kept.seconds == pytest.approx(1.25)
  assert kept.distance.value < 0.2 < 3 < none.distance.value
  assert none.distance.low < none.distance.value < none.distance.high
  lines = table.markdown(rows).splitlines()
  assert len({line.count('|') for line in lines}) == 1
  assert '| none | 3 | 600 | 12.0 [9.6, 14.8] | 10.0, 12.0, 14.0 |' in lines[2]
  with pytest.raises(ValueError, match='no finished arm'):
    table.summarise([], {}, real, arms)


def test_arms_and_their_cost():
  assert censoring.find_arm('union@0.3').scale == 0.3
  assert censoring.ARMS['none'].settings is None
  assert censoring.ARMS['forward'].settings.place == 'x_0_hat'
  calls = {name: arm.calls() for name, arm in censoring.ARMS.items()}
  assert calls['none'] == calls['union'] == 1 and calls['forward'] == 3
  # Four rounds at six of ten steps.
  assert calls['ensemble_r4'] == pytest.approx(2.8)
  assert calls['rejection'] == 1.25
  assert censoring_sampling.candidates(200, censoring.ARMS['rejection']) == 250
  for name in ('onion', 'kto@0.3'):
    with pytest.raises(ValueError, match='arm '):
      censoring.find_arm(name)


def test_logits_are_set_right_by_what_a_network_learnt_from():
  # Nine benign to one malign; a network had 10 + 10 at a weight of 0.2, the
  # union five times as many benign ones.
  found = censoring.ARMS['ensemble'].offsets(0.1)
  assert found == pytest.approx([np.log(9 / 0.2)] * 5)
  assert censoring.ARMS['single'].offsets(0.1) == found[:1]
  assert censoring.ARMS['union'].offsets(0.1) == pytest.approx([np.log(9)])
  assert censoring.ARMS['ensemble_raw'].offsets(0.1) == ()


def test_other_settings_are_another_record():
  common = ['--workdir=w', '--mnist=m', '--hand=h', '--judge=j', '--model=g']
  flags = censoring.parse(common)
  assert flags.workdir == pathlib.Path('w') and len(flags.draws) == 5
  few = censoring.parse([*common, '--count=10'])
  union, none = censoring.ARMS['union'], censoring.ARMS['none']
  digests = {
    censoring.digest(flags, union),
    censoring.digest(flags, none),
    censoring.digest(few, union),
  }
  assert len(digests) == 3
  assert censoring.digest(censoring.parse(common), none) in digests
