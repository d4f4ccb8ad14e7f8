"""Builds plain objects from a run's config; nothing below reads a config."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dpo_jax import limits, loading, sharding
from dpo_jax.data import loader as loader_lib
from dpo_jax.data import pairs as pairs_lib
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.evaluate import judge as judge_lib
from dpo_jax.models import classifier
from dpo_jax.tasks import autoencode, classify, denoise, preference
from dpo_jax.tasks import inputs as inputs_lib
from dpo_jax.train import loop as loop_lib
from dpo_jax.train import optimizer as optimizer_lib
from dpo_jax.weights import classifiers


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """Everything a run needs, as plain objects.

  Attributes:
    record: the resolved config as JSON types.
    loop_arguments: for loop.run, workdir aside.
    opened: the model at the start (None for task classify).
    tokenizer: its tokenizers.
    all_images, held_images: all pictures, and those not trained on.
    train_pairs, held_batches: pairs, and held-out batches by epoch.
    captions_cut: distinct captions that are longer than the text encoder's.
  """

  record: dict[str, Any]
  loop_arguments: dict[str, Any]
  mesh: jax.sharding.Mesh
  opened: loading.Opened | None
  tokenizer: tokenizer_lib.Encoder
  judge: judge_lib.StyleJudge | None
  all_images: pairs_lib.CaptionedImages
  held_images: pairs_lib.CaptionedImages
  train_pairs: pairs_lib.Pairs | None = None
  held_batches: Callable | None = None
  captions_cut: int = 0


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


def _make_task(config, opened):
  """The task of a diffusion model."""
  model, params = opened.model, opened.params
  if config.task == 'autoencode':
    return autoencode.make_task(
      model=model,
      params=params,
      resolution=config.data.resolution,
      kl_weight=config.vae.kl_weight,
    )
  inputs = inputs_lib.Inputs(
    model=model,
    resolution=config.data.resolution,
    empty_ids=opened.tokenizers.encode([''])[0][0],
    prompt_dropout=config.data.prompt_dropout,
    dropped_prompt=config.data.dropped_prompt,
    micro_cond=config.data.micro_cond,
    timesteps=inputs_lib.choose_timesteps(
      model.schedule.num_steps,
      low=config.noise.t_min,
      high=config.noise.t_max,
      only=tuple(config.noise.timesteps),
    ),
  )
  if config.task == 'denoise':
    return denoise.make_task(
      inputs=inputs, params=params, min_snr_gamma=config.denoise.min_snr_gamma
    )
  return preference.make_task(
    inputs=inputs,
    params=params,
    objective=functools.partial(
      limits.OBJECTIVES[config.objective.name], **config.objective.numbers
    ),
    reward_beta=config.objective.reward_beta,
  )


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
  )


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


def _open(config, mesh):
  """The model that the config names."""
  opened = loading.open_model(
    config.model.folder,
    mesh=mesh,
    revision=config.model.revision,
    variant=config.model.variant,
    configs=config.model.configs,
    prediction_type=config.model.prediction_type,
    random_init=tuple(config.model.random_init),
    seed=config.seed,
    dtype=config.model.dtype,
    remat=config.model.remat,
    zero_terminal_snr=config.noise.zero_terminal_snr,
  )
  if config.data.resolution % opened.model.downscale:
    raise ValueError(
      f'data.resolution={config.data.resolution}: must be a multiple of the '
      f"VAE's downscale factor {opened.model.downscale}"
    )
  return opened


def _count_cut(tokenizer, captions) -> int:
  """How many distinct captions do not fit, which is also said."""
  distinct = sorted(set(captions))
  cut = tokenizer.encode(distinct)[1]
  if cut:
    print(
      f'{cut} of {len(distinct)} captions are longer than the text encoder '
      'takes; their ends are cut off',
      file=sys.stderr,
    )
  return cut


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
  opened = None
  if config.task == 'classify':
    tokenizer = _NoTokenizer()
    task = _make_classify(config, all_images.style_names)
  else:
    opened = _open(config, mesh)
    tokenizer = opened.tokenizers
    task = _make_task(config, opened)
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
    record=limits.validate(config) | {'source': opened and opened.source},
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
    opened=opened,
    tokenizer=tokenizer,
    judge=_load_judge(config),
    all_images=all_images,
    held_images=held_images,
    train_pairs=train if paired else None,
    held_batches=held_batches,
    captions_cut=_count_cut(tokenizer, all_images.captions),
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
