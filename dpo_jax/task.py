"""What a task is to the training loop."""

import dataclasses
from collections.abc import Callable

import jax

from dpo_jax import types

# (params, frozen, batch, key) -> (per-example loss [b], per-example metrics).
LossFn = Callable[
  [types.Params, types.PyTree, dict[str, jax.Array], types.Key],
  tuple[jax.Array, dict[str, jax.Array]],
]


@dataclasses.dataclass(frozen=True)
class Task:
  """What to train; the loop knows no more than this.

  Attributes:
    params: trainable leaves at step 0.
    frozen: everything else the loss reads; an argument of the step, never in
      a checkpoint, never changed.
    loss: per-example loss and metrics [b]; NaN in a metric means 'absent'.
      `key` is the run's key and the same at every step: draws are made from
      it with the example's id and epoch.
    evaluators: name -> loss-like function; the mean of its metrics over the
      held-out batches is logged as `eval/...`.
  """

  params: types.Params
  frozen: types.PyTree
  loss: LossFn
  evaluators: dict[str, LossFn] = dataclasses.field(default_factory=dict)
