"""Pictures from prompts, with one noise key a picture."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt8, UInt32

from dpo_jax import keys as keys_lib
from dpo_jax import sharding, types
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.diffusion import samplers

# What a picture's key is folded with for the draw of the VAE's posterior;
# step i of the sampler folds i + 1.
POSTERIOR_FOLD = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Settings:
  """How pictures are sampled.

  Attributes:
    size: (height, width) in pixels.
    guidance_scale, guidance_rescale: see `guidance.classifier_free`.
    eta, karras, strength: see `samplers.make_plan`; strength below 1 starts
      from an image.
    refiner_start: the share of the trajectory after which the refiner takes
      over, where there is one.
  """

  size: tuple[int, int]
  sampler: str
  num_steps: int
  guidance_scale: float
  guidance_rescale: float = 0.0
  eta: float = 0.0
  karras: bool | None = None
  strength: float = 1.0
  refiner_start: float = 0.8


def make_sample_fn(
  model: sd_lib.StableDiffusion,
  settings: Settings,
  *,
  refiner: sd_lib.StableDiffusion | None = None,
) -> Callable[..., UInt8[Array, 'n H W 3']]:
  """Jitted (params, batch) -> uint8 images.

  params: 'unet', 'vae' and the text encoders, and with a refiner 'refiner',
  a dict of the same kind. batch:
    input_ids, uncond_ids: [n k s] prompts and what they are guided away from.
      Without uncond_ids the model's own empty conditioning is used, if that
      is zeros (SDXL base).
    refiner_input_ids, refiner_uncond_ids: the same for the refiner.
    keys: [n]; the noise of image i follows from keys[i] alone, so equal keys
      with two models give comparable pictures.
    noise: [n h w c], optional: the start noise instead of the keys' own.
    images: uint8 [n H W 3], where strength is below 1 (SDEdit, Meng et al.,
      2022).
  """
  plan = _make_plan(
    model,
    settings,
    strength=settings.strength,
    end=1.0 if refiner is None else settings.refiner_start,
  )
  second = None
  if refiner is not None:
    second = _make_plan(refiner, settings, start=settings.refiner_start)
  shape = model.latent_shape(settings.size)

  @jax.jit
  def sample_fn(params, batch):
    def noise_fn(i):
      fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
      return keys_lib.normal(fold(batch['keys'], i + 1), shape)

    noise = batch.get('noise')
    if noise is None:
      noise = keys_lib.normal(batch['keys'], shape)
    if 'images' in batch:
      state = plan.from_image(_encode(model, params, batch), noise)
    else:
      state = plan.from_noise(noise)
    denoise_fn = _denoise_fn(model, params, batch, settings)
    state = samplers.sample(plan, denoise_fn, state, noise_fn=noise_fn)
    if refiner is not None:
      names = {'input_ids': 'refiner_input_ids'}
      names['uncond_ids'] = 'refiner_uncond_ids'
      denoise_fn = _denoise_fn(
        refiner,
        params['refiner'],
        {name: batch[key] for name, key in names.items() if key in batch},
        settings,
      )
      state = samplers.sample(second, denoise_fn, state, noise_fn=noise_fn)
    return sd_lib.to_uint8(model.decode_latents(params['vae'], state))

  return sample_fn


def _make_plan(model, settings, **part):
  return samplers.make_plan(
    model.scheduler_config,
    settings.num_steps,
    sampler=settings.sampler,
    eta=settings.eta,
    karras=settings.karras,
    **part,
  )


def _encode(model, params, batch):
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  images = sd_lib.to_float(batch['images'])
  shape = model.latent_shape(images.shape[1:3])
  noise = keys_lib.normal(fold(batch['keys'], POSTERIOR_FOLD), shape)
  return model.encode_images(params['vae'], images, noise)


def _denoise_fn(model, params, batch, settings):
  cond = model.encode_text(params, batch['input_ids'])
  if 'uncond_ids' in batch:
    uncond = model.encode_text(params, batch['uncond_ids'])
  elif model.zero_uncond:
    uncond = jax.tree.map(jnp.zeros_like, cond)
  else:
    raise ValueError('uncond_ids are needed: this model has no zero prompt')
  sizes = sd_lib.constant_sizes(len(batch['input_ids']), settings.size)
  add = functools.partial(
    model.add_micro_cond, sizes=sizes, target=settings.size
  )
  return model.make_denoise_fn(
    params['unet'],
    add(cond),
    add(uncond, aesthetic_score=sd_lib.NEGATIVE_AESTHETIC_SCORE),
    guidance_scale=settings.guidance_scale,
    guidance_rescale=settings.guidance_rescale,
  )


def prompt_batch(
  model: sd_lib.StableDiffusion,
  encode: Callable,
  prompts: list[str],
  negative_prompts: list[str] | None = None,
) -> dict[str, np.ndarray]:
  """input_ids and, where the model needs them, uncond_ids [n k s].

  encode: captions -> (ids, number cut). A negative prompt of '' is none: the
  zeros of SDXL base, the encoding of '' elsewhere.
  """
  negative = negative_prompts or [''] * len(prompts)
  batch = {'input_ids': encode(prompts)[0]}
  if not model.zero_uncond:
    return batch | {'uncond_ids': encode(negative)[0]}
  if not any(negative):
    return batch
  if not all(negative):
    raise ValueError(
      'this model (SDXL) takes zeros where there is no negative prompt: give '
      'one to every prompt or to none'
    )
  return batch | {'uncond_ids': encode(negative)[0]}


def generate_batches(
  sample_fn: Callable,
  params: Mapping[str, types.PyTree],
  inputs: Mapping[str, np.ndarray],
  seeds: UInt32[np.ndarray, ' n'],
  *,
  seed: int,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Iterator[tuple[slice, UInt8[np.ndarray, 'm H W 3']]]:
  """(rows, their images), batch by batch; the last one is padded and cut.

  inputs: arrays [n ...] of make_sample_fn's batch, keys aside. seeds: one
  number a picture, folded into the run's `seed`.
  """
  base, sample_fn = jax.random.key(seed), sharding.over(mesh, sample_fn)
  n = len(seeds)
  local = batch_size // jax.process_count()
  begin = local * jax.process_index()
  for start in range(0, n, batch_size):
    # This process's rows of the global batch; past the end it starts again.
    places = begin + np.arange(local, dtype=np.int32)
    rows = (start + places) % n
    batch = {name: array[rows] for name, array in inputs.items()}
    batch |= {'seed': seeds[rows], 'place': places}
    batch = sharding.put_batch(batch, mesh)
    numbers, places = batch.pop('seed'), batch.pop('place')
    batch['keys'] = jax.vmap(lambda k: jax.random.fold_in(base, k))(numbers)
    images = sample_fn(params, batch)
    if jax.process_count() > 1:
      # A mesh may have its devices in another order than the processes.
      images, places = multihost_utils.process_allgather(
        (images, places), tiled=True
      )
      images = images[np.argsort(places)]
    images = np.asarray(images)
    stop = min(n, start + batch_size)
    yield slice(start, stop), images[: stop - start]


def generate(
  sample_fn: Callable,
  params: Mapping[str, types.PyTree],
  inputs: Mapping[str, np.ndarray],
  seeds: UInt32[np.ndarray, ' n'],
  **options,
) -> UInt8[np.ndarray, 'n H W 3']:
  """All images of `generate_batches`, whose arguments these are."""
  batches = generate_batches(sample_fn, params, inputs, seeds, **options)
  return np.concatenate([images for _, images in batches])
