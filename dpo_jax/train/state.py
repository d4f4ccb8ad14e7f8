"""The state of a run: everything that training changes."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dpo_jax import types


@struct.dataclass
class TrainState:
  """One pytree, checkpointed whole.

  Attributes:
    step: int32 scalar, optimizer steps done.
    params: trainable leaves.
    opt_state: the optimizer's.
    ema: running mean of params, or None when it is off.
  """

  step: jax.Array
  params: types.Params
  opt_state: optax.OptState
  ema: types.Params | None


def init_state(
  params: types.Params,
  optimizer: optax.GradientTransformation,
  *,
  use_ema: bool,
) -> TrainState:
  """State at step 0, in buffers of its own: it may be donated."""
  params = jax.tree.map(jnp.copy, params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    ema=jax.tree.map(jnp.copy, params) if use_ema else None,
  )


def final_params(state: TrainState) -> types.Params:
  """What is evaluated and exported: the EMA where there is one."""
  return state.params if state.ema is None else state.ema
