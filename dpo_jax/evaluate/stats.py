"""Paired win rates and shares, with their uncertainty.

The unit of resampling is the prompt: both models answer the same prompts
with the same seeds, so a comparison is one number per prompt.
"""

from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float
from numpy.typing import ArrayLike


def wins(
  aligned: ArrayLike, base: ArrayLike
) -> Float[np.ndarray, ' n_prompts']:
  """Outcome of each prompt: 1 aligned scores higher, 0 lower, 0.5 a tie.

  aligned, base: scores [n] of the same prompts and seeds, larger is better.
  Raises ValueError for unequal or empty vectors and for NaN (an infinite
  score is a score).
  """
  aligned, base = _vector('aligned', aligned), _vector('base', base)
  if aligned.shape != base.shape:
    raise ValueError(
      f'aligned has {aligned.size} scores, base {base.size}; both need one '
      'for each prompt, in the same order'
    )
  return 0.5 * (1.0 + (aligned > base) - (aligned < base))


def win_rate(
  aligned: ArrayLike,
  base: ArrayLike,
  *,
  confidence: float = 0.95,
  num_resamples: int = 10_000,
  seed: int = 0,
) -> dict[str, Any]:
  """Paired win rate of aligned over base; a tie counts one half.

  Returns value (mean of `wins`), low and high (`bootstrap` over prompts), n
  prompts, the counts wins, losses and ties, and p_value (`sign_test`, which
  leaves ties out). Raises ValueError as `wins` and `bootstrap` do.
  """
  outcomes = wins(aligned, base)
  interval = bootstrap(
    outcomes, confidence=confidence, num_resamples=num_resamples, seed=seed
  )
  won, lost = int((outcomes == 1).sum()), int((outcomes == 0).sum())
  return {
    **interval,
    'wins': won,
    'losses': lost,
    'ties': interval['n'] - won - lost,
    'p_value': sign_test(won, lost),
  }


def bootstrap(
  values: ArrayLike,
  *,
  confidence: float = 0.95,
  num_resamples: int = 10_000,
  seed: int = 0,
) -> dict[str, Any]:
  """Mean of values [n] with its BCa bootstrap interval over entries.

  Bias-corrected and accelerated percentiles (Efron 1987, 'Better bootstrap
  confidence intervals', eq. 2.3 and 6.6) of `num_resamples` resampled means
  from NumPy's PCG64 at `seed`: the same input gives the same interval.

  When all values agree every resample is the same, and a bootstrap would
  claim certainty. For values in [0, 1] (votes, shares) the half-width is
  then that of Wilson's interval for n out of n, so 20 wins of 20 read as
  [0.84, 1]. Raises ValueError for other constant values, NaN, infinities
  and an impossible confidence.

  Returns value, low, high, n.
  """
  values = _vector('values', values)
  if not np.isfinite(values).all():
    raise ValueError('values: infinite; a mean needs finite numbers')
  _check_confidence(confidence)
  if num_resamples < 100:
    raise ValueError(
      f'num_resamples: got {num_resamples}; percentiles need at least 100'
    )
  n, mean = values.size, float(values.mean())
  if values.min() == values.max():
    low, high = _constant_interval(float(values[0]), n, confidence)
    return {'value': mean, 'low': low, 'high': high, 'n': n}

  rng = np.random.default_rng(seed)
  # Resampled counts of the distinct values equal resampled entries in law,
  # and votes have three of them however many prompts there are.
  levels, counts = np.unique(values, return_counts=True)
  chunk = max(1, 2_000_000 // levels.size)  # bounds the memory of draws
  means = np.concatenate(
    [
      rng.multinomial(n, counts / n, size=min(chunk, num_resamples - start))
      @ levels
      / n
      for start in range(0, num_resamples, chunk)
    ]
  )
  # Half of the resamples that equal the mean count as below: means of votes
  # are lattice numbers, where a strict count would read as bias.
  close = np.isclose(means, mean, rtol=1e-12, atol=1e-12)
  below = ((means < mean) & ~close).mean() + 0.5 * close.mean()
  edge = 0.5 / num_resamples
  bias = scipy.stats.norm.ppf(np.clip(below, edge, 1 - edge))
  # For a mean the jackknife's leave-one-out values are linear in the data.
  deviations = values - mean
  acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
  tail = (1 - confidence) / 2
  z = bias + scipy.stats.norm.ppf([tail, 1 - tail])
  levels_adjusted = scipy.stats.norm.cdf(bias + z / (1 - acceleration * z))
  low, high = np.quantile(means, levels_adjusted)
  return {'value': mean, 'low': float(low), 'high': float(high), 'n': n}


def sign_test(wins: int, losses: int) -> float:
  """Exact two-sided p-value that wins and losses are equally likely.

  The sign test leaves ties out (Dixon and Mood 1946); with no untied prompt
  there is no evidence at all and the p-value is 1.
  """
  if wins < 0 or losses < 0:
    raise ValueError(f'got {wins} wins and {losses} losses; give counts')
  if wins + losses == 0:
    return 1.0
  return float(scipy.stats.binomtest(wins, wins + losses, 0.5).pvalue)


def share(votes: ArrayLike, *, confidence: float = 0.95) -> dict[str, Any]:
  """Share of true votes [n] with its Wilson score interval (Wilson 1927).

  votes: booleans, or numbers that are exactly 0 or 1.
  Returns value, low, high, n. Raises ValueError for other numbers and NaN.
  """
  votes = _vector('votes', votes)
  if not np.isin(votes, (0.0, 1.0)).all():
    raise ValueError('votes: must be booleans, or numbers 0 and 1')
  _check_confidence(confidence)
  low, high = _wilson(int(votes.sum()), votes.size, confidence)
  return {
    'value': float(votes.mean()),
    'low': low,
    'high': high,
    'n': votes.size,
  }


def area(
  good: ArrayLike, bad: ArrayLike, *, confidence: float = 0.95
) -> dict[str, Any]:
  """P(score of a good one > score of a bad one), a tie counting one half.

  The area under the ROC curve with DeLong's interval (DeLong et al., 1988,
  eq. 3 and 5: normal, from the variances of the placements of either class),
  cut off at 0 and 1. Where all placements agree (perfect separation) it is as
  that of `bootstrap` for the smaller class.

  good, bad: scores [n], [m]. Returns value, low, high, n, m. Raises ValueError
  for empty vectors and NaN.
  """
  good, bad = _vector('good', good), _vector('bad', bad)
  _check_confidence(confidence)
  above = good[:, None] > bad[None]
  placed = above + 0.5 * (good[:, None] == bad[None])
  n, m, value = good.size, bad.size, float(placed.mean())
  found = {'value': value, 'n': n, 'm': m}
  if placed.min() == placed.max():
    low, high = _constant_interval(value, min(n, m), confidence)
    return found | {'low': low, 'high': high}
  variance = sum(
    part.var(ddof=1) / part.size if part.size > 1 else np.nan
    for part in (placed.mean(1), placed.mean(0))
  )
  # Of one score there is no variance: it says as little as it can.
  room = scipy.stats.norm.ppf(0.5 + confidence / 2) * np.sqrt(variance)
  room = 1.0 if np.isnan(room) else float(room)
  return found | {'low': max(0.0, value - room), 'high': min(1.0, value + room)}


def _wilson(successes, n, confidence):
  interval = scipy.stats.binomtest(successes, n).proportion_ci(
    confidence_level=confidence, method='wilson'
  )
  return float(interval.low), float(interval.high)


def _constant_interval(value, n, confidence):
  if not 0 <= value <= 1:
    raise ValueError(
      f'values: all {n} are {value}; there is no spread to resample'
    )
  # The most that n equal outcomes can say: another one has not been seen.
  room = 1 - _wilson(n, n, confidence)[0]
  return max(0.0, value - room), min(1.0, value + room)


def _vector(name, values):
  array = np.asarray(values)
  if array.dtype.kind not in 'biuf':
    raise ValueError(f'{name}: got dtype {array.dtype}; give numbers')
  if array.ndim != 1 or not array.size:
    raise ValueError(
      f'{name}: got shape {array.shape}; give one number for each prompt'
    )
  array = array.astype(np.float64)
  if np.isnan(array).any():
    where = np.flatnonzero(np.isnan(array))[:5].tolist()
    raise ValueError(f'{name}: NaN at {where}; a judge must score each prompt')
  return array


def _check_confidence(confidence):
  if not 0 < confidence < 1:
    raise ValueError(
      f'confidence: got {confidence}; give a number between 0 and 1'
    )
