"""Which options of task reward go together."""

import ml_collections

from dpo_jax.models import reward

# What trains: CLIP's features of a picture are not computed by the task.
KINDS = ('time', 'clean')
# Key: (its value where it asks for nothing, why it would do nothing).
_IGNORED = {
  'noise.t_min': (0, 'timesteps are drawn from all of the schedule'),
  'noise.t_max': (0, 'timesteps are drawn from all of the schedule'),
  'noise.timesteps': ((), 'timesteps are drawn from all of the schedule'),
  'data.weights': ((), 'files of labels are put together, not mixed'),
  'data.posterior': ('sample', 'latents are a sample of the posterior'),
  'eval.judge': ('', 'no pictures are drawn'),
  'eval.preferred': ('', 'no pictures are drawn'),
  'eval.retrieval': (False, 'no pictures are drawn'),
  'export.dtype': ('float32', 'rewards are exported in float32'),
}


def check(config: ml_collections.ConfigDict) -> list[str]:
  """What is wrong, one line a problem, each naming its key."""
  return (
    _check_ignored(config)
    + _check_networks(config)
    + _check_copies(config.reward)
  )


def needs_model(config: ml_collections.ConfigDict) -> bool:
  """Whether a generator's schedule or latents are looked at."""
  return config.reward.kind == 'time' or config.reward.space == 'latents'


def make_shape(
  config: ml_collections.ConfigDict, in_channels: int
) -> reward.RewardConfig:
  """The shape of the networks; ValueError naming the option."""
  settings = config.reward
  try:
    return reward.RewardConfig(
      kind=settings.kind,
      in_channels=in_channels,
      widths=tuple(settings.widths),
      depth=settings.depth,
      num_heads=settings.num_heads,
      norm_num_groups=settings.norm_num_groups,
    )
  except ValueError as error:
    raise ValueError(f'reward.{error}') from error


def _check_ignored(config) -> list[str]:
  problems = []
  for key, (default, why) in _IGNORED.items():
    section, name = key.split('.')
    if config[section][name] != default:
      problems.append(
        f'{key}={config[section][name]!r}: with task=reward {why}; leave it at '
        f'{default!r}'
      )
  return problems


def _check_networks(config) -> list[str]:
  settings, problems = config.reward, []
  if needs_model(config) and not config.model.folder:
    reason = 'kind=time' if settings.kind == 'time' else 'space=latents'
    problems.append(
      f'model.folder is empty: a reward of reward.{reason} looks at what its '
      'generator makes; name that'
    )
  if settings.variant == 'single' and settings.networks != 1:
    problems.append(
      f'reward.networks={settings.networks}: reward.variant=single trains one; '
      'set it to 1'
    )
  if settings.loss == 'pairwise' and settings.benign_weight != 1.0:
    problems.append(
      f'reward.benign_weight={settings.benign_weight}: is for reward.loss=bce; '
      'set it to 1.0 with pairwise'
    )
  if settings.kind == 'clean' and settings.num_heads != 4:
    problems.append(
      f'reward.num_heads={settings.num_heads}: is for reward.kind=time; leave '
      'it at 4 with clean'
    )
  if settings.kind in KINDS:
    try:
      make_shape(config, 1)
    except ValueError as error:
      problems.append(str(error))
  return problems


def _check_copies(settings) -> list[str]:
  changes = {name: settings[name] for name in ('rotation', 'crop', 'colour')}
  used = {name: value for name, value in changes.items() if value}
  if settings.copies == 1:
    return [
      f'reward.{name}={value}: changes copies, of which there are none with '
      'reward.copies=1; ask for more, or set it to 0'
      for name, value in used.items()
    ]
  if not used:
    return [
      f'reward.copies={settings.copies}: they are all equal with rotation, '
      'crop and colour at 0; set one of them, or copies to 1'
    ]
  return []
