"""The state of a run: everything that training changes."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dpo_jax import trees, types


@struct.dataclass
class TrainState:
  """One pytree, checkpointed whole.

  Attributes:
    step: int32 scalar, optimizer steps done.
    params: trainable leaves, in the dtype they are stored in.
    opt_state: the optimizer's.
    ema: running mean of params, float32, or None when it is off.
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
  exact = trees.cast_floats(params, jnp.float32)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=jax.tree.map(jnp.copy, params),
    # Its second moment would never move in bfloat16.
    opt_state=optimizer.init(exact),
    ema=jax.tree.map(jnp.copy, exact) if use_ema else None,
  )


def final_params(state: TrainState) -> types.Params:
  """What is evaluated and exported: the EMA where there is one."""
  return state.params if state.ema is None else state.ema
