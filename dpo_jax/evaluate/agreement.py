"""How often scorers agree with the labels, and with one another."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from dpo_jax.evaluate import stats

# Wallace et al. 2024, section 5.4: accuracy on Pick-a-Pic v2's validation
# pairs, per cent. implicit: of the model's own reward, SD1.5 and SDXL.
PUBLISHED = {
  'pickscore': '64.2',
  'hpsv2': '59.3 (HPS)',
  'clip': '57.1',
  'aesthetic': '51.4',
  'implicit': '60.8 / 72.0',
}


def choices(scores: Float[np.ndarray, 'n 2']) -> Float[np.ndarray, ' n']:
  """1 where picture 0 scores higher, 0 where lower, 0.5 for a tie."""
  return 0.5 * (1.0 + np.sign(scores[:, 0] - scores[:, 1]))


def with_labels(
  scores: Float[np.ndarray, 'n 2'], labels: Float[np.ndarray, ' n']
) -> dict[str, Any]:
  """Share of pairs on which a scorer and the label choose the same picture.

  labels: probability that picture 0 is preferred; 0.5 says nothing and is left
  out. A scorer's tie counts one half. Returns value, low, high, n (bootstrap
  over pairs) and ties; value None where no pair is left.
  """
  told = labels != 0.5
  chosen = choices(scores[told])
  if not told.any():
    return {'value': None, 'low': None, 'high': None, 'n': 0, 'ties': 0}
  agree = np.where(labels[told] > 0.5, chosen, 1.0 - chosen)
  found = stats.bootstrap(agree, num_resamples=2000)
  return found | {'ties': int((chosen == 0.5).sum())}


def between(
  columns: Mapping[str, Float[np.ndarray, 'n 2']],
) -> dict[str, dict[str, Any]]:
  """For each two scorers the share of pairs on which they choose the same."""
  found = {}
  for (a, first), (b, second) in itertools.combinations(columns.items(), 2):
    same = 1.0 - np.abs(choices(first) - choices(second))
    found[f'{a} {b}'] = stats.bootstrap(same, num_resamples=2000)
  return found


def consensus(
  columns: Mapping[str, Float[np.ndarray, 'n 2']],
  labels: Float[np.ndarray, ' n'],
) -> list[int]:
  """How many pairs at least k scorers agree on with the label, k = 0 .. all."""
  agree = count_agreeing(columns, labels)
  return [int((agree >= k).sum()) for k in range(len(columns) + 1)]


def count_agreeing(
  columns: Mapping[str, Float[np.ndarray, 'n 2']],
  labels: Float[np.ndarray, ' n'],
) -> np.ndarray:
  """How many scorers choose what the label says, int [n]; ties do not."""
  votes = [
    (choices(scores) == (labels > 0.5)) & (labels != 0.5)
    for scores in columns.values()
  ]
  return np.sum(votes, axis=0) if votes else np.zeros(len(labels), int)
