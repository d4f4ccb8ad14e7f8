"""Training of a latent diffusion model from captioned images."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dpo_jax import task as task_lib
from dpo_jax import types
from dpo_jax.tasks import inputs as inputs_lib


def min_snr_weight(
  alpha_t: jax.Array,
  sigma_t: jax.Array,
  *,
  gamma: float,
  prediction_type: str,
) -> jax.Array:
  """Weight [n] of the error at each timestep; gamma 5 in the paper.

  min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v, with
  SNR = alpha_t^2 / sigma_t^2: no timestep weighs more than gamma in terms of
  x_0 (Hang et al., 2023, arXiv 2303.09556, section 3.4).
  """
  snr = jnp.square(alpha_t / sigma_t)
  clipped = jnp.minimum(snr, gamma)
  # At zero terminal SNR the eps weight tends to 1.
  eps_weight = jnp.where(snr > gamma, gamma / jnp.maximum(snr, gamma), 1.0)
  return eps_weight if prediction_type == 'epsilon' else clipped / (snr + 1)


def make_task(
  *,
  inputs: inputs_lib.Inputs,
  params: Mapping[str, types.Params],
  min_snr_gamma: float = 0.0,
) -> task_lib.Task:
  """Trains UNet and text encoders together; the VAE is frozen.

  The mean squared error of eps (or v) at random timesteps, Ho et al., 2020,
  eq. 14, in the latent space of Rombach et al., 2022, eq. 3. With
  min_snr_gamma > 0 it is weighted by `min_snr_weight`; the logged err/policy
  is not.
  """
  schedule = inputs.model.schedule
  trained = ('unet', *inputs.model.text_encoders)

  def loss(params, frozen, batch, key):
    # One image an example: a pair axis of length 1.
    single = {name: batch[name][:, None] for name in ('images', 'sizes')}
    made = inputs.make({**frozen, **params}, {**batch, **single}, key)
    err = inputs.err(params['unet'], made)[:, 0]
    weight = 1.0
    if min_snr_gamma:
      weight = min_snr_weight(
        *schedule.alpha_sigma(made['t']),
        gamma=min_snr_gamma,
        prediction_type=schedule.prediction_type,
      )
    return weight * err, {'err/policy': err}

  return task_lib.Task(
    params={name: params[name] for name in trained},
    frozen={'vae': params['vae']},
    loss=loss,
    evaluators={'images': loss},
  )
