"""Builds plain objects from a run's config; nothing below reads a config."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dpo_jax import limits, sharding
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.data import loader as loader_lib
from dpo_jax.data import pairs as pairs_lib
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.diffusion import schedule as schedule_lib
from dpo_jax.evaluate import judge as judge_lib
from dpo_jax.models import classifier, clip, unet, vae
from dpo_jax.tasks import autoencode, classify, denoise, preference
from dpo_jax.train import loop as loop_lib
from dpo_jax.train import optimizer as optimizer_lib
from dpo_jax.weights import classifiers, diffusers_maps, pipeline

COMPONENTS = tuple(diffusers_maps.COMPONENTS)


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """Everything a run needs, as plain objects.

  Attributes:
    record: the resolved config as JSON types.
    loop_arguments: for loop.run, workdir aside.
    model, params: the pipeline at the start (None for task classify); `params`
      holds 'unet', 'vae', 'text_encoder'.
    pairs, images: held-out pairs and single pictures; all pictures.
    notes: what was read and dropped, for the report.
  """

  record: dict[str, Any]
  loop_arguments: dict[str, Any]
  mesh: jax.sharding.Mesh
  model: sd_lib.StableDiffusion | None
  params: dict[str, Any]
  tokenizer: tokenizer_lib.Tokenizer | None
  judge: judge_lib.StyleJudge | None
  all_images: pairs_lib.CaptionedImages
  held_images: pairs_lib.CaptionedImages
  train_pairs: pairs_lib.Pairs | None = None
  held_batches: Callable | None = None


def make_model(
  parts: pipeline.Pipeline, *, dtype: str, remat: str
) -> sd_lib.StableDiffusion:
  """Modules and schedule of a pipeline folder."""
  dtype = jnp.dtype(dtype)
  return sd_lib.StableDiffusion(
    unet=unet.UNet2DConditionModel(parts.unet_config, dtype=dtype, remat=remat),
    vae=vae.AutoencoderKL(parts.vae_config, dtype=dtype),
    text_encoder=clip.CLIPTextModel(parts.text_config, dtype=dtype),
    schedule=schedule_lib.from_config(parts.scheduler_config),
    scaling_factor=parts.vae_config.scaling_factor,
    latent_channels=parts.vae_config.latent_channels,
    downscale=parts.vae_config.downscale,
  )


def _init_missing(parts: pipeline.Pipeline, names, seed: int) -> dict:
  """Parameters of the pipeline, random ones for `names`."""
  params = dict(parts.params)
  configs = {
    'unet': parts.unet_config,
    'vae': parts.vae_config,
    'text_encoder': parts.text_config,
  }
  for name in names:
    init = functools.partial(
      diffusers_maps.COMPONENTS[name].init, configs[name]
    )
    key = jax.random.fold_in(jax.random.key(seed), COMPONENTS.index(name))
    params[name] = jax.device_get(jax.jit(init)(key))
  return params


def _eval_batches(make_loader, examples, batch_size):
  """Each held-out example once, as (batch, number of valid rows)."""

  def batches(epoch: int = 0):
    iterator = make_loader(examples, batch_size=batch_size)
    left = len(examples)
    try:
      while left > 0:
        batch = next(iterator)
        # Rows of the next round come last and are cut off; the same noise
        # for the same example whatever the batch size is.
        batch['epoch'] = np.full_like(batch['epoch'], epoch)
        yield batch, min(left, batch_size)
        left -= batch_size
    finally:
      iterator.close()

  return batches


def _load_judge(config) -> judge_lib.StyleJudge | None:
  if not config.eval.judge:
    return None
  settings, params = classifiers.load(config.eval.judge)
  if config.eval.preferred not in settings.classes:
    raise ValueError(
      f'eval.preferred={config.eval.preferred!r}: the judge in '
      f'{config.eval.judge} knows {", ".join(settings.classes)}'
    )
  return judge_lib.StyleJudge(
    classifier=classifier.ImageClassifier(settings),
    params=params,
    classes=settings.classes,
    preferred=config.eval.preferred,
  )


def _make_task(config, model, params, empty_ids):
  """The task of a diffusion model."""
  shared = {
    'model': model,
    'params': params,
    'resolution': config.data.resolution,
  }
  text = {
    'empty_ids': empty_ids,
    'prompt_dropout': config.data.prompt_dropout,
  }
  if config.task == 'preference':
    objective = functools.partial(
      limits.OBJECTIVES[config.objective.name], **config.objective.numbers
    )
    return preference.make_task(
      objective=objective,
      reward_beta=config.objective.reward_beta,
      **shared,
      **text,
    )
  if config.task == 'denoise':
    return denoise.make_task(
      min_snr_gamma=config.denoise.min_snr_gamma, **shared, **text
    )
  return autoencode.make_task(kl_weight=config.vae.kl_weight, **shared)


def _make_classify(config, style_names):
  settings = classifier.ImageClassifierConfig(
    classes=tuple(style_names),
    widths=tuple(config.classifier.widths),
    palette=tuple(config.classifier.palette),
    image_size=config.data.resolution,
  )
  module = classifier.ImageClassifier(settings)
  side = config.data.resolution
  params = jax.jit(module.init)(
    jax.random.key(config.seed), jnp.zeros((1, side, side, 3))
  )['params']
  return classify.make_task(
    classifier=module,
    params=params,
    noise=config.classifier.noise,
    gain=config.classifier.gain,
    blur=config.classifier.blur,
    shift=config.classifier.shift,
  ), {'classifier': params}


def _make_optimizer(config):
  """(optimizer, schedule of its rate)."""
  schedule = optimizer_lib.make_schedule(
    name=config.optim.schedule,
    learning_rate=config.optim.lr,
    warmup_steps=config.optim.warmup_steps,
    num_steps=config.optim.decay_steps or config.train.num_steps,
  )
  optimizer = optimizer_lib.make_optimizer(
    name=config.optim.name,
    schedule=schedule,
    b1=config.optim.b1,
    b2=config.optim.b2,
    eps=config.optim.eps,
    weight_decay=config.optim.weight_decay,
    clip_norm=config.optim.clip_norm,
  )
  return optimizer, schedule


def _make_mesh(config):
  """The mesh, once the batch sizes are known to fit it."""
  mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
  devices = mesh.devices.size
  sharding.check_batch_size(
    config.train.batch_size, config.train.accumulate, devices
  )
  if config.eval.batch_size % devices:
    raise ValueError(
      f'eval.batch_size={config.eval.batch_size} is not divisible by '
      f'{devices} devices; use a multiple of {devices}'
    )
  return mesh


def _make_diffusion(config):
  """(model, parameters, tokenizer, task) of a pipeline folder."""
  parts = pipeline.load(
    config.model.folder, without=tuple(config.model.random_init)
  )
  model = make_model(parts, dtype=config.model.dtype, remat=config.model.remat)
  params = _init_missing(parts, config.model.random_init, config.seed)
  tokenizer = tokenizer_lib.load(parts.tokenizer_folder)
  empty_ids = tokenizer.encode([''])[0][0]
  task = _make_task(config, model, params, empty_ids)
  return model, params, tokenizer, task


def _make_loaders(config, train, held, tokenizer):
  """(endless training batches, held-out batches by epoch)."""
  make_loader = functools.partial(
    loader_lib.make_pair_loader
    if config.task == 'preference'
    else loader_lib.make_image_loader,
    tokenizer=tokenizer,
    seed=config.seed,
    resolution=config.data.resolution,
  )
  plain = functools.partial(make_loader, random_crop=False, flip=False)
  loader = make_loader(
    train,
    batch_size=config.train.batch_size,
    random_crop=config.data.random_crop,
    flip=config.data.flip,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  return loader, _eval_batches(plain, held, config.eval.batch_size)


def build(config: ml_collections.ConfigDict) -> Job:
  """Reads model and data and wires a run.

  Raises ValueError naming file and reason for bad weights or data, and for
  sizes that do not fit the devices.
  """
  mesh = _make_mesh(config)
  paired = config.task == 'preference'
  pairs = pairs_lib.read_parquet(config.data.path) if paired else None
  all_images = pairs_lib.read_images(config.data.path)
  train, held_images = _split(all_images, config.data.holdout)
  held = held_images
  if paired:
    train, held = _split(pairs, config.data.holdout)
  if config.task == 'classify':
    model, tokenizer = None, _NoTokenizer()
    task, params = _make_classify(config, all_images.style_names)
  else:
    model, params, tokenizer, task = _make_diffusion(config)
  loader, held_batches = _make_loaders(config, train, held, tokenizer)
  optimizer, schedule = _make_optimizer(config)
  options = loop_lib.Options(
    seed=config.seed,
    ema_decay=config.optim.ema_decay,
    **{
      name: config.train[name]
      for name in (
        'num_steps',
        'batch_size',
        'accumulate',
        'log_every',
        'eval_every',
        'checkpoint_every',
        'keep',
      )
    },
  )
  return Job(
    record=limits.validate(config),
    loop_arguments={
      'task': task,
      'optimizer': optimizer,
      'schedule': schedule,
      'loader': loader,
      'eval_batches': held_batches,
      'options': options,
      'mesh': mesh,
    },
    mesh=mesh,
    model=model,
    params=params,
    tokenizer=tokenizer,
    judge=_load_judge(config),
    all_images=all_images,
    held_images=held_images,
    train_pairs=train if paired else None,
    held_batches=held_batches,
  )


def _split(examples, holdout: float):
  """(train, held out); without a holdout both are everything."""
  if not holdout:
    return examples, examples
  return pairs_lib.split_by_caption(examples, holdout)


class _NoTokenizer:
  """Stands in where captions are not read (task classify)."""

  def encode(self, captions):
    """One zero a caption."""
    return np.zeros((len(captions), 1), np.int32), 0
