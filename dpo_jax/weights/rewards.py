"""An ensemble of rewards as a folder: config.json and model.safetensors."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np

from dpo_jax import trees, types
from dpo_jax.models import reward
from dpo_jax.weights import json_files, safetensors_io

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
SPACES, PLACES = ('pixels', 'latents'), ('x_t', 'x_0_hat')
# What a record has, each of these and nothing else.
RECORD = (
  'clip',
  'labels',
  'model',
  'num_train_timesteps',
  'odds',
  'place',
  'size',
  'space',
)


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
  """What `load` found.

  Attributes:
    config: the shape of every member.
    members: float32 parameters of each network, NumPy arrays.
    record: what the networks were shown, see `save`.
  """

  config: reward.RewardConfig
  members: tuple[types.Params, ...]
  record: dict[str, Any]


def save(
  folder: str | pathlib.Path,
  *,
  config: reward.RewardConfig,
  members: Sequence[types.Params],
  record: Mapping[str, Any],
) -> None:
  """Writes the folder; tensors are named by member and path, `000/logit/bias`.

  record: JSON types by the names of RECORD.
    space: 'pixels' or 'latents', and `size` [H, W] of the input in its units.
    place: 'x_t' (kind `time`) or 'x_0_hat'.
    model: source of the generator, null where its latents were not looked at.
    num_train_timesteps: of its schedule; null with `model` null.
    clip: of kind `features` {'name', 'sha256'} of the image tower that the
      networks stand on, else null; may be left out.
    odds: [K] benign to malign labels of each network, weights counted; null
      where they were learnt from as pairs; may be left out.
    labels: {'benign': n, 'malign': m}, how many were learnt from.

  Raises ValueError naming the folder, and the option or the tensor that is
  wrong: one of a member that the config does not have, or lacks, and NaN.
  Nothing is written then.
  """
  folder = pathlib.Path(folder)
  if not members:
    raise ValueError(f'{folder}: members is empty; give one network or more')
  record = _check_record(folder / CONFIG, config, record, len(members))
  tensors = {
    f'{k:03d}/{trees.leaf_name(path)}': np.asarray(leaf, np.float32)
    for k, params in enumerate(members)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  _check_shapes(folder / WEIGHTS, config, len(members), tensors)
  folder.mkdir(parents=True, exist_ok=True)
  safetensors_io.save(folder / WEIGHTS, tensors)
  values = dataclasses.asdict(config)
  json_files.write(
    folder / CONFIG, values | {'members': len(members), 'record': record}
  )


def load(folder: str | pathlib.Path) -> Loaded:
  """Reads what `save` wrote.

  Raises ValueError naming the file, and the option that is missing or unknown
  or the tensor that is missing, left over, misshapen, no float, or has NaN.
  """
  folder = pathlib.Path(folder)
  path = folder / CONFIG
  values = json_files.read(path)
  count, record = values.pop('members', None), values.pop('record', None)
  if not isinstance(count, int) or isinstance(count, bool) or count < 1:
    raise ValueError(f'{path}: members={count!r}: must be 1 or more networks')
  missing = [
    field.name
    for field in dataclasses.fields(reward.RewardConfig)
    if field.name not in values
  ]
  if missing:
    raise ValueError(f'{path}: has no {", ".join(missing)}; export it again')
  try:
    config = reward.RewardConfig.from_dict(values)
  except (ValueError, TypeError) as error:
    raise ValueError(f'{path}: {error}') from error
  record = _check_record(path, config, record, count)
  tensors = safetensors_io.load(folder / WEIGHTS)
  for name, tensor in tensors.items():
    if tensor.dtype.kind in 'iub':
      raise ValueError(
        f'{folder / WEIGHTS}: tensor {name!r} is {tensor.dtype}, should be a '
        'float'
      )
  _check_shapes(folder / WEIGHTS, config, count, tensors)
  found = flax.traverse_util.unflatten_dict(
    {name: np.asarray(leaf, np.float32) for name, leaf in tensors.items()},
    sep='/',
  )
  return Loaded(config, tuple(found[f'{k:03d}'] for k in range(count)), record)


def init_shapes(config: reward.RewardConfig) -> types.PyTree:
  """Shapes of one network's parameters."""
  side = 2 ** len(config.widths)
  sides = () if config.kind == 'features' else (side, side)
  return jax.eval_shape(
    reward.Reward(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, *sides, config.in_channels), np.float32),
    jax.ShapeDtypeStruct((1,), np.int32),
  )['params']


def _check_record(path, config, record, count) -> dict[str, Any]:
  """The record as JSON gives it back; ValueError names what is wrong in it."""
  given = sorted(record) if isinstance(record, Mapping) else record
  if isinstance(record, Mapping):
    record = {'clip': None, 'odds': None} | dict(record)
  if not isinstance(record, Mapping) or sorted(record) != list(RECORD):
    raise ValueError(
      f'{path}: record has {given}; should have {", ".join(RECORD)}'
    )
  place = 'x_t' if config.kind == 'time' else 'x_0_hat'
  allowed = {'space': SPACES, 'place': (place,)}
  for name, choices in allowed.items():
    if record[name] not in choices:
      raise ValueError(
        f'{path}: record.{name}={record[name]!r}: with kind={config.kind} '
        f'allowed are {", ".join(choices)}'
      )
  clip = record['clip']
  named = isinstance(clip, Mapping) and sorted(clip) == ['name', 'sha256']
  if not (named if config.kind == 'features' else clip is None):
    raise ValueError(
      f'{path}: record.clip={clip!r}: should be name and sha256 of a CLIP with '
      'kind=features, and null with others'
    )
  size = record['size']
  if (
    not isinstance(size, list | tuple)
    or len(size) != 2
    or not all(isinstance(side, int) and side > 0 for side in size)
  ):
    raise ValueError(f'{path}: record.size={size!r}: should be [height, width]')
  odds = record['odds']
  if odds is not None and not (
    isinstance(odds, list | tuple)
    and len(odds) == count
    and all(isinstance(one, int | float) and one > 0 for one in odds)
  ):
    raise ValueError(
      f'{path}: record.odds={odds!r}: should be {count} numbers above 0, or '
      'null'
    )
  return json.loads(json.dumps(record))


def _check_shapes(path, config, count, tensors) -> None:
  """Raises ValueError unless the tensors are those of `count` networks."""
  one = {
    trees.leaf_name(place): tuple(leaf.shape)
    for place, leaf in jax.tree_util.tree_leaves_with_path(init_shapes(config))
  }
  wanted = {
    f'{k:03d}/{name}': shape
    for k in range(count)
    for name, shape in one.items()
  }
  safetensors_io.check_shapes(path, tensors, wanted)
