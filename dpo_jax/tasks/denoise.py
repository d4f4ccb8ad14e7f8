"""Training of a latent diffusion model from captioned images."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dpo_jax import keys as keys_lib
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax import task as task_lib
from dpo_jax import types
from dpo_jax.diffusion import predict
from dpo_jax.objectives import errors

DRAWS = ('eps', 't', 'posterior', 'dropout')


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
  model: sd_lib.StableDiffusion,
  params: dict[str, types.Params],
  empty_ids: Int[Array, ' s'],
  prompt_dropout: float,
  resolution: int,
  min_snr_gamma: float = 0.0,
) -> task_lib.Task:
  """Trains UNet and text encoder together; the VAE is frozen.

  The mean squared error of eps (or v) at uniform timesteps, Ho et al., 2020,
  eq. 14, in the latent space of Rombach et al., 2022, eq. 3. With
  min_snr_gamma > 0 it is weighted by `min_snr_weight`; the logged err/policy
  is not.
  """
  latent_shape = model.latent_shape(resolution)

  def loss(params, frozen, batch, key):
    draws = {
      name: keys_lib.per_example(named, batch['id'], batch['epoch'])
      for name, named in keys_lib.by_name(key, DRAWS).items()
    }
    noise = keys_lib.normal(draws['posterior'], latent_shape)
    images = sd_lib.to_float(batch['images'])
    x_0 = model.encode_images(frozen['vae'], images, noise)
    eps = keys_lib.normal(draws['eps'], latent_shape)
    t = keys_lib.randint(draws['t'], 0, model.schedule.num_steps)
    alpha_t, sigma_t = (
      value[:, None, None, None] for value in model.schedule.alpha_sigma(t)
    )
    target = predict.training_target(
      x_0,
      eps,
      alpha_t,
      sigma_t,
      prediction_type=model.schedule.prediction_type,
    )
    input_ids = sd_lib.drop_prompts(
      batch['input_ids'], empty_ids, draws['dropout'], rate=prompt_dropout
    )
    output = model.apply_unet(
      params['unet'],
      alpha_t * x_0 + sigma_t * eps,
      t,
      model.encode_text(params['text_encoder'], input_ids),
    )
    err = errors.mean_squared(output[:, None], target[:, None])[:, 0]
    weight = 1.0
    if min_snr_gamma:
      weight = min_snr_weight(
        *model.schedule.alpha_sigma(t),
        gamma=min_snr_gamma,
        prediction_type=model.schedule.prediction_type,
      )
    return weight * err, {'err/policy': err}

  return task_lib.Task(
    params={name: params[name] for name in ('unet', 'text_encoder')},
    frozen={'vae': params['vae']},
    loss=loss,
    evaluators={'images': loss},
  )
