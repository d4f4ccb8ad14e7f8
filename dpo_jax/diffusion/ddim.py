"""Steps of DDIM and of DDPM's ancestral sampling."""

import numpy as np
from jaxtyping import Float

from dpo_jax.diffusion import options as options_lib
from dpo_jax.diffusion import plan as plan_lib
from dpo_jax.diffusion import schedule as schedule_lib
from dpo_jax.diffusion import spacing


def posterior_weights(now, after):
  """Weights of x_0 and x_t in the mean of q(x_prev | x_t, x_0); its variance.

  Ho et al., 2020, eq. 6-7, for a step that may jump over timesteps: its own
  noise level is now / after. now, after: alphas_cumprod before and after it;
  arrays of NumPy or JAX.
  """
  alpha = now / after
  beta = 1.0 - alpha
  on_x_0 = after**0.5 * beta / (1.0 - now)
  on_x_t = alpha**0.5 * (1.0 - after) / (1.0 - now)
  return on_x_0, on_x_t, (1.0 - after) / (1.0 - now) * beta


def ddim_rows(
  options: options_lib.Options, num_steps: int, *, eta: float
) -> plan_lib.Rows:
  """DDIM: Song et al., 2021, eq. 12 and 16; eta 1 has DDPM's variance.

  A step ends num_train_timesteps // num_steps timesteps lower, which for
  linspace and trailing spacing is not always where the next one begins.
  """
  t, alphas_cumprod = _integer_steps(options, num_steps)
  previous = t - options.num_train_timesteps // num_steps
  final = 1.0 if options.set_alpha_to_one else alphas_cumprod[0]
  after = np.where(
    previous >= 0, alphas_cumprod[np.maximum(previous, 0)], final
  )
  now = alphas_cumprod[t]
  variance = eta**2 * (1.0 - after) / (1.0 - now) * (1.0 - now / after)
  # eta 1 leaves 0 after a step from zero terminal SNR; not -1e-17.
  direction = np.sqrt(np.maximum(1.0 - after - variance, 0.0))
  weights = {'x_0': np.sqrt(after), 'eps': direction}
  if eta:
    weights['noise'] = np.sqrt(variance)
  return _make_rows(t, now, weights)


def ddpm_rows(options: options_lib.Options, num_steps: int) -> plan_lib.Rows:
  """Ancestral sampling: Ho et al., 2020, algorithm 2.

  `variance_type` fixed_small is the posterior's variance, fixed_large the
  step's beta, which is then also drawn at a last timestep above 0.
  """
  t, alphas_cumprod = _integer_steps(options, num_steps)
  now = alphas_cumprod[t]
  after = np.append(now[1:], 1.0)
  on_x_0, on_x_t, variance = posterior_weights(now, after)
  if options.variance_type == 'fixed_large':
    variance = np.where(t > 0, 1.0 - now / after, 0.0)
  weights = {'x_0': on_x_0, 'state': on_x_t, 'noise': np.sqrt(variance)}
  return _make_rows(t, now, weights)


def _integer_steps(
  options: options_lib.Options, num_steps: int
) -> tuple[np.ndarray, Float[np.ndarray, ' T']]:
  t = np.round(spacing.even_timesteps(options, num_steps))
  spacing.check_levels(t, t, options)
  _, alphas_cumprod = schedule_lib.make_tables(options)
  return t.astype(np.int32), alphas_cumprod


def _make_rows(
  t: np.ndarray,
  now: Float[np.ndarray, ' s'],
  weights: dict[str, Float[np.ndarray, ' s']],
) -> plan_lib.Rows:
  return plan_lib.Rows(
    t=t,
    alpha=np.sqrt(now),
    sigma=np.sqrt(1.0 - now),
    scale=np.ones(len(t)),
    weights=weights,
    index=np.arange(len(t), dtype=np.int32),
  )
