"""Accuracy of the policy's own, implicit reward on labelled pairs."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dpo_jax.evaluate import stats


def accuracy(
  margins: Callable[[dict[str, np.ndarray]], np.ndarray],
  batches: Callable[..., Any],
  *,
  draws: int,
) -> dict[str, Any]:
  """Share of pairs whose mean margin over `draws` is positive, half for 0.

  Wallace et al., CVPR 2024, section 5.4, use the implicit reward of eq. 14 as
  a classifier of preferences; noise and timestep are averaged over.

  margins: batch -> margin [b]. batches: epoch -> (batch, valid rows), the
  epoch giving new draws. Returns stats.bootstrap's value, low, high and n.
  """
  totals = 0.0
  for epoch in range(draws):
    totals = totals + np.concatenate(
      [np.asarray(margins(batch))[:valid] for batch, valid in batches(epoch)]
    )
  return stats.bootstrap(0.5 * (np.sign(totals) + 1.0))
