"""Conversions between what a network predicts: eps, v, flow and x_0.

With x_t = alpha_t x_0 + sigma_t eps and alpha_t^2 + sigma_t^2 = 1,
v = alpha_t eps - sigma_t x_0 (Salimans and Ho, 2022, appendix D). With
alpha_t + sigma_t = 1 the flow's velocity is u = d x_t / d sigma_t = eps - x_0
(Liu et al., 2023, arXiv 2209.03003, with time the other way round); the two
belong to different schedules, `schedule.Schedule` and `flow.Flow`. alpha_t and
sigma_t broadcast against x_t.
"""

import jax

from dpo_jax import types


def to_eps(
  output: types.Latents,
  x_t: types.Latents,
  alpha_t: jax.Array,
  sigma_t: jax.Array,
  *,
  prediction_type: str,
) -> types.Latents:
  """eps_hat from a network output; for x_0, sigma_t must not be zero."""
  if prediction_type == 'epsilon':
    return output
  if prediction_type == 'v_prediction':
    return alpha_t * output + sigma_t * x_t
  if prediction_type == 'flow_prediction':
    return x_t + alpha_t * output
  if prediction_type == 'sample':
    return (x_t - alpha_t * output) / sigma_t
  raise _unknown(
    prediction_type, 'epsilon, v_prediction, flow_prediction, sample'
  )


def from_eps(
  eps: types.Latents,
  x_t: types.Latents,
  alpha_t: jax.Array,
  sigma_t: jax.Array,
  *,
  prediction_type: str,
) -> types.Latents:
  """The network output that means eps; undoes `to_eps`.

  alpha_t must not be zero, but for eps itself.
  """
  if prediction_type == 'epsilon':
    return eps
  if prediction_type == 'v_prediction':
    return (eps - sigma_t * x_t) / alpha_t
  if prediction_type == 'flow_prediction':
    return (eps - x_t) / alpha_t
  if prediction_type == 'sample':
    return (x_t - sigma_t * eps) / alpha_t
  raise _unknown(
    prediction_type, 'epsilon, v_prediction, flow_prediction, sample'
  )


def to_x_0(
  output: types.Latents,
  x_t: types.Latents,
  alpha_t: jax.Array,
  sigma_t: jax.Array,
  *,
  prediction_type: str,
) -> types.Latents:
  """x_0_hat from a network output; for eps, alpha_t must not be zero."""
  if prediction_type == 'epsilon':
    return (x_t - sigma_t * output) / alpha_t
  if prediction_type == 'v_prediction':
    return alpha_t * x_t - sigma_t * output
  if prediction_type == 'flow_prediction':
    return x_t - sigma_t * output
  if prediction_type == 'sample':
    return output
  raise _unknown(
    prediction_type, 'epsilon, v_prediction, flow_prediction, sample'
  )


def training_target(
  x_0: types.Latents,
  eps: types.Latents,
  alpha_t: jax.Array,
  sigma_t: jax.Array,
  *,
  prediction_type: str,
) -> types.Latents:
  """What the network is regressed on: eps, v or the flow's u.

  Networks that predict x_0 (`sample`) can be sampled but not trained: the
  timestep weights of the objectives are those of eps, v and u.
  """
  if prediction_type == 'epsilon':
    return eps
  if prediction_type == 'v_prediction':
    return alpha_t * eps - sigma_t * x_0
  if prediction_type == 'flow_prediction':
    return eps - x_0
  raise _unknown(prediction_type, 'epsilon, v_prediction, flow_prediction')


def _unknown(prediction_type: str, allowed: str) -> ValueError:
  return ValueError(
    f'prediction_type={prediction_type!r} is not supported here; allowed: '
    f'{allowed}'
  )
