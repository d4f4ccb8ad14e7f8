"""Builds a run from its config; with from_config, the readers of configs."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from dpo_jax import (
  caching,
  datasets,
  drawing,
  from_config,
  limits,
  loading,
  reading,
  reward_runs,
  scoring,
  selecting,
  sharding,
  trees,
)
from dpo_jax.data import cached, ref_errors
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.evaluate import judge as judge_lib
from dpo_jax.models import classifier, lora
from dpo_jax.train import loop as loop_lib
from dpo_jax.train import offload as offload_lib
from dpo_jax.weights import classifiers


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """Everything a run needs, as plain objects.

  Attributes:
    record: the resolved config as JSON types.
    pinned: what a run that goes on must find as it was: name to JSON types.
    loop_arguments: for loop.run, workdir aside.
    opened: the model at the start; None where the task reads none. Of task
      reward it has no UNet.
    tokenizer: its tokenizers.
    counts: what became of the data's rows.
    held_batches: held-out batches by epoch.
    adapters: what adapters are trained, None where none are.
    validation: what scores a step's pictures, None where nothing does.
    reward: what a run of task reward is made of, None for the others.
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
  adapters: lora.Settings | None = None
  validation: selecting.Validation | None = None
  reward: reward_runs.Parts | None = None


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


def _open_validation(config, opened, task, data, mesh):
  """The judge of each step's pictures, where there is one."""
  if not config.eval.scorer:
    return None
  prompts = selecting.read_prompts(
    config.eval.score_prompts, config.eval.num_score_prompts, data.find_prompts
  )
  ((name, folder),) = scoring.parse(config.eval.scorer).items()
  scorer = scoring.open_scorer(
    name, folder, mesh=mesh, tokenizer=config.eval.scorer_tokenizer
  )
  names = ('sampler', 'num_steps', 'guidance_scale', 'guidance_rescale')
  return selecting.Validation(
    # Between two evaluations its memory is the training's.
    scorer=dataclasses.replace(scorer, params=jax.device_get(scorer.params)),
    prompts=prompts,
    draw=drawing.make_draw(
      opened,
      [one.text for one in prompts],
      np.array([one.seed for one in prompts], np.uint32),
      negatives=[one.negative or '' for one in prompts],
      settings=config.eval,
      side=config.data.resolution,
      seed=config.seed,
      mesh=mesh,
    ),
    settings={name: config.eval[name] for name in names}
    | {'side': config.data.resolution, 'seed': config.seed},
    start=opened.params,
    complete=lambda params: task.complete(params, opened.params),
  )


def _make_options(config):
  """The loop's numbers."""
  return loop_lib.Options(
    seed=config.seed,
    ema_decay=config.optim.ema_decay,
    offload=config.optim.offload,
    warmup_steps=config.optim.warmup_steps,
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
    **from_config.model_options(config),
  )
  if config.data.resolution % opened.model.downscale:
    raise ValueError(
      f'data.resolution={config.data.resolution}: must be a multiple of the '
      f"VAE's downscale factor {opened.model.downscale}"
    )
  if config.task != 'reward':
    opened.model.check_guidance(config.eval.guidance_scale)
    _check_dropout(config, opened.model)
  return opened


def _check_dropout(config, model):
  if config.data.prompt_dropout and not model.text_encoders:
    raise ValueError(
      f'data.prompt_dropout={config.data.prompt_dropout}: this model is '
      'unconditional, there is no prompt to drop; set it to 0'
    )


def _open_generator(config, mesh):
  """The model without its UNet, which a reward does not look at, or None."""
  if not config.model.folder:
    return None
  opened = _open(config, mesh)
  return dataclasses.replace(opened, params={'vae': opened.params['vae']})


def _leave_start(opened, task):
  """(opened, task) whose UNet is on the host where the reference has its own.

  The policy starts as a copy of it, and until the evaluation nobody needs it:
  4 bytes a weight of the devices' memory. Where several processes share its
  parts it stays.
  """
  if 'unet' not in task.params:
    return opened, task
  start = opened.params['unet']
  shared = {id(leaf) for leaf in jax.tree.leaves(start)}
  kept = sum(
    leaf.size for leaf in jax.tree.leaves(task.frozen) if id(leaf) in shared
  )
  if jax.process_count() > 1 or 2 * kept > trees.count(start):
    return opened, task
  whole = all(id(leaf) in shared for leaf in jax.tree.leaves(task.params))
  start = jax.device_get(start)
  params = {'unet': start} if whole else jax.device_get(task.params)
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


def _check_caches(data, opened) -> None:
  """Raises ValueError where latents are of another model than this."""
  if data.cache is not None:
    folders = {
      cached.folder_of(source.records): None
      for source in data.train + data.held
    }
    for folder in folders:
      caching.check_cache(folder, opened)


def _with_ref_errors(config, loader, opened, data):
  """The loader, whose batches then have the reference's errors."""
  errors = ref_errors.open_errors(
    config.model.ref_errors,
    settings=from_config.reference_settings(
      config, opened, data=data.fingerprint, examples=loader.examples
    ),
    rows=config.train.num_steps * config.train.batch_size,
  )
  return ref_errors.WithErrors(
    loader,
    errors,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def _make_loaders(config, data, opened, tokenizer):
  """(endless batches to train on, held-out batches by epoch)."""
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
  if config.model.ref_errors:
    loader = _with_ref_errors(config, loader, opened, data)
  held_batches = datasets.make_held_batches(
    data.held, tokenizer, batch_size=config.eval.batch_size, **sizes
  )
  return loader, held_batches


def build(
  config: ml_collections.ConfigDict,
  *,
  make_task: Callable = from_config.make_task,
) -> Job:
  """Reads model and data and wires a run.

  make_task: what makes the task of a diffusion model, with the arguments of
  from_config.make_task.

  Raises ValueError naming file and reason for bad weights or data, and for
  sizes that do not fit the devices.
  """
  mesh = from_config.make_mesh(config)
  _check_eval_batch(config, sharding.batch_ways(mesh))
  if config.optim.offload:
    offload_lib.check(mesh)
  data = reading.read_data(config)
  counts, opened, reward, tokenizer = data.counts, None, None, _NoTokenizer()
  if config.task == 'classify':
    task = from_config.make_classify(config, data.all_images.style_names, mesh)
  elif config.task == 'reward':
    opened = _open_generator(config, mesh)
    reward = reward_runs.make_parts(
      config, opened, networks=data.train.members.shape[1]
    )
    task = from_config.make_reward(config, reward, opened, mesh)
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
  validation = _open_validation(config, opened, task, data, mesh)
  if data.all_images is not None:
    cut = _count_cut(tokenizer, data.all_images.captions)
    counts = counts | {'captions_cut': cut}
  loader, held_batches = _make_loaders(config, data, opened, tokenizer)
  optimizer, schedule = from_config.make_optimizer(config)
  source = opened and opened.source
  return Job(
    record=limits.validate(config) | {'source': source},
    pinned={
      'source': source or {},
      'data': {'sha256': data.fingerprint},
      **({'scorer': validation.describe()} if validation else {}),
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
    adapters=from_config.lora_settings(config),
    validation=validation,
    reward=reward,
  )


class _NoTokenizer:
  """Stands in where captions are not read (tasks classify and reward)."""

  def encode(self, captions):
    """One zero a caption."""
    return np.zeros((len(captions), 1), np.int32), 0
