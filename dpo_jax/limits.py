"""What a config may hold: choices, ranges, and all problems at once."""

import functools
import json
import math
import pathlib
from typing import Any

import ml_collections

from dpo_jax import objective_limits, reward_limits, scoring
from dpo_jax.data import labels
from dpo_jax.diffusion import samplers, weights
from dpo_jax.evaluate import prompts
from dpo_jax.models import attention, unet
from dpo_jax.models import reward as reward_lib
from dpo_jax.objectives import registry
from dpo_jax.tasks import inputs as inputs_lib
from dpo_jax.tasks import moving_ref, preference, reference
from dpo_jax.tasks import reward as reward_task
from dpo_jax.train import optimizer as optimizer_lib
from dpo_jax.weights import diffusers_maps, released, rewards, sources

TASKS = ('preference', 'denoise', 'autoencode', 'classify', 'reward')
COMPONENTS = tuple(diffusers_maps.COMPONENTS)
CHOICES = {
  'task': TASKS,
  'model.dtype': ('float32', 'bfloat16'),
  'model.remat': unet.REMAT,
  'model.attention': attention.BACKENDS,
  'model.residual_dtype': ('', 'float32'),
  'model.stack_layers': ('auto', 'always', 'never'),
  'model.ref_path': reference.CHOICES,
  'model.ref_dtype': preference.REF_DTYPES,
  'model.param_dtype': preference.STORED_DTYPES,
  'model.variant': ('', 'fp16'),
  'model.prediction_type': ('', *released.PREDICTION_TYPES),
  'data.dropped_prompt': inputs_lib.DROPPED_PROMPTS,
  'data.micro_cond': inputs_lib.MICRO_CONDS,
  'data.posterior': inputs_lib.POSTERIORS,
  'objective.name': tuple(registry.OBJECTIVES),
  'objective.ref_update': moving_ref.KINDS,
  'noise.weighting': weights.NAMES,
  'reward.kind': reward_lib.KINDS,
  'reward.space': rewards.SPACES,
  'reward.loss': reward_task.LOSSES,
  'reward.variant': labels.VARIANTS,
  'optim.name': optimizer_lib.OPTIMIZERS,
  'optim.mu_dtype': optimizer_lib.MU_DTYPES,
  'optim.schedule': optimizer_lib.SCHEDULES,
  'eval.sampler': samplers.SAMPLERS,
  'export.dtype': tuple(diffusers_maps.DTYPES),
  'export.select': ('auto', 'last', 'best'),
}
# Inclusive lower and exclusive upper bounds.
RANGES = {
  'seed': (0, 2**31),
  'data.holdout': (0, 1),
  'data.resolution': (1, math.inf),
  'data.prompt_dropout': (0, 1),
  'noise.t_min': (0, math.inf),
  'noise.t_max': (0, math.inf),
  'noise.min_snr_gamma': (1e-6, math.inf),
  'data.label_noise': (0, 1.000001),
  'data.min_agree': (0, math.inf),
  'data.per_caption': (0, math.inf),
  'objective.reward_beta': (0, math.inf),
  'objective.safeguard': (0, 1),
  'objective.sft_weight': (0, math.inf),
  'objective.auto_beta': (0, math.inf),
  'objective.auto_beta_decay': (0, 1),
  'objective.score_scale': (1e-9, math.inf),
  'objective.liked_share': (0, 1),
  'objective.ref_decay': (0, 1),
  'objective.ref_every': (1, math.inf),
  'lora.rank': (0, math.inf),
  'lora.alpha': (0, math.inf),
  'lora.dropout': (0, 1),
  'denoise.min_snr_gamma': (0, math.inf),
  'vae.kl_weight': (0, math.inf),
  'classifier.noise': (0, math.inf),
  'classifier.gain': (0, math.inf),
  'classifier.blur': (0, 1),
  'classifier.shift': (0, math.inf),
  'reward.networks': (1, 1000),
  'reward.per_class': (0, math.inf),
  'reward.benign_weight': (1e-9, math.inf),
  'reward.depth': (1, math.inf),
  'reward.num_heads': (1, math.inf),
  'reward.norm_num_groups': (1, math.inf),
  'reward.copies': (1, math.inf),
  'reward.rotation': (0, 180.001),
  'reward.crop': (0, 1),
  'reward.colour': (0, 1),
  'optim.lr': (0, math.inf),
  'optim.warmup_steps': (0, math.inf),
  'optim.decay_steps': (0, math.inf),
  'optim.b1': (0, 1),
  'optim.b2': (0, 1),
  'optim.eps': (0, math.inf),
  'optim.weight_decay': (0, math.inf),
  'optim.clip_norm': (0, math.inf),
  'optim.ema_decay': (0, 1),
  'train.num_steps': (1, math.inf),
  'train.batch_size': (1, math.inf),
  'train.accumulate': (1, math.inf),
  'train.log_every': (1, math.inf),
  'train.eval_every': (0, math.inf),
  'train.checkpoint_every': (1, math.inf),
  'train.keep': (1, math.inf),
  'train.profile_from': (0, math.inf),
  'train.profile_steps': (1, math.inf),
  'mesh.tensor': (1, math.inf),
  'mesh.dcn_data': (1, math.inf),
  'eval.num_prompts': (1, math.inf),
  'eval.images_per_prompt': (1, math.inf),
  'eval.num_steps': (1, math.inf),
  'eval.guidance_scale': (0, math.inf),
  'eval.guidance_rescale': (0, 1.000001),
  'eval.batch_size': (1, math.inf),
  'eval.num_draws': (1, math.inf),
  'eval.num_pairs': (0, math.inf),
  'eval.num_score_prompts': (1, math.inf),
}


def _leaf(config: ml_collections.ConfigDict, key: str) -> Any:
  return functools.reduce(lambda node, name: node[name], key.split('.'), config)


def validate(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as JSON types; touches no device and reads no data.

  Raises ValueError with every problem found, each naming its key.
  """
  problems = []
  for key, allowed in CHOICES.items():
    if _leaf(config, key) not in allowed:
      shown = ', '.join(choice or "''" for choice in allowed)
      problems.append(f'{key}={_leaf(config, key)!r}: allowed are {shown}')
  for key, (low, high) in RANGES.items():
    value = _leaf(config, key)
    if not low <= value < high:
      top = '' if high == math.inf else f' and below {high}'
      problems.append(f'{key}={value!r}: must be at least {low}{top}')
  problems += registry.check_numbers(
    config.objective.name, config.objective.numbers
  )
  problems += _check_sources(config)
  problems += _check_ignored(config)
  problems += _check_scorer(config)
  if config.task == 'preference':
    problems += objective_limits.check(config)
  problems += reward_limits.check(config)
  if config.train.checkpoint_every % config.train.log_every:
    problems.append(
      f'train.checkpoint_every={config.train.checkpoint_every}: must be a '
      f'multiple of train.log_every={config.train.log_every}'
    )
  if problems:
    raise ValueError('; '.join(problems))
  return json.loads(config.to_json_best_effort())


def _check_ignored(config) -> list[str]:
  """A setting that would do nothing is an error."""
  # Key: (what asks for nothing, the key that decides, its values of use).
  preference_only = 'task', ('preference',)
  users = {
    'model.ref_path': ('auto', *preference_only),
    'model.ref_dtype': ('auto', *preference_only),
    'model.stack_layers': ('auto', *preference_only),
    'model.param_dtype': ('float32', *preference_only),
    'train.sequential': (False, *preference_only),
    'model.ref_errors': ('', *preference_only),
    'data.label_noise': (0.0, *preference_only),
    'data.winner': ('', *preference_only),
    'data.consensus': ((), *preference_only),
    'noise.weighting': ('uniform', *preference_only),
    'lora.rank': (0, *preference_only),
    'optim.trainable': ('', *preference_only),
    'noise.weights': ((), 'noise.weighting', ('bins',)),
    'objective.scores': ('', 'objective.name', ('soft', 'smpo')),
    'objective.liked_share': (0.0, 'objective.name', ('kto',)),
    'optim.mu_dtype': ('float32', 'optim.name', ('adamw',)),
    'optim.parameter_scale': (False, 'optim.name', ('adafactor',)),
    'model.residual_dtype': ('', 'model.dtype', ('bfloat16',)),
  }
  return [
    f'{key}={_leaf(config, key)!r}: is for {other}={", ".join(allowed)}; leave '
    f'it at {default!r} with {other}={_leaf(config, other)}'
    for key, (default, other, allowed) in users.items()
    if _leaf(config, key) != default and _leaf(config, other) not in allowed
  ]


def _check_scorer(config) -> list[str]:
  """Of eval.scorer and of what is for it alone."""
  settings = config.eval
  if not settings.scorer:
    problems = [
      f'eval.{name}={settings[name]!r}: is for eval.scorer, which is empty; '
      'name a judge, or leave it out'
      for name in ('scorer_tokenizer', 'score_prompts')
      if settings[name]
    ]
    if config.export.select == 'best':
      problems.append(
        "export.select='best': needs eval.scorer=NAME=FOLDER, which is empty; "
        "name a judge, or export the 'last' step"
      )
    return problems
  given, problems = f'eval.scorer={settings.scorer!r}', []
  try:
    judges = scoring.parse(settings.scorer)
  except ValueError as error:
    judges = {}
    problems.append(f'eval.scorer: {error}')
  if len(judges) > 1:
    problems.append(f'{given}: names {len(judges)} judges; give one')
  for name, folder in judges.items():
    if name in scoring.IN_PARTS:
      folder = folder.rpartition(':')[0] or folder
    if not pathlib.Path(folder).exists():
      problems.append(f'{given}: there is no {folder}; name its weights')
    if settings.scorer_tokenizer and name in scoring.WITHOUT_TOKENIZER:
      problems.append(
        f'eval.scorer_tokenizer={settings.scorer_tokenizer!r}: {name} takes '
        'none; leave it out'
      )
  if config.task not in ('preference', 'denoise'):
    problems.append(
      f'{given}: judges pictures of prompts, which task={config.task} does not '
      'draw; leave it out'
    )
  if not config.train.eval_every:
    problems.append(
      f'{given}: scores every train.eval_every steps, which is 0 (never); set '
      'it, or leave out the judge'
    )
  for name in ('scorer_tokenizer', 'score_prompts'):
    if settings[name] and not pathlib.Path(settings[name]).exists():
      problems.append(f'eval.{name}={settings[name]!r}: is not there')
  suffix = pathlib.Path(settings.score_prompts).suffix.lower()
  if settings.score_prompts and suffix not in prompts.SUFFIXES:
    problems.append(
      f'eval.score_prompts={settings.score_prompts!r}: must end in '
      + ', '.join(prompts.SUFFIXES)
    )
  return problems


def _check_sources(config) -> list[str]:
  problems = []
  unknown = set(config.model.random_init) - set(COMPONENTS)
  if unknown:
    problems.append(
      f'model.random_init={sorted(unknown)}: allowed are '
      + ', '.join(COMPONENTS)
    )
  if not config.data.path:
    problems.append(
      'data.path is empty: name parquet files of pairs or a prepared folder'
      if config.task != 'reward'
      else 'data.path is empty: name the labels, a folder that python -m '
      'dpo_jax.tools.judge --export wrote'
    )
  # Of task reward reward_limits says whether it needs a model.
  if config.task != 'classify' and (
    config.model.folder or config.task != 'reward'
  ):
    if not config.model.folder:
      problems.append(
        'model.folder is empty: name a Stable Diffusion model (a diffusers '
        'folder, a gs:// path, a hub id, or a single file)'
      )
    else:
      problems += _check_local(config.model.folder)
  if config.eval.judge and not pathlib.Path(config.eval.judge).is_dir():
    problems.append(f'eval.judge={config.eval.judge!r}: no such folder')
  return problems


def _check_local(name: str) -> list[str]:
  """What is no path here must look like one elsewhere."""
  if pathlib.Path(name).expanduser().exists() or sources.is_remote(name):
    return []
  return [
    f'model.folder={name!r}: no such folder; give a Stable Diffusion model in '
    'the diffusers layout, a gs:// path, a hub id (org/name) or a single '
    '.safetensors file'
  ]
