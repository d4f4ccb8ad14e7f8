"""The order of examples from one data set, or from several by weight."""

import math
from collections.abc import Sequence

import grain
import numpy as np

from dpo_jax.data import loader

# Grain counts in hundredths of the smallest weight.
MAX_RATIO = 1e6


def endless_order(
  counts: Sequence[int], weights: Sequence[float], *, seed: int
) -> grain.MapDataset:
  """Elements [data set, row, epoch of that data set], without end.

  Out of any stretch each data set has the share that its weight is of their
  sum, and of each every row comes once in its epoch. Raises ValueError for
  weights that are no positive numbers, or that differ by more than MAX_RATIO.
  """
  if not counts or min(counts) < 1:
    raise ValueError(f'data sets of {list(counts)} examples: none may be empty')
  if not all(math.isfinite(w) and w > 0 for w in weights):
    raise ValueError(
      f'weights {list(weights)}: must be finite numbers above 0; leave out a '
      'data set that is not wanted'
    )
  if max(weights) > MAX_RATIO * min(weights):
    raise ValueError(
      f'weights {list(weights)}: may differ by a factor of {MAX_RATIO:g}'
    )
  streams = [
    loader.endless_order(count, seed, stream=i).map(_numbered(i))
    for i, count in enumerate(counts)
  ]
  if len(streams) == 1:
    return streams[0]
  return grain.MapDataset.mix(streams, list(weights))


def _numbered(number: int):
  """A function that puts the data set's number before [row, epoch]."""
  return lambda place: np.array([number, *place])
