"""Steps of the Euler and the ancestral Euler method in edm_sigma.

The state is x_0 + edm_sigma * eps, x_t divided by alpha_t (Karras et al.,
2022, arXiv 2206.00364, eq. 1 with their sigma); d state / d edm_sigma = eps.
"""

import numpy as np
from jaxtyping import Float

from dpo_jax.diffusion import options as options_lib
from dpo_jax.diffusion import plan as plan_lib
from dpo_jax.diffusion import schedule as schedule_lib
from dpo_jax.diffusion import spacing


def euler_rows(options: options_lib.Options, num_steps: int) -> plan_lib.Rows:
  """Euler: Karras et al., 2022, algorithm 2 without churn."""
  t, levels = _make_levels(options, num_steps)
  weights = {'state': np.ones(num_steps), 'eps': np.diff(levels)}
  return _make_rows(options, t, levels, weights)


def ancestral_rows(
  options: options_lib.Options, num_steps: int
) -> plan_lib.Rows:
  """Euler down to `down`, then noise of deviation `up`.

  up^2 + down^2 = after^2 with the posterior's variance
  up^2 = after^2 (now^2 - after^2) / now^2: DDPM's in edm_sigma (k-diffusion,
  sample_euler_ancestral with eta 1).
  """
  t, levels = _make_levels(options, num_steps)
  now, after = levels[:-1], levels[1:]
  up = after * np.sqrt(now**2 - after**2) / now
  down = after**2 / now
  weights = {'state': np.ones(num_steps), 'eps': down - now, 'noise': up}
  return _make_rows(options, t, levels, weights)


def _make_levels(
  options: options_lib.Options, num_steps: int
) -> tuple[np.ndarray, Float[np.ndarray, ' s+1']]:
  """Timesteps [s], maybe fractional, and edm_sigmas [s + 1]."""
  table = spacing.make_edm_sigmas(schedule_lib.make_tables(options)[1])
  t = spacing.even_timesteps(options, num_steps)
  levels = np.interp(t, np.arange(len(table)), table)
  if options.interpolation_type == 'log_linear':
    # As in diffusers one level more than steps: the last step ends at the
    # lowest one, and final_sigmas_type is not reached.
    levels = np.geomspace(table[-1], table[0], num_steps + 1)
  if options.use_karras_sigmas:
    levels = spacing.karras_sigmas(
      options, num_steps, low=levels[-1], high=levels[0]
    )
    t = spacing.find_timesteps(levels, table)
  spacing.check_levels(t, levels, options)
  last = spacing.last_edm_sigma(options, table)
  return t.astype(np.float32), np.append(levels, last)[: num_steps + 1]


def _make_rows(
  options: options_lib.Options,
  t: np.ndarray,
  levels: Float[np.ndarray, ' s+1'],
  weights: dict[str, Float[np.ndarray, ' s']],
) -> plan_lib.Rows:
  alpha, sigma = plan_lib.vp_levels(levels[:-1])
  # diffusers starts `leading` at the deviation of data of variance 1 plus
  # noise, and the spacings that reach the noisiest step at the noise alone.
  init_scale = levels.max()
  if options.timestep_spacing == 'leading':
    init_scale = np.sqrt(init_scale**2 + 1.0)
  return plan_lib.Rows(
    t=t,
    alpha=alpha,
    sigma=sigma,
    scale=alpha,
    weights=weights,
    index=np.arange(len(t), dtype=np.int32),
    init_scale=float(init_scale),
  )
