"""Which options of task reward go together."""

import ml_collections

from dpo_jax.models import reward

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
# What config.reward holds where no reward is trained.
DEFAULTS = {
  'kind': 'clean',
  'clip': '',
  'space': 'pixels',
  'variant': 'ensemble',
  'networks': 5,
  'per_class': 0,
  'loss': 'bce',
  'benign_weight': 1.0,
  'widths': (32, 64, 128),
  'depth': 1,
  'num_heads': 4,
  'norm_num_groups': 8,
  'copies': 1,
  'rotation': 0.0,
  'crop': 0.0,
  'colour': 0.0,
}


def check(config: ml_collections.ConfigDict) -> list[str]:
  """What is wrong, one line a problem, each naming its key."""
  if config.task != 'reward':
    return [
      f'reward.{name}={config.reward[name]!r}: is for task=reward; leave it at '
      f'{default!r} with task={config.task}'
      for name, default in DEFAULTS.items()
      if config.reward[name] != default
    ]
  return (
    _check_ignored(config)
    + _check_networks(config)
    + _check_features(config)
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
  if settings.kind in ('clean', 'features') and settings.num_heads != 4:
    problems.append(
      f'reward.num_heads={settings.num_heads}: is for reward.kind=time; leave '
      f'it at 4 with {settings.kind}'
    )
  if settings.kind in reward.KINDS:
    try:
      make_shape(config, 1)
    except ValueError as error:
      problems.append(str(error))
  return problems


def _check_features(config) -> list[str]:
  """Of kind `features`, a head on CLIP, and of none but it."""
  settings = config.reward
  if settings.kind != 'features':
    if settings.clip:
      return [
        f'reward.clip={settings.clip}: is for reward.kind=features; leave it '
        f'empty with {settings.kind}'
      ]
    return []
  problems = []
  if not settings.clip:
    problems.append(
      'reward.clip is empty: reward.kind=features stands on the pictures that '
      'CLIP embeds; name the folder of one'
    )
  if config.model.folder:
    problems.append(
      f'model.folder={config.model.folder!r}: reward.kind=features looks at no '
      'generator; leave it empty'
    )
  if settings.space != 'pixels':
    problems.append(
      f'reward.space={settings.space!r}: CLIP looks at pixels; set it to '
      "'pixels' with reward.kind=features"
    )
  if len(settings.widths) != 1:
    problems.append(
      f'reward.widths={tuple(settings.widths)}: reward.kind=features has one '
      'hidden layer; give one width'
    )
  for name, default in (('depth', 1), ('norm_num_groups', 8)):
    if settings[name] != default:
      problems.append(
        f'reward.{name}={settings[name]}: is for networks of blocks; leave it '
        f'at {default} with reward.kind=features'
      )
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
