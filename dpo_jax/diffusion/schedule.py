"""Noise schedules as diffusers' `scheduler_config.json` describes them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dpo_jax import types
from dpo_jax.diffusion import flow as flow_lib
from dpo_jax.diffusion import options as options_lib

# diffusers' sigma-based classes put this in the place of a final zero, so
# that the first edm_sigma is 4096 and not infinite.
SMALLEST_ALPHAS_CUMPROD = 2.0**-24
SIGMA_SAMPLERS = ('euler', 'euler_ancestral', 'dpmpp_2m')


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


def rescale_zero_terminal_snr(
  betas: Float[np.ndarray, ' T'],
) -> Float[np.ndarray, ' T']:
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
    prediction_type: what the network outputs: epsilon, v_prediction or sample.
  """

  betas: Float[np.ndarray, ' T']
  alphas_cumprod: Float[np.ndarray, ' T']
  prediction_type: str = 'epsilon'

  @property
  def num_steps(self) -> int:
    """T, the number of training timesteps."""
    return len(self.betas)

  def alpha_sigma(self, t: types.Timesteps) -> tuple[jax.Array, jax.Array]:
    """alpha_t and sigma_t, float32, of the shape of t (integers)."""
    alphas_cumprod = jnp.asarray(self.alphas_cumprod)[t]
    return jnp.sqrt(alphas_cumprod), jnp.sqrt(1.0 - alphas_cumprod)

  def network_t(self, t: types.Timesteps) -> types.Timesteps:
    """What the network is told of t: t itself."""
    return t

  def add_noise(
    self, x_0: types.Latents, eps: types.Latents, t: types.Timesteps
  ) -> types.Latents:
    """x_t [n ...] = alpha_t x_0 + sigma_t eps; `t` [n] leads the shape."""
    return flow_lib.mix(self, x_0, eps, t)


def make_tables(
  options: options_lib.Options,
) -> tuple[Float[np.ndarray, ' T'], Float[np.ndarray, ' T']]:
  """(betas, alphas_cumprod), both [T] float64.

  With `rescale_betas_zero_snr` the last alphas_cumprod is 0, but 2^-24 for
  the samplers that divide by it.
  """
  if options.trained_betas is not None:
    betas = np.array(options.trained_betas, np.float64)
  else:
    betas = BETA_SCHEDULES[options.beta_schedule](
      options.num_train_timesteps, options.beta_start, options.beta_end
    )
  if options.rescale_betas_zero_snr:
    betas = rescale_zero_terminal_snr(betas)
  alphas_cumprod = np.cumprod(1.0 - betas)
  if options.rescale_betas_zero_snr and options.sampler in SIGMA_SAMPLERS:
    alphas_cumprod[-1] = SMALLEST_ALPHAS_CUMPROD
  return betas, alphas_cumprod


def from_config(
  scheduler_config: dict[str, Any], *, sampler: str | None = None
) -> Schedule | flow_lib.Flow:
  """Builds a schedule from the contents of `scheduler_config.json`.

  Without a sampler it is the training schedule; with one, the table that the
  sampler's diffusers class steps along. The two differ only in the last entry
  of a schedule with zero terminal SNR. For such a schedule whatever the file
  says, give {**scheduler_config, 'rescale_betas_zero_snr': True}. A flow's file
  gives a `flow.Flow`, which is the same for its one sampler.

  Raises:
    ValueError: names the option that is not supported.
  """
  if options_lib.is_flow(scheduler_config):
    return flow_lib.from_config(scheduler_config, sampler=sampler)
  options = options_lib.read(scheduler_config, sampler=sampler)
  betas, alphas_cumprod = make_tables(options)
  return Schedule(
    betas=betas.astype(np.float32),
    alphas_cumprod=alphas_cumprod.astype(np.float32),
    prediction_type=options.prediction_type,
  )
