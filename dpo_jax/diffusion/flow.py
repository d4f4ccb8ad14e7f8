"""Rectified flow: its schedule and its Euler method, as diffusers has them."""

import dataclasses
import difflib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dpo_jax import types
from dpo_jax.diffusion import options as options_lib
from dpo_jax.diffusion import plan as plan_lib
from dpo_jax.diffusion import spacing

# The one method for flows here; its diffusers class is options.FLOW_CLASS.
SAMPLER = 'euler'
# Options of the class that are followed for one value only, and that value.
FIXED = {
  'use_dynamic_shifting': False,
  'invert_sigmas': False,
  'shift_terminal': None,
  'use_karras_sigmas': False,
  'use_exponential_sigmas': False,
  'use_beta_sigmas': False,
  'stochastic_sampling': False,
}
# These tune the dynamic shifting, which is off.
HARMLESS = (
  'base_shift',
  'max_shift',
  'base_image_seq_len',
  'max_image_seq_len',
  'time_shift_type',
)


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
  """Straight lines from data to noise over T integer timesteps.

  x_t = (1 - s) x_0 + s eps with s = sigmas[t] (Liu et al., 2023, arXiv
  2209.03003, eq. 1 with time the other way round). It has what
  `schedule.Schedule` has, with alpha_t + sigma_t = 1.

  Attributes:
    sigmas: [T] float32, rising to 1.
    shift: of the file; `sigmas` have it already.
    prediction_type: flow_prediction, eps - x_0.
  """

  sigmas: Float[np.ndarray, ' T']
  shift: float
  prediction_type: str = 'flow_prediction'

  @property
  def num_steps(self) -> int:
    """T, the number of training timesteps."""
    return len(self.sigmas)

  def alpha_sigma(self, t: types.Timesteps) -> tuple[jax.Array, jax.Array]:
    """1 - s and s, float32, of the shape of t (integers)."""
    sigma_t = jnp.asarray(self.sigmas)[t]
    return 1.0 - sigma_t, sigma_t

  def network_t(self, t: types.Timesteps) -> types.Timesteps:
    """What the network is told of t: T s, in (0, T], float32."""
    return self.num_steps * jnp.asarray(self.sigmas)[t]

  def add_noise(
    self, x_0: types.Latents, eps: types.Latents, t: types.Timesteps
  ) -> types.Latents:
    """x_t [n ...] = (1 - s) x_0 + s eps; `t` [n] leads the shape."""
    return mix(self, x_0, eps, t)


def mix(
  schedule: Any, x_0: types.Latents, eps: types.Latents, t: types.Timesteps
) -> types.Latents:
  """x_t = alpha_t x_0 + sigma_t eps of any schedule; `t` leads the shape."""
  alpha_t, sigma_t = schedule.alpha_sigma(t)
  expand = (...,) + (None,) * (x_0.ndim - t.ndim)
  return alpha_t[expand] * x_0 + sigma_t[expand] * eps


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
  """s' = shift s / (1 + (shift - 1) s); above 1 it moves to the noise.

  Esser et al., 2024, arXiv 2403.03206, eq. 23.
  """
  return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def flow(num_steps: int, *, shift: float) -> Flow:
  """The flow of T = num_steps timesteps: s = (t + 1) / T, then `shifted`."""
  even = np.arange(1, num_steps + 1, dtype=np.float64) / num_steps
  return Flow(shifted(even, shift).astype(np.float32), float(shift))


def from_config(
  scheduler_config: dict[str, Any], *, sampler: str | None = None
) -> Flow:
  """Reads the file of a FlowMatchEulerDiscreteScheduler.

  Raises ValueError for an option that is unknown or not followed, and for a
  sampler other than the Euler method.
  """
  if sampler not in (None, SAMPLER):
    raise ValueError(
      f'sampler={sampler!r} cannot follow a rectified flow '
      f'(scheduler_config.json: _class_name={options_lib.FLOW_CLASS}); '
      f'allowed: {SAMPLER}'
    )
  own = {'num_train_timesteps': 1000, 'shift': 1.0}
  known = [*own, *FIXED, *HARMLESS]
  for key, value in scheduler_config.items():
    if key not in known and not key.startswith('_'):
      near = difflib.get_close_matches(key, known, n=1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise ValueError(
        f'scheduler_config.json: unknown option {key!r} (value {value!r}) of '
        f'{options_lib.FLOW_CLASS}{hint}'
      )
    if key in FIXED and value != FIXED[key]:
      raise _refuse(key, value, repr(FIXED[key]))
  given = own | {k: scheduler_config[k] for k in own if k in scheduler_config}
  total, shift = given.values()
  if type(total) is not int or total < 1:
    raise _refuse('num_train_timesteps', total, 'an integer, 1 or more')
  if type(shift) not in (int, float) or not 0 < shift < math.inf:
    raise _refuse('shift', shift, 'a number above 0')
  return flow(total, shift=shift)


def _refuse(key: str, value: Any, allowed: str) -> ValueError:
  return ValueError(
    f'scheduler_config.json: {key}={value!r} is not supported with '
    f'{options_lib.FLOW_CLASS}; allowed: {allowed}'
  )


def euler_rows(schedule: Flow, num_steps: int) -> plan_lib.Rows:
  """Euler's method for d x / d s = u: x_0 and eps mixed at the next s.

  The levels are diffusers': even between the ends of the training sigmas,
  and then shifted once more.
  """
  spacing.check_steps(num_steps, schedule.num_steps)
  ends = float(schedule.sigmas[-1]), float(schedule.sigmas[0])
  levels = shifted(np.linspace(*ends, num_steps), schedule.shift)
  after = np.append(levels[1:], 0.0)
  return plan_lib.Rows(
    t=(schedule.num_steps * levels).astype(np.float32),
    alpha=1.0 - levels,
    sigma=levels,
    scale=np.ones(num_steps),
    weights={'x_0': 1.0 - after, 'eps': after},
    index=np.arange(num_steps, dtype=np.int32),
  )
