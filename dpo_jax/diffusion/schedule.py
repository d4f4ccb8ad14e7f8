"""Noise schedules as diffusers' `scheduler_config.json` describes them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import types

PREDICTION_TYPES = ('epsilon', 'v_prediction')
TIMESTEP_SPACINGS = ('leading', 'trailing', 'linspace')


def _linear(num_steps: int, start: float, end: float) -> np.ndarray:
  return np.linspace(start, end, num_steps, dtype=np.float64)


def _scaled_linear(num_steps: int, start: float, end: float) -> np.ndarray:
  return np.linspace(start**0.5, end**0.5, num_steps, dtype=np.float64) ** 2


def _squaredcos_cap_v2(num_steps: int, start: float, end: float) -> np.ndarray:
  del start, end  # The cosine schedule is fixed by its cap alone.
  ends = np.arange(num_steps + 1, dtype=np.float64) / num_steps
  alphas_bar = np.cos((ends + 0.008) / 1.008 * math.pi / 2) ** 2
  return np.minimum(1.0 - alphas_bar[1:] / alphas_bar[:-1], 0.999)


BETA_SCHEDULES = {
  'linear': _linear,
  'scaled_linear': _scaled_linear,
  'squaredcos_cap_v2': _squaredcos_cap_v2,
}


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
  """Betas [T] shifted and scaled so that the last step is pure noise.

  sqrt(alphas_cumprod) is moved to end at 0 and stretched to keep its first
  value (Lin et al., 2023, arXiv 2305.08891, algorithm 1).
  """
  root = np.sqrt(np.cumprod(1.0 - betas))
  first, last = root[0], root[-1]
  root = (root - last) * first / (first - last)
  alphas_cumprod = root**2
  previous = np.concatenate([[1.0], alphas_cumprod[:-1]])
  return 1.0 - alphas_cumprod / previous


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """Variance-preserving diffusion over T integer timesteps.

  x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 = alphas_cumprod[t] and
  sigma_t^2 = 1 - alphas_cumprod[t] (Ho et al., 2020, eq. 4).

  Attributes:
    betas: [T] float32.
    alphas_cumprod: [T] float32, decreasing.
    prediction_type: what the network outputs, one of PREDICTION_TYPES.
    timestep_spacing: how samplers thin out the T steps.
    steps_offset: added to the timesteps of `leading` spacing.
    final_alpha_cumprod: value used as the step before timestep 0.
    clip_sample_range: x_0_hat is clipped to +- this in samplers, or None.
  """

  betas: np.ndarray
  alphas_cumprod: np.ndarray
  prediction_type: str = 'epsilon'
  timestep_spacing: str = 'leading'
  steps_offset: int = 0
  final_alpha_cumprod: float = 1.0
  clip_sample_range: float | None = None

  @property
  def num_steps(self) -> int:
    """T, the number of training timesteps."""
    return len(self.betas)

  def alpha_sigma(self, t: types.Timesteps) -> tuple[jax.Array, jax.Array]:
    """alpha_t and sigma_t, float32, of t's shape."""
    alphas_cumprod = jnp.asarray(self.alphas_cumprod)[t]
    return jnp.sqrt(alphas_cumprod), jnp.sqrt(1.0 - alphas_cumprod)

  def add_noise(
    self, x_0: types.Latents, eps: types.Latents, t: types.Timesteps
  ) -> types.Latents:
    """x_t [n ...] = alpha_t x_0 + sigma_t eps; `t` [n] leads the shape."""
    alpha_t, sigma_t = self.alpha_sigma(t)
    expand = (...,) + (None,) * (x_0.ndim - t.ndim)
    return alpha_t[expand] * x_0 + sigma_t[expand] * eps

  def sampling_timesteps(self, num_inference_steps: int) -> np.ndarray:
    """Descending int32 timesteps [num_inference_steps] for a sampler.

    The spacings are those of Lin et al., 2023, table 2. Raises ValueError
    for a number of steps outside [1, T].
    """
    n, total = num_inference_steps, self.num_steps
    if not 1 <= n <= total:
      raise ValueError(f'sampling steps must be in [1, {total}], got {n}')
    if self.timestep_spacing == 'leading':
      steps = np.arange(n)[::-1] * (total // n) + self.steps_offset
    elif self.timestep_spacing == 'trailing':
      steps = np.round(np.arange(total, 0, -total / n)) - 1
    else:
      steps = np.round(np.linspace(0, total - 1, n))[::-1]
    return np.clip(steps, 0, total - 1).astype(np.int32)


def _choice(config: dict, key: str, default: Any, allowed) -> Any:
  value = config.get(key, default)
  if value not in allowed:
    raise ValueError(
      f'scheduler_config.json: {key}={value!r} is not supported; allowed: '
      + ', '.join(map(repr, allowed))
    )
  return value


def from_config(config: dict[str, Any]) -> Schedule:
  """Builds a Schedule from the contents of `scheduler_config.json`.

  Raises ValueError naming the option that is not supported.
  """
  if config.get('trained_betas') is not None:
    raise ValueError(
      'scheduler_config.json: trained_betas is not supported; give '
      'beta_schedule, beta_start and beta_end'
    )
  if config.get('thresholding'):
    raise ValueError(
      'scheduler_config.json: thresholding=true is not supported; it is meant '
      'for pixel-space models'
    )
  name = _choice(config, 'beta_schedule', 'linear', tuple(BETA_SCHEDULES))
  betas = BETA_SCHEDULES[name](
    config.get('num_train_timesteps', 1000),
    config.get('beta_start', 0.0001),
    config.get('beta_end', 0.02),
  )
  if config.get('rescale_betas_zero_snr', False):
    betas = rescale_zero_terminal_snr(betas)
  alphas_cumprod = np.cumprod(1.0 - betas)
  clip = config.get('clip_sample', True)
  to_one = config.get('set_alpha_to_one', True)
  return Schedule(
    betas=betas.astype(np.float32),
    alphas_cumprod=np.maximum(alphas_cumprod, 0.0).astype(np.float32),
    prediction_type=_choice(
      config, 'prediction_type', 'epsilon', PREDICTION_TYPES
    ),
    timestep_spacing=_choice(
      config, 'timestep_spacing', 'leading', TIMESTEP_SPACINGS
    ),
    steps_offset=config.get('steps_offset', 0),
    final_alpha_cumprod=1.0 if to_one else float(alphas_cumprod[0]),
    clip_sample_range=config.get('clip_sample_range', 1.0) if clip else None,
  )
