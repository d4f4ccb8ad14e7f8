"""Steps of DPM-Solver++ (2M), a multistep solver of second order."""

import numpy as np
from jaxtyping import Bool, Float

from dpo_jax.diffusion import options as options_lib
from dpo_jax.diffusion import plan as plan_lib
from dpo_jax.diffusion import schedule as schedule_lib
from dpo_jax.diffusion import spacing

# diffusers' lower_order_final holds for fewer steps than this.
FEW_STEPS = 15


def dpmpp_2m_rows(
  options: options_lib.Options, num_steps: int
) -> plan_lib.Rows:
  """Lu et al., 2022, arXiv 2211.01095, algorithm 2.

  With h the growth of lambda = log(alpha / sigma) in a step, h_0 that in the
  step before, and ' for the values after the step:

    next = sigma' / sigma x_t + alpha' (1 - e^-h) x_0_hat + w D
    D    = (x_0_hat - last x_0_hat) h / h_0
    w    = alpha' (1 - e^-h) / 2              solver_type midpoint
    w    = alpha' (1 - (1 - e^-h) / h)        solver_type heun

  The first step has w = 0, and so has the last where the options ask for it.
  """
  t, levels = _make_levels(options, num_steps)
  alpha, sigma = plan_lib.vp_levels(levels)
  # e^-h is the ratio of edm_sigmas, as lambda = -log edm_sigma.
  gain = 1.0 - levels[1:] / levels[:-1]
  curve = np.zeros(num_steps)
  rows = np.flatnonzero(_is_second_order(options, levels))
  h = -np.log(levels[rows + 1] / levels[rows])
  h_0 = -np.log(levels[rows] / levels[rows - 1])
  half = gain[rows] / 2.0
  if options.solver_type == 'heun':
    half = 1.0 - gain[rows] / h
  curve[rows] = alpha[rows + 1] * half * h / h_0
  return plan_lib.Rows(
    t=t,
    alpha=alpha[:-1],
    sigma=sigma[:-1],
    scale=np.ones(num_steps),
    weights={
      'state': sigma[1:] / sigma[:-1],
      'x_0': alpha[1:] * gain + curve,
      'last_x_0': -curve,
    },
    index=np.arange(num_steps, dtype=np.int32),
  )


def _is_second_order(
  options: options_lib.Options, levels: Float[np.ndarray, ' s+1']
) -> Bool[np.ndarray, ' s']:
  # Karras sigmas may end where final_sigmas_type sigma_min does: a last step
  # of no length, with nothing to extrapolate.
  second = levels[1:] < levels[:-1]
  second[0] = False
  few = options.lower_order_final and len(second) < FEW_STEPS
  if few or options.euler_at_final or options.final_sigmas_type == 'zero':
    second[-1] = False
  return second


def _make_levels(
  options: options_lib.Options, num_steps: int
) -> tuple[np.ndarray, Float[np.ndarray, ' s+1']]:
  """Integer timesteps [s] and edm_sigmas [s + 1]."""
  table = spacing.make_edm_sigmas(schedule_lib.make_tables(options)[1])
  t = spacing.inner_timesteps(options, num_steps)
  if options.use_karras_sigmas:
    levels = spacing.karras_sigmas(
      options, num_steps, low=table[0], high=table[-1]
    )
    t = spacing.find_timesteps(levels, table)
    # diffusers rounds, but cuts off for the cosine schedule.
    cosine = options.beta_schedule == 'squaredcos_cap_v2'
    t = np.floor(t) if cosine else np.round(t)
  else:
    levels = np.interp(t, np.arange(len(table)), table)
  spacing.check_levels(t, levels, options)
  last = spacing.last_edm_sigma(options, table)
  return t.astype(np.int32), np.append(levels, last)
