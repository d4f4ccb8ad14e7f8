"""What a config says of task, networks, optimizer and mesh, as objects."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from dpo_jax import limits, loading, reward_runs, sharding, trees, types
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax import task as task_lib
from dpo_jax.diffusion import weights
from dpo_jax.models import classifier, lora
from dpo_jax.objectives import registry, wrappers
from dpo_jax.tasks import (
  autoencode,
  classify,
  denoise,
  moving_ref,
  pair_loss,
  preference,
  reference,
)
from dpo_jax.tasks import inputs as inputs_lib
from dpo_jax.train import changes
from dpo_jax.train import optimizer as optimizer_lib
from dpo_jax.train import step as step_lib

# What a reference's errors hang on beside model, data and noise.
_REF_KEYS = (
  'seed',
  'model.dtype',
  'model.residual_dtype',
  'model.ref_dtype',
  'model.param_dtype',
  'objective.liked_share',
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
  stack_layers = _stacks_layers(config, mesh)
  task = _make_task(config, model, params, empty_ids, empty_cond, stack_layers)
  return _over(mesh, task)


def make_reference(
  config: ml_collections.ConfigDict,
  *,
  mesh: jax.sharding.Mesh,
  model: sd_lib.StableDiffusion,
  params: dict[str, types.Params],
  empty_ids: np.ndarray,
  empty_cond: Mapping[str, np.ndarray] | None,
) -> task_lib.Task:
  """As make_task, of the errors of task preference's reference alone.

  A batch goes through the network in the step's microbatches.
  """
  task = preference.make_reference(
    inputs=_make_inputs(config, model, empty_ids, empty_cond),
    params=params,
    loss=make_pair_loss(config),
    options=_preference_options(config, _stacks_layers(config, mesh)),
  )
  loss = step_lib.in_microbatches(task.loss, config.train.accumulate)
  return _over(mesh, dataclasses.replace(task, loss=loss))


def reference_settings(
  config: ml_collections.ConfigDict,
  opened: loading.Opened,
  *,
  data: str,
  examples: int,
) -> dict[str, Any]:
  """What the reference's errors hang on, by key, as JSON types.

  data: the data's fingerprint; examples: how many are trained on. What only
  rounds otherwise (mesh, microbatches, remat, attention) is not in it.
  """
  flat = changes.flatten(limits.validate(config))
  found = {
    key: value
    for key, value in flat.items()
    if key in _REF_KEYS
    or (key.startswith(('data.', 'noise.')) and not key.endswith('path'))
  }
  scheduler = {
    f'model.scheduler.{key}': value
    for key, value in opened.model.scheduler_config.items()
    if not key.startswith('_diffusers')
  }
  weights = {
    f'model.{name}.sha256': trees.digest(params)
    for name, params in opened.params.items()
  }
  total = {'data.sha256': data, 'data.training_examples': examples}
  return json.loads(json.dumps(found | scheduler | weights | total))


def _stacks_layers(config, mesh) -> bool:
  if config.model.stack_layers != 'auto':
    return config.model.stack_layers == 'always'
  # XLA compiles loops for a CPU into slower code, and quickly what has none.
  return mesh.devices.flat[0].platform != 'cpu'


def _make_task(config, model, params, empty_ids, empty_cond, stack_layers):
  if config.task == 'autoencode':
    return autoencode.make_task(
      model=model,
      params=params,
      resolution=config.data.resolution,
      kl_weight=config.vae.kl_weight,
    )
  inputs = _make_inputs(config, model, empty_ids, empty_cond)
  if config.task == 'denoise':
    return denoise.make_task(
      inputs=inputs, params=params, min_snr_gamma=config.denoise.min_snr_gamma
    )
  loss = make_pair_loss(config)
  return preference.make_task(
    inputs=dataclasses.replace(
      inputs, cross=bool(loss.safeguard), last=loss.needs_drift
    ),
    params=params,
    loss=loss,
    options=_preference_options(config, stack_layers),
  )


def _make_inputs(config, model, empty_ids, empty_cond) -> inputs_lib.Inputs:
  timesteps = inputs_lib.choose_timesteps(
    model.schedule.num_steps,
    low=config.noise.t_min,
    high=config.noise.t_max,
    only=tuple(config.noise.timesteps),
  )
  return inputs_lib.Inputs(
    model=model,
    resolution=config.data.resolution,
    empty_ids=empty_ids,
    prompt_dropout=config.data.prompt_dropout,
    dropped_prompt=config.data.dropped_prompt,
    micro_cond=config.data.micro_cond,
    timesteps=timesteps,
    timestep_weights=weights.table(
      model.schedule,
      name=config.noise.weighting,
      gamma=config.noise.min_snr_gamma,
      bins=tuple(config.noise.weights),
      timesteps=timesteps,
    ),
    posterior=config.data.posterior,
    empty_cond=empty_cond,
    sequential=config.train.sequential,
  )


def make_pair_loss(config: ml_collections.ConfigDict) -> pair_loss.PairLoss:
  """The objective of a config, with what is wrapped round it."""
  settings = config.objective
  objective = registry.OBJECTIVES[settings.name]
  if settings.sft_weight:
    objective = wrappers.with_sft(objective, weight=settings.sft_weight)
  return pair_loss.PairLoss(
    objective=objective,
    numbers=dict(settings.numbers),
    reward_beta=settings.reward_beta,
    safeguard=settings.safeguard,
    auto_beta=settings.auto_beta,
    scores=settings.scores,
    score_scale=settings.score_scale,
  )


def lora_settings(config: ml_collections.ConfigDict) -> lora.Settings | None:
  """The adapters that a config asks for, None for none."""
  settings = config.lora
  if not settings.rank:
    return None
  return lora.Settings(
    targets=settings.targets,
    rank=settings.rank,
    alpha=settings.alpha or float(settings.rank),
    dropout=settings.dropout,
    dora=settings.dora,
  )


def _preference_options(config, stack_layers):
  settings = config.objective
  moves = {
    'frozen': None,
    'ema': moving_ref.ema(settings.ref_decay),
    'sync': moving_ref.sync(settings.ref_every),
  }
  return preference.Options(
    trainable=config.optim.trainable,
    adapters=lora_settings(config),
    seed=config.seed,
    precomputed=bool(config.model.ref_errors),
    move_ref=moves[settings.ref_update],
    margin_decay=settings.auto_beta_decay if settings.auto_beta else None,
    liked_share=settings.liked_share,
    compute_errs=reference.choose(
      config.model.ref_path, config.model.dtype, config.model.remat
    ),
    ref_dtype=config.model.ref_dtype,
    param_dtype=jnp.dtype(config.model.param_dtype),
    stack_layers=stack_layers,
  )


def make_classify(
  config: ml_collections.ConfigDict,
  style_names: Sequence[str],
  mesh: jax.sharding.Mesh,
) -> task_lib.Task:
  """The task of a classifier of styles, as make_task."""
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
  task = classify.make_task(
    classifier=module,
    params=params,
    noise=config.classifier.noise,
    gain=config.classifier.gain,
    blur=config.classifier.blur,
    shift=config.classifier.shift,
  )
  return _over(mesh, task)


def make_reward(
  config: ml_collections.ConfigDict,
  parts: reward_runs.Parts,
  opened: loading.Opened | None,
  mesh: jax.sharding.Mesh,
) -> task_lib.Task:
  """The task of a run of rewards, as make_task."""
  return _over(mesh, reward_runs.make_task(config, parts, opened))


def _over(mesh, task):
  """The task with its networks' activations split over the mesh."""
  loss = task.loss
  if isinstance(loss, task_lib.PreparedLoss):
    # It must stay one: else each microbatch casts the weights anew.
    loss = dataclasses.replace(
      loss,
      prepare=sharding.over(mesh, loss.prepare),
      loss=sharding.over(mesh, loss.loss),
    )
  else:
    loss = sharding.over(mesh, loss)
  return dataclasses.replace(
    task,
    loss=loss,
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
    rate_factors=tuple(map(tuple, config.optim.rate_factors)),
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
