"""A log window's metrics, summed on the device: no step waits for the host."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

# A run whose loss or gradient is not finite cannot go on.
FATAL = ('loss', 'norm/grads')


@flax.struct.dataclass
class Totals:
  """Sums over the steps since the last log line; float32 scalars.

  Attributes:
    sums, counts: of each metric, over the steps that had it (not NaN).
    bad_step: number of the first step with a value that was not finite, 0 if
      there is none.
    bad: which of FATAL were not finite in it.
  """

  sums: dict[str, jax.Array]
  counts: dict[str, jax.Array]
  bad_step: jax.Array
  bad: dict[str, jax.Array]


def empty(names: Collection[str]) -> Totals:
  """No steps; arrays of numpy."""
  zeros = {name: np.zeros((), np.float32) for name in names}
  return Totals(
    sums=zeros,
    counts=dict(zeros),
    bad_step=np.zeros((), np.int32),
    bad={name: np.zeros((), bool) for name in FATAL},
  )


def add_to(step_fn: Callable) -> Callable:
  """step(state, totals, frozen, batch, key) -> (state, totals).

  step_fn: of train.step.make_step. From a bad step on the totals stand still;
  the state, which may be NaN by then, is not to be kept.
  """

  def step(state, totals, frozen, batch, key):
    number = state.step + 1
    state, metrics = step_fn(state, frozen, batch, key)
    stopped = totals.bad_step != 0
    bad = {name: ~jnp.isfinite(metrics[name]) for name in FATAL}
    stops = ~stopped & (bad['loss'] | bad['norm/grads'])
    present = {
      name: ~stopped & ~jnp.isnan(value) for name, value in metrics.items()
    }
    totals = Totals(
      sums={
        name: totals.sums[name] + jnp.where(present[name], value, 0.0)
        for name, value in metrics.items()
      },
      counts={name: totals.counts[name] + present[name] for name in metrics},
      bad_step=jnp.where(stops, number, totals.bad_step),
      bad={
        name: jnp.where(stopped, totals.bad[name], value)
        for name, value in bad.items()
      },
    )
    return state, totals

  return step


def means(totals: Totals) -> dict[str, float]:
  """Mean of each metric that some step had, sorted by name."""
  return {
    name: float(total) / float(totals.counts[name])
    for name, total in sorted(totals.sums.items())
    if totals.counts[name]
  }


def to_record(totals: Totals) -> dict[str, dict[str, float]]:
  """Sums and counts as JSON types, exact."""
  return {
    name: {key: float(value) for key, value in getattr(totals, name).items()}
    for name in ('sums', 'counts')
  }


def from_record(record: Mapping[str, Any], *, names: Collection[str]) -> Totals:
  """What to_record gave of these metrics, as arrays of numpy."""
  return empty(names).replace(
    **{
      part: {name: np.float32(record[part].get(name, 0.0)) for name in names}
      for part in ('sums', 'counts')
    }
  )
