"""Pictures from prompts, with one noise key a picture."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8, UInt32

from dpo_jax import keys as keys_lib
from dpo_jax import sharding, types
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.diffusion import reward_guidance, samplers
from dpo_jax.evaluate import censor as censor_lib

DRIVERS = ('scan', 'python')
# What a picture's key is folded with for the draw of the VAE's posterior;
# step i of the sampler folds i + 1. Recurrence folds the next constant and then
# the number of its round.
POSTERIOR_FOLD = 2**31 - 1
RENOISE_FOLD = 2**31 - 2


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


def choose_driver(mesh: jax.sharding.Mesh) -> str:
  """What calls guided steps on a mesh's devices; one of DRIVERS.

  On XLA:CPU gradients inside of a loop were seen slower than the same step
  called from Python, so there it is Python's loop; measure by
  benchmarks.guided_memory.
  """
  platform = mesh.devices.flat[0].platform
  return 'python' if platform == 'cpu' else 'scan'


def make_sample_fn(
  model: sd_lib.StableDiffusion,
  settings: Settings,
  *,
  refiner: sd_lib.StableDiffusion | None = None,
  censor: censor_lib.Censor | None = None,
  driver: str = 'scan',
) -> Callable[..., Any]:
  """Jitted (params, batch) -> uint8 images [n H W 3].

  With a `censor` it is -> {'images', 'log_reward' [n]}, and the sampler is
  guided if it steers. driver: of guided steps, see choose_driver; others are
  always a scan. The steps' loop is never differentiated.

  params: 'unet', 'vae' and the text encoders, and with a refiner 'refiner',
  a dict of the same kind; of a censor 'reward'; 'negative', optional, of
  another UNet that guidance leads away from. batch:
    input_ids, uncond_ids: [n k s] prompts and what they are guided away from.
      Without uncond_ids the model's own empty conditioning is used, if that
      is zeros (SDXL base).
    refiner_input_ids, refiner_uncond_ids: the same for the refiner.
    keys: [n]; the noise of image i follows from keys[i] alone, so equal keys
      with two models give comparable pictures.
    noise: [n h w c], optional: the start noise instead of the keys' own.
    images: uint8 [n H W 3], where strength is below 1 (SDEdit, Meng et al.,
      2022).

  Raises ValueError for another driver, and for a censor that starts after
  the last step.
  """
  if driver not in DRIVERS:
    raise ValueError(f'driver={driver!r}: must be one of {", ".join(DRIVERS)}')
  part = functools.partial(_Part, settings=settings, censor=censor)
  plan = _make_plan(
    model,
    settings,
    strength=settings.strength,
    end=1.0 if refiner is None else settings.refiner_start,
  )
  parts = [part(model, plan)]
  if refiner is not None:
    plan = _make_plan(refiner, settings, start=settings.refiner_start)
    parts.append(part(refiner, plan, prefix='refiner_'))
  if not any(phase.censor for part in parts for phase, _ in part.phases()):
    _refuse_start(censor, settings)
  begin = functools.partial(_begin, parts[0])
  finish = functools.partial(_finish, parts[0])
  if driver == 'python' and censor is not None and censor.steers:
    return _from_python(parts, begin, finish)

  @jax.jit
  def sample_fn(params, batch):
    state = begin(params, batch)
    for part in parts:
      conditions, carry = part.encode(params, batch), samplers.start(state)
      for phase, places in part.phases():
        step = phase.make_step(params, conditions, batch['keys'])
        carry = samplers.take(step, carry, places)
      state = carry.state
    return finish(params, state)

  return sample_fn


def _refuse_start(censor, settings):
  if censor is not None:
    raise ValueError(
      f'--reward_start={censor.start} leaves the reward none of '
      f'{settings.num_steps} steps; take more steps, or a smaller share'
    )


def _from_python(parts, begin, finish):
  """The same function as several programs, of which one is a step's round."""
  begin, finish = jax.jit(begin), jax.jit(finish)
  encoders = [jax.jit(part.encode) for part in parts]
  phases = [
    [
      (jax.jit(phase.round), phase.recurrence, places)
      for phase, places in part.phases()
    ]
    for part in parts
  ]

  def sample_fn(params, batch):
    state = begin(params, batch)
    for encode, own in zip(encoders, phases, strict=True):
      conditions, carry = encode(params, batch), samplers.start(state)
      for once, recurrence, places in own:
        now = functools.partial(once, params, conditions, batch['keys'])
        step = samplers.repeat(now, recurrence)
        for i in range(len(places.row.index)):
          carry = step(
            carry, jax.tree.map(lambda column, i=i: column[i], places)
          )
      state = carry.state
    return finish(params, state)

  return sample_fn


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
  """A model and the steps it makes; the refiner's are a second one."""

  model: sd_lib.StableDiffusion
  plan: samplers.Plan
  settings: Settings
  censor: censor_lib.Censor | None
  prefix: str = ''

  @property
  def recurrence(self) -> int:
    return 1 if self.censor is None else self.censor.recurrence

  def own(self, params):
    return params['refiner'] if self.prefix else params

  def phases(self):
    """(part, places of the steps that it makes), one after the other."""
    places = samplers.places(self.plan)
    if self.censor is None or not self.censor.start:
      return [(self, places)]
    total = self.model.schedule.num_steps
    first = self.censor.first_step(self.plan.rows.t, total)
    plain = dataclasses.replace(self, censor=None)
    both = (plain, slice(0, first)), (self, slice(first, None))
    cut = [
      (part, jax.tree.map(lambda column, own=own: column[own], places))
      for part, own in both
    ]
    return [(part, own) for part, own in cut if len(own.row.index)]

  def encode(self, params, batch):
    """The conditions of the two branches of guidance by text."""
    names = ('input_ids', 'uncond_ids')
    ids = {name: batch.get(f'{self.prefix}{name}') for name in names}
    return _encode_text(self.model, self.own(params), ids, self.settings)

  def denoise_fn(self, params, conditions):
    model, censor, settings = self.model, self.censor, self.settings
    if censor is not None:
      model = censor.prepare(model)
    denoise_fn = model.make_denoise_fn(
      self.own(params)['unet'],
      *conditions,
      guidance_scale=settings.guidance_scale,
      guidance_rescale=settings.guidance_rescale,
      negative_params=self.own(params).get('negative'),
    )
    if censor is None:
      return denoise_fn
    log_reward_fn = censor.make_log_reward_fn(model, params)
    return reward_guidance.guide(
      denoise_fn, log_reward_fn, self.plan, censor.guidance
    )

  def noises(self, keys):
    """What samplers.make_step draws: a picture's own, whatever its batch."""
    shape = self.model.latent_shape(self.settings.size)
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))

    def noise_fn(i):
      return keys_lib.normal(fold(keys, i + 1), shape)

    def renoise_fn(i):
      return keys_lib.normal(fold(fold(keys, RENOISE_FOLD), i), shape)

    return {
      'noise_fn': noise_fn,
      'recurrence': self.recurrence,
      'renoise_fn': renoise_fn,
    }

  def make_step(self, params, conditions, keys):
    """(carry, place) -> carry."""
    denoise_fn = self.denoise_fn(params, conditions)
    return samplers.make_step(self.plan, denoise_fn, **self.noises(keys))

  def round(self, params, conditions, keys, carry, place, j):
    """Round j of a step, as a program of its own."""
    denoise_fn = self.denoise_fn(params, conditions)
    made = samplers.make_round(self.plan, denoise_fn, **self.noises(keys))
    return made(carry, place, j)


def _begin(part, params, batch):
  noise, plan = batch.get('noise'), part.plan
  if noise is None:
    shape = part.model.latent_shape(part.settings.size)
    noise = keys_lib.normal(batch['keys'], shape)
  if 'images' in batch:
    return plan.from_image(_encode(part.model, params, batch), noise)
  return plan.from_noise(noise)


def _finish(part, params, state):
  images = sd_lib.to_uint8(part.model.decode_latents(params['vae'], state))
  if part.censor is None:
    return images
  score = part.censor.score(part.model, params, state, images)
  return {'images': images, 'log_reward': score}


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


def _encode_text(model, params, ids, settings):
  """(cond, uncond) of ids' `input_ids` and `uncond_ids`, which may be None."""
  cond = model.encode_text(params, ids['input_ids'])
  if ids['uncond_ids'] is not None:
    uncond = model.encode_text(params, ids['uncond_ids'])
  elif model.zero_uncond:
    uncond = jax.tree.map(jnp.zeros_like, cond)
  else:
    raise ValueError('uncond_ids are needed: this model has no zero prompt')
  sizes = sd_lib.constant_sizes(len(ids['input_ids']), settings.size)
  add = functools.partial(
    model.add_micro_cond, sizes=sizes, target=settings.size
  )
  return (
    add(cond),
    add(uncond, aesthetic_score=sd_lib.NEGATIVE_AESTHETIC_SCORE),
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
) -> Iterator[tuple[slice, Any]]:
  """(rows, their images), batch by batch; the last one is padded and cut.

  Images are uint8 [m H W 3], or the tree that sample_fn returns, cut alike.
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
    made = sample_fn(params, batch)
    order = slice(None)
    if jax.process_count() > 1:
      # A mesh may have its devices in another order than the processes.
      made, places = multihost_utils.process_allgather(
        (made, places), tiled=True
      )
      order = np.argsort(places)
    stop = min(n, start + batch_size)
    yield slice(start, stop), _take(made, order, stop - start)


def _take(made, order, count: int):
  """The first `count` rows of every leaf, once they are in order."""
  return jax.tree.map(lambda leaf: np.asarray(leaf)[order][:count], made)


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
