import numpy as np
import pytest
import scipy.stats

from dpo_jax.evaluate import stats


def test_ties_count_half():
  np.testing.assert_array_equal(
    stats.wins([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]), [0.5, 0.0, 1.0]
  )
  result = stats.win_rate([1.0, 2, 3, 4, 5], [1.0, 1, 1, 1, 9])
  assert result['value'] == (0.5 + 3) / 5
  assert result['n'] == 5
  assert (result['wins'], result['losses'], result['ties']) == (3, 1, 1)
  # Three of four untied prompts: 2 * (C(4,3) + C(4,4)) / 16.
  assert result['p_value'] == pytest.approx(0.625)


def test_pairing_matters_not_magnitude():
  base = np.arange(50.0)
  assert stats.win_rate(base + 1e-9, base)['value'] == 1.0
  assert stats.win_rate(base, base)['value'] == 0.5
  assert stats.win_rate([np.inf, 0.0], [0.0, -np.inf])['value'] == 1.0


@pytest.mark.parametrize(
  'wins, losses, expected',
  [
    (5, 5, 1.0),
    (0, 0, 1.0),
    (10, 0, 2 / 2**10),
    (0, 10, 2 / 2**10),
    # 2 * (1 + 10 + 45) / 1024
    (8, 2, 112 / 1024),
    (1, 0, 1.0),
  ],
)
def test_sign_test_by_hand(wins, losses, expected):
  assert stats.sign_test(wins, losses) == pytest.approx(expected, rel=1e-12)


def test_wilson_by_hand():
  """Wilson 1927 for 7 of 10 at z = 1.959964, worked out in float64."""
  z, n, p = 1.959963984540054, 10, 0.7
  middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
  half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
  result = stats.share([1] * 7 + [0] * 3)
  assert result['value'] == 0.7 and result['n'] == 10
  assert result['low'] == pytest.approx(middle - half, rel=1e-9)
  assert result['high'] == pytest.approx(middle + half, rel=1e-9)
  everything = stats.share(np.ones(20, bool))
  assert everything['high'] == 1.0 and 0.8 < everything['low'] < 0.9


def test_area_by_hand():
  """DeLong et al., 1988, for 3 good and 2 bad scores, worked out by hand.

  Placements: of the good 1, 1/2, 1/4 (a tie is one half), of the bad 5/6, 1/3.
  """
  found = stats.area([4.0, 2.0, 1.0], [1.0, 3.0])
  assert found['value'] == pytest.approx((1 + 0.5 + 0.25) / 3)
  assert (found['n'], found['m']) == (3, 2)
  good = np.var([1, 0.5, 0.25], ddof=1) / 3
  bad = np.var([2.5 / 3, 1 / 3], ddof=1) / 2
  room = 1.959963984540054 * np.sqrt(good + bad)
  assert found['low'] == pytest.approx(max(0, found['value'] - room))
  assert found['high'] == pytest.approx(min(1, found['value'] + room))
  # Nothing overlaps: as much as the smaller class can say.
  apart = stats.area([2.0] * 30, [1.0] * 20)
  assert apart['value'] == apart['high'] == 1 and 0.8 < apart['low'] < 0.9
  one = stats.area([2.0], [1.0, 3.0])
  assert (one['low'], one['high']) == (0.0, 1.0)
  with pytest.raises(ValueError, match='bad'):
    stats.area([1.0], [])


@pytest.mark.parametrize('n', [100, 300])
@pytest.mark.parametrize('probabilities', [(0.6, 0.3, 0.1), (0.8, 0.15, 0.05)])
def test_intervals_cover_simulated_votes(n, probabilities):
  """1,500 studies: a 95% interval holds the truth in 93-97% of them."""
  truth = probabilities[0] + 0.5 * probabilities[2]
  rng = np.random.default_rng(1)
  studies = rng.choice([1.0, 0.0, 0.5], p=probabilities, size=(1500, n))
  covered, covered_share = [], []
  for seed, outcomes in enumerate(studies):
    result = stats.bootstrap(outcomes, num_resamples=1000, seed=seed)
    covered.append(result['low'] <= truth <= result['high'])
    result = stats.share(outcomes == 1)
    covered_share.append(result['low'] <= probabilities[0] <= result['high'])
  assert 0.93 <= np.mean(covered) <= 0.97
  assert 0.93 <= np.mean(covered_share) <= 0.97


def test_bca_agrees_with_scipy_on_skewed_values():
  values = np.random.default_rng(0).lognormal(size=60)
  ours = stats.bootstrap(values, num_resamples=40_000)
  theirs = scipy.stats.bootstrap(
    (values,), np.mean, method='BCa', n_resamples=40_000, rng=1
  ).confidence_interval
  # Monte Carlo error of a 2.5% quantile of 40,000 resamples.
  assert ours['low'] == pytest.approx(theirs.low, rel=0.01)
  assert ours['high'] == pytest.approx(theirs.high, rel=0.01)
  middle = 0.5 * (ours['low'] + ours['high'])
  assert middle > ours['value']  # follows the skew


def test_the_seed_fixes_the_interval():
  votes = np.random.default_rng(0).normal(size=80)
  first = stats.bootstrap(votes, seed=3)
  assert first == stats.bootstrap(votes, seed=3)
  assert first != stats.bootstrap(votes, seed=4)


@pytest.mark.parametrize('value', [0.0, 0.5, 1.0])
def test_unanimous_votes_are_not_certainty(value):
  result = stats.bootstrap([value] * 20)
  assert result['value'] == value
  assert 0.1 < result['high'] - result['low'] < 0.4
  assert 0.0 <= result['low'] <= value <= result['high'] <= 1.0


def test_mirrored_votes_mirror_the_interval():
  votes = np.array([1.0] * 40 + [0.0] * 15 + [0.5] * 5)
  result, mirrored = stats.bootstrap(votes), stats.bootstrap(1 - votes)
  assert mirrored['low'] == pytest.approx(1 - result['high'], abs=0.01)
  assert mirrored['high'] == pytest.approx(1 - result['low'], abs=0.01)


@pytest.mark.parametrize(
  'call, named',
  [
    (lambda: stats.wins([1.0, 2.0], [1.0]), 'aligned has 2 scores, base 1'),
    (lambda: stats.wins([], []), r'shape \(0,\)'),
    (lambda: stats.wins([[1.0]], [[1.0]]), r'shape \(1, 1\)'),
    (lambda: stats.wins([1.0, np.nan], [0.0, 0.0]), r'aligned: NaN at \[1\]'),
    (lambda: stats.win_rate([0.0], [np.nan]), r'base: NaN at \[0\]'),
    (lambda: stats.wins(['a'], ['b']), 'dtype'),
    (lambda: stats.bootstrap([1.0, np.nan]), 'NaN'),
    (lambda: stats.bootstrap([1.0, np.inf]), 'infinite'),
    (lambda: stats.bootstrap([2.0, 2.0]), 'spread'),
    (lambda: stats.bootstrap([0.0, 1.0], confidence=95), 'confidence: got 95'),
    (lambda: stats.bootstrap([0.0, 1.0], num_resamples=5), 'num_resamples'),
    (lambda: stats.share([0.5]), '0 and 1'),
    (lambda: stats.share([1, 0], confidence=0.0), 'confidence'),
    (lambda: stats.sign_test(-1, 2), '-1 wins'),
  ],
)
def test_bad_input_is_refused(call, named):
  with pytest.raises(ValueError, match=named):
    call()
