"""Samplers: pure functions over a DenoiseFn, one `lax.scan` each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import types
from dpo_jax.diffusion import predict
from dpo_jax.diffusion import schedule as schedule_lib

# t (scalar) -> standard normal noise [n h w c], the same for the same t.
NoiseFn = Callable[[jax.Array], types.Latents]
SAMPLERS = ('ddim', 'ddpm')


def ddpm_posterior(
  x_0: types.Latents,
  x_t: types.Latents,
  alphas_cumprod_t: jax.Array,
  alphas_cumprod_prev: jax.Array,
) -> tuple[types.Latents, jax.Array]:
  """Mean and variance of q(x_prev | x_t, x_0), Ho et al., 2020, eq. 6-7.

  The step from `prev` to `t` may jump over timesteps; its own noise level is
  alpha = alphas_cumprod_t / alphas_cumprod_prev. Scalars broadcast.
  """
  alpha = alphas_cumprod_t / alphas_cumprod_prev
  beta = 1.0 - alpha
  variance_t = 1.0 - alphas_cumprod_t
  variance_prev = 1.0 - alphas_cumprod_prev
  mean = (
    jnp.sqrt(alphas_cumprod_prev) * beta / variance_t * x_0
    + jnp.sqrt(alpha) * variance_prev / variance_t * x_t
  )
  return mean, variance_prev / variance_t * beta


def _step_table(
  schedule: schedule_lib.Schedule, num_steps: int
) -> dict[str, np.ndarray]:
  """Per sampler step: timestep, and alphas_cumprod now and after the step."""
  t = schedule.sampling_timesteps(num_steps)
  previous = t - schedule.num_steps // num_steps
  after = np.where(
    previous >= 0,
    schedule.alphas_cumprod[np.maximum(previous, 0)],
    schedule.final_alpha_cumprod,
  )
  return {
    't': t,
    'now': schedule.alphas_cumprod[t],
    'after': after.astype(np.float32),
  }


def _predict_both(denoise_fn, x_t, row, schedule):
  """eps_hat and x_0_hat in float32, with the schedule's clipping."""
  t = jnp.full((x_t.shape[0],), row['t'])
  alpha_t, sigma_t = jnp.sqrt(row['now']), jnp.sqrt(1.0 - row['now'])
  output = denoise_fn(x_t, t).astype(jnp.float32)
  kind = {'prediction_type': schedule.prediction_type}
  x_0 = predict.to_x_0(output, x_t, alpha_t, sigma_t, **kind)
  eps = predict.to_eps(output, x_t, alpha_t, sigma_t, **kind)
  if schedule.clip_sample_range is not None:
    limit = schedule.clip_sample_range
    x_0 = jnp.clip(x_0, -limit, limit)
  return eps, x_0


def ddim(
  denoise_fn: types.DenoiseFn,
  x_t: types.Latents,
  *,
  schedule: schedule_lib.Schedule,
  num_steps: int,
  eta: float = 0.0,
  noise_fn: NoiseFn | None = None,
) -> types.Latents:
  """DDIM from noise x_t [n h w c] to x_0 [n h w c].

  Song et al., 2021, eq. 12 and 16: eta 0 is deterministic, eta 1 has the
  DDPM posterior's variance and then needs `noise_fn`.
  """
  if eta and noise_fn is None:
    raise ValueError('ddim with eta > 0 draws noise: pass noise_fn')
  rows = _step_table(schedule, num_steps)

  def step(x_t, row):
    eps, x_0 = _predict_both(denoise_fn, x_t, row, schedule)
    now, after = row['now'], row['after']
    variance = eta**2 * (1.0 - after) / (1.0 - now) * (1.0 - now / after)
    x = jnp.sqrt(after) * x_0 + jnp.sqrt(1.0 - after - variance) * eps
    if eta:
      x += jnp.sqrt(variance) * noise_fn(row['t'])
    return x, None

  x_0, _ = jax.lax.scan(step, x_t.astype(jnp.float32), rows)
  return x_0


def ddpm(
  denoise_fn: types.DenoiseFn,
  x_t: types.Latents,
  *,
  schedule: schedule_lib.Schedule,
  num_steps: int,
  noise_fn: NoiseFn,
) -> types.Latents:
  """Ancestral sampling with the posterior's (small) variance.

  Ho et al., 2020, algorithm 2. x_t [n h w c] noise; returns x_0 [n h w c].
  """
  rows = _step_table(schedule, num_steps)

  def step(x_t, row):
    _, x_0 = _predict_both(denoise_fn, x_t, row, schedule)
    mean, variance = ddpm_posterior(x_0, x_t, row['now'], row['after'])
    # The last step returns the mean, as the algorithm asks.
    noise = jnp.where(row['last'], 0.0, noise_fn(row['t']))
    return mean + jnp.sqrt(variance) * noise, None

  rows['last'] = np.arange(num_steps) == num_steps - 1
  x_0, _ = jax.lax.scan(step, x_t.astype(jnp.float32), rows)
  return x_0
