"""Training of the VAE."""

import jax
import jax.numpy as jnp

from dpo_jax import keys as keys_lib
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax import task as task_lib
from dpo_jax import types


def _edges(images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Differences to the next row and the next column."""
  return images[:, 1:] - images[:, :-1], images[:, :, 1:] - images[:, :, :-1]


def make_task(
  *,
  model: sd_lib.StableDiffusion,
  params: dict[str, types.Params],
  kl_weight: float,
  resolution: int,
) -> task_lib.Task:
  """Reconstruction plus a light KL term, as Rombach et al., 2022, app. G.

  loss = mean |x - x_hat| + mean (x - x_hat)^2 + mean |edges - edges_hat|
         + kl_weight * KL(q(z | x) || N(0, 1)) summed over a latent.
  The edge term keeps outlines sharp without an adversary.

  Raises ValueError for a model in pixels.
  """
  if not params['vae']:
    raise ValueError(
      'task=autoencode: this model works on pixels and has no VAE to train; '
      'train it with task=denoise'
    )
  latent_shape = model.latent_shape(resolution)

  def loss(params, frozen, batch, key):
    del frozen
    draws = keys_lib.per_example(
      keys_lib.by_name(key, ['posterior'])['posterior'],
      batch['id'],
      batch['epoch'],
    )
    images = sd_lib.to_float(batch['images'])
    output, mean, logvar = model.vae.apply(
      {'params': params['vae']},
      images,
      keys_lib.normal(draws, latent_shape),
    )
    axes = (1, 2, 3)
    difference = output.astype(jnp.float32) - images
    absolute = jnp.mean(jnp.abs(difference), axes)
    square = jnp.mean(jnp.square(difference), axes)
    edges = sum(jnp.mean(jnp.abs(edge), axes) for edge in _edges(difference))
    kl = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axes)
    metrics = {
      'vae/absolute': absolute,
      'vae/square': square,
      'vae/edges': edges,
      'vae/kl': kl,
      # Its root is the reciprocal of the scaling factor.
      'vae/latent_square': jnp.mean(jnp.square(mean) + jnp.exp(logvar), axes),
    }
    return absolute + square + edges + kl_weight * kl, metrics

  return task_lib.Task(
    params={'vae': params['vae']},
    frozen={},
    loss=loss,
    evaluators={'images': loss},
  )
