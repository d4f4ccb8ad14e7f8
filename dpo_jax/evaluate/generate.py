"""Pictures from prompts, with one noise key a picture."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8, UInt32

from dpo_jax import keys as keys_lib
from dpo_jax import sharding, types
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.diffusion import samplers


def make_sample_fn(
  model: sd_lib.StableDiffusion,
  *,
  resolution: int,
  sampler: str,
  num_steps: int,
  guidance_scale: float,
) -> Callable[..., UInt8[Array, 'n H W 3']]:
  """Jitted (params, input_ids [n s], empty_ids [s], keys [n]) -> uint8 images.

  params: {'unet', 'vae', 'text_encoder'}. The start noise of image i follows
  from keys[i] alone; equal keys with two models give comparable pictures.
  """
  shape = model.latent_shape(resolution)
  sample = {
    'ddim': functools.partial(samplers.ddim, eta=0.0),
    'ddpm': samplers.ddpm,
  }[sampler]

  @jax.jit
  def sample_fn(params, input_ids, empty_ids, noise_keys):
    encode = functools.partial(model.encode_text, params['text_encoder'])
    uncond = encode(empty_ids[None])
    denoise_fn = model.make_denoise_fn(
      params['unet'],
      encode(input_ids),
      jnp.broadcast_to(uncond, (len(input_ids), *uncond.shape[1:])),
      guidance_scale=guidance_scale,
    )

    def noise_fn(t):
      fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
      return keys_lib.normal(fold(noise_keys, t + 1), shape)

    x_0 = sample(
      denoise_fn,
      keys_lib.normal(noise_keys, shape),
      schedule=model.schedule,
      num_steps=num_steps,
      noise_fn=noise_fn,
    )
    return sd_lib.to_uint8(model.decode_latents(params['vae'], x_0))

  return sample_fn


def generate(
  sample_fn: Callable,
  params: dict[str, types.Params],
  input_ids: Int[np.ndarray, 'n s'],
  empty_ids: Int[np.ndarray, ' s'],
  seeds: UInt32[np.ndarray, ' n'],
  *,
  seed: int,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> UInt8[np.ndarray, 'n H W 3']:
  """Images for n prompts in batches; the last one is padded and cut.

  seeds: one number a picture, folded into the run's `seed`.
  """
  base = jax.random.key(seed)
  images = []
  for start in range(0, len(input_ids), batch_size):
    rows = np.arange(start, start + batch_size) % len(input_ids)
    batch = sharding.put_batch(
      {'input_ids': input_ids[rows], 'seed': seeds[rows]}, mesh
    )
    noise_keys = jax.vmap(lambda n: jax.random.fold_in(base, n))(batch['seed'])
    images.append(
      np.asarray(sample_fn(params, batch['input_ids'], empty_ids, noise_keys))
    )
  return np.concatenate(images)[: len(input_ids)]
