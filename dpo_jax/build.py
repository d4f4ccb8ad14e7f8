"""Builds plain objects from a run's config; nothing below reads a config."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from dpo_jax import (
  caching,
  datasets,
  limits,
  loading,
  sharding,
  trees,
  types,
)
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax import task as task_lib
from dpo_jax.data import cached
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.evaluate import judge as judge_lib
from dpo_jax.models import classifier
from dpo_jax.tasks import (
  autoencode,
  classify,
  denoise,
  preference,
  reference,
)
from dpo_jax.tasks import inputs as inputs_lib
from dpo_jax.train import loop as loop_lib
from dpo_jax.train import offload as offload_lib
from dpo_jax.train import optimizer as optimizer_lib
from dpo_jax.weights import classifiers


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """Everything a run needs, as plain objects.

  Attributes:
    record: the resolved config as JSON types.
    pinned: what a run that goes on must find as it was: name to JSON types.
    loop_arguments: for loop.run, workdir aside.
    opened: the model at the start (None for task classify).
    tokenizer: its tokenizers.
    counts: what became of the data's rows.
    held_batches: held-out batches by epoch.
  """

  record: dict[str, Any]
  pinned: dict[str, dict[str, str]]
  loop_arguments: dict[str, Any]
  mesh: jax.sharding.Mesh
  opened: loading.Opened | None
  tokenizer: tokenizer_lib.Encoder
  judge: judge_lib.StyleJudge | None
  data: datasets.Data
  counts: dict[str, int]
  held_batches: Callable


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


def make_task(
  config: ml_collections.ConfigDict,
  *,
  mesh: jax.sharding.Mesh,
  model: sd_lib.StableDiffusion,
  params: dict[str, types.Params],
  empty_ids: np.ndarray,
  empty_cond: Mapping[str, np.ndarray] | None,
) -> task_lib.Task:
  """The task of a diffusion model, its activations split over the mesh.

  params: may be shapes, if nothing is computed with them. empty_ids and
  empty_cond: as tasks.inputs.Inputs takes them.
  """
  # XLA compiles loops for a CPU into slower code, and quickly what has none.
  stack_layers = mesh.devices.flat[0].platform != 'cpu'
  if config.model.stack_layers != 'auto':
    stack_layers = config.model.stack_layers == 'always'
  task = _make_task(config, model, params, empty_ids, empty_cond, stack_layers)
  return _over(mesh, task)


def _make_task(config, model, params, empty_ids, empty_cond, stack_layers):
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
    empty_ids=empty_ids,
    prompt_dropout=config.data.prompt_dropout,
    dropped_prompt=config.data.dropped_prompt,
    micro_cond=config.data.micro_cond,
    timesteps=inputs_lib.choose_timesteps(
      model.schedule.num_steps,
      low=config.noise.t_min,
      high=config.noise.t_max,
      only=tuple(config.noise.timesteps),
    ),
    posterior=config.data.posterior,
    empty_cond=empty_cond,
    sequential=config.train.sequential,
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
    compute_errs=reference.choose(config.model.ref_path, config.model.dtype),
    ref_dtype=config.model.ref_dtype,
    param_dtype=jnp.dtype(config.model.param_dtype),
    stack_layers=stack_layers,
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


def _over(mesh, task):
  """The task with its networks' activations split over the mesh."""
  return dataclasses.replace(
    task,
    loss=sharding.over(mesh, task.loss),
    evaluators={
      name: sharding.over(mesh, fn) for name, fn in task.evaluators.items()
    },
  )


def make_optimizer(
  config: ml_collections.ConfigDict,
) -> tuple[optax.GradientTransformation, Callable[[int], float]]:
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
    mu_dtype=config.optim.mu_dtype,
    parameter_scale=config.optim.parameter_scale,
    offload=config.optim.offload,
  )
  return optimizer, schedule


def make_mesh(
  config: ml_collections.ConfigDict,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """The mesh, once the batch size is known to fit it.

  Raises ValueError naming the size that does not.
  """
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  ways = sharding.batch_ways(mesh)
  sharding.check_batch_size(
    config.train.batch_size, config.train.accumulate, ways
  )
  return mesh


def _make_options(config):
  """The loop's numbers."""
  return loop_lib.Options(
    seed=config.seed,
    ema_decay=config.optim.ema_decay,
    offload=config.optim.offload,
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
        'profile_from',
        'profile_steps',
      )
    },
  )


def _check_eval_batch(config, ways):
  if config.eval.batch_size % ways:
    raise ValueError(
      f'eval.batch_size={config.eval.batch_size} is not divisible by '
      f'{ways} devices; use a multiple of {ways}'
    )


def model_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What a config says of the networks: keywords of loading.make_model."""
  return {
    'dtype': config.model.dtype,
    'remat': config.model.remat,
    'residual_dtype': config.model.residual_dtype,
    'attention': config.model.attention,
    'zero_terminal_snr': config.noise.zero_terminal_snr,
  }


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
    **model_options(config),
  )
  if config.data.resolution % opened.model.downscale:
    raise ValueError(
      f'data.resolution={config.data.resolution}: must be a multiple of the '
      f"VAE's downscale factor {opened.model.downscale}"
    )
  return opened


def _leave_start(opened, task):
  """(opened, task) whose UNet is on the host where the reference has its own.

  The policy starts as a copy of it, and until the evaluation nobody needs it:
  4 bytes a weight of the devices' memory. Where several processes share its
  parts it stays.
  """
  start = opened.params['unet']
  shared = {id(leaf) for leaf in jax.tree.leaves(start)}
  ref = jax.tree.leaves(task.frozen.get('ref', start))
  kept = sum(leaf.size for leaf in ref if id(leaf) in shared)
  if jax.process_count() > 1 or 2 * kept > trees.count(start):
    return opened, task
  own = task.params['unet'] is not start
  start = jax.device_get(start)
  params = jax.device_get(task.params) if own else {'unet': start}
  return (
    dataclasses.replace(opened, params={**opened.params, 'unet': start}),
    dataclasses.replace(task, params=params),
  )


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


def _read_data(config) -> datasets.Data:
  """The examples that the config names; reads no picture of a folder."""
  paths = datasets.split_paths(config.data.path)
  eval_paths = datasets.split_paths(config.data.eval_path)
  if any(map(datasets.is_prepared, paths)):
    if config.task != 'preference':
      raise ValueError(
        f'data.path={config.data.path}: prepared folders are for '
        f'task=preference; task={config.task} reads parquet files'
      )
    if config.eval.retrieval:
      raise ValueError(
        'eval.retrieval=True: compares with every picture in memory, which is '
        'for parquet files; set it to False for prepared folders'
      )
    return datasets.open_prepared(
      paths,
      weights=tuple(config.data.weights),
      holdout=config.data.holdout,
      eval_paths=eval_paths,
      use_cache=config.data.use_cache,
      max_held=config.eval.num_pairs,
    )
  if eval_paths or len(config.data.weights):
    name = 'eval_path' if eval_paths else 'weights'
    raise ValueError(
      f'data.{name}={config.data[name]}: is for prepared folders, and '
      f'data.path={config.data.path} is none (python -m dpo_jax.tools.prepare)'
    )
  return datasets.read_parquet(
    paths,
    holdout=config.data.holdout,
    paired=config.task == 'preference',
    max_held=config.eval.num_pairs,
  )


def _check_caches(data, opened) -> None:
  """Raises ValueError where latents are of another model than this."""
  if data.cache is not None:
    folders = {
      cached.folder_of(source.records): None
      for source in data.train + data.held
    }
    for folder in folders:
      caching.check_cache(folder, opened)


def build(config: ml_collections.ConfigDict) -> Job:
  """Reads model and data and wires a run.

  Raises ValueError naming file and reason for bad weights or data, and for
  sizes that do not fit the devices.
  """
  mesh = make_mesh(config)
  _check_eval_batch(config, sharding.batch_ways(mesh))
  if config.optim.offload:
    offload_lib.check(mesh)
  data = _read_data(config)
  counts, opened = data.counts, None
  if config.task == 'classify':
    tokenizer = _NoTokenizer()
    task = _make_classify(config, data.all_images.style_names)
    task = _over(mesh, task)
  else:
    opened = _open(config, mesh)
    _check_caches(data, opened)
    tokenizer = opened.tokenizers
    task = make_task(
      config,
      mesh=mesh,
      model=opened.model,
      params=opened.params,
      empty_ids=tokenizer.encode([''])[0][0],
      empty_cond=data.cache and data.cache.empty,
    )
    opened, task = _leave_start(opened, task)
  if data.all_images is not None:
    cut = _count_cut(tokenizer, data.all_images.captions)
    counts = counts | {'captions_cut': cut}
  # Each process loads its part of every batch, in evaluation too.
  sizes = {
    'seed': config.seed,
    'resolution': config.data.resolution,
    'process_index': jax.process_index(),
    'process_count': jax.process_count(),
  }
  loader = datasets.make_loader(
    data.train,
    tokenizer,
    batch_size=config.train.batch_size,
    random_crop=config.data.random_crop,
    flip=config.data.flip,
    **sizes,
  )
  held_batches = datasets.make_held_batches(
    data.held, tokenizer, batch_size=config.eval.batch_size, **sizes
  )
  optimizer, schedule = make_optimizer(config)
  source = opened and opened.source
  return Job(
    record=limits.validate(config) | {'source': source},
    pinned={
      'source': source or {},
      'data': {'sha256': data.fingerprint},
    },
    loop_arguments={
      'task': task,
      'optimizer': optimizer,
      'schedule': schedule,
      'loader': loader,
      'eval_batches': held_batches,
      'options': _make_options(config),
      'mesh': mesh,
    },
    mesh=mesh,
    opened=opened,
    tokenizer=tokenizer,
    judge=_load_judge(config),
    data=data,
    counts=counts,
    held_batches=held_batches,
  )


class _NoTokenizer:
  """Stands in where captions are not read (task classify)."""

  def encode(self, captions):
    """One zero a caption."""
    return np.zeros((len(captions), 1), np.int32), 0
