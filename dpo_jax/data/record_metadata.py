"""features.json and dataset_info.json of a prepared data set.

tensorflow-datasets would import whatever module features.json names and read
whatever path dataset_info.json spells. So both are read here first, and
anything that this package would not have written is refused.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dpo_jax.data import record_fields

VERSION = '1.0.0'
FORMAT = 'array_record'
MAX_SHARDS = 100_000
# A name in a file's name, so nothing that could lead elsewhere.
SPLIT = re.compile(r'[a-z][a-z0-9_]{0,39}')
_TEMPLATE = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
_CLASSES = 'tensorflow_datasets.core.features.'
_TEXT = f'{_CLASSES}text_feature.Text'
_TENSOR = f'{_CLASSES}tensor_feature.Tensor'
_DICT = f'{_CLASSES}features_dict.FeaturesDict'
_MAX_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Metadata:
  """What the two files say; `splits` maps a name to its shards' lengths."""

  fields: record_fields.Fields
  splits: dict[str, tuple[int, ...]]


def data_folder(root: pathlib.Path, kind: str) -> pathlib.Path:
  """Where a prepared folder keeps the data set of this kind."""
  return root / kind / VERSION


def shard_name(kind: str, split: str, index: int, count: int) -> str:
  """A shard's file name, as tensorflow-datasets has it."""
  return f'{kind}-{split}.{FORMAT}-{index:05d}-of-{count:05d}'


def to_features(
  fields: record_fields.Fields,
) -> tfds.features.FeaturesDict:
  """The fields as tensorflow-datasets declares them."""
  return tfds.features.FeaturesDict(
    {
      name: tfds.features.Text()
      if field.dtype == 'bytes'
      else tfds.features.Tensor(
        shape=field.shape,
        dtype=np.dtype(field.dtype).type,
        encoding='bytes' if field.packed else 'none',
      )
      for name, field in fields.items()
    }
  )


def to_fields(features: Mapping[str, Any]) -> record_fields.Fields:
  """The fields of tensorflow-datasets' features; fields stay as they are."""
  return {name: _to_field(feature) for name, feature in features.items()}


def _to_field(feature: Any) -> record_fields.Field:
  if isinstance(feature, record_fields.Field):
    return feature
  if isinstance(feature, tfds.features.Text):
    return record_fields.Field('bytes')
  return record_fields.Field(feature.np_dtype.__name__, tuple(feature.shape))


def write(
  folder: pathlib.Path,
  fields: record_fields.Fields,
  splits: Mapping[str, Sequence[int]],
  *,
  description: str = '',
) -> None:
  """Writes both files beside the shards in `folder` (.../KIND/1.0.0).

  `splits` maps a split to its shards' lengths. Equal data make equal bytes.
  """
  kind = folder.parent.name
  infos = []
  for split, lengths in splits.items():
    paths = [
      folder / shard_name(kind, split, i, len(lengths))
      for i in range(len(lengths))
    ]
    template = tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=kind, split=split, filetype_suffix=FORMAT
    )
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=list(lengths),
        num_bytes=sum(path.stat().st_size for path in paths),
        filename_template=template,
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=to_features(fields),
    split_infos=infos,
    version=VERSION,
    # That check would read with TensorFlow.
    check_data=False,
    description=description or f'{kind} prepared by dpo_jax',
  )


def read(root: pathlib.Path, kind: str) -> Metadata:
  """The metadata of a prepared folder, which is not trusted.

  Raises ValueError naming the file for anything but what `write` writes.
  """
  folder = data_folder(root, kind)
  if not folder.is_dir():
    raise ValueError(
      f'{root}: no data set {kind!r} there (no folder {kind}/{VERSION}); name '
      'a folder that python -m dpo_jax.tools.prepare wrote'
    )
  if folder.is_symlink() or folder.parent.is_symlink():
    raise ValueError(f'{folder}: is a link; only {root} itself may be one')
  path = folder / 'features.json'
  given = _read_json(path)
  try:
    fields = _parse_features(given)
    record_fields.check(kind, fields)
  except ValueError as error:
    raise ValueError(_refusal(path, error)) from error
  path = folder / 'dataset_info.json'
  given = _read_json(path)
  try:
    splits = _parse_info(given, kind)
  except ValueError as error:
    raise ValueError(_refusal(path, error)) from error
  return Metadata(fields, splits)


def _refusal(path: pathlib.Path, error: ValueError) -> str:
  reason = str(error)
  if len(reason) > 300:
    reason = f'{reason[:300]} ...'
  return (
    f'{path}: {reason}; this folder is not read: it is not as dpo_jax.tools.'
    'prepare writes it'
  )


def _read_json(path: pathlib.Path) -> Any:
  """The parsed file; ValueError if it is missing, huge, or not JSON."""
  try:
    # A pipe would never end.
    if path.is_symlink() or not path.is_file():
      raise ValueError('it is no plain file')
    if path.stat().st_size > _MAX_BYTES:
      raise ValueError(f'larger than {_MAX_BYTES} bytes')
    return json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    reason = ' '.join(str(error).split())
    raise ValueError(
      f'{path}: cannot be read as JSON: {reason}; prepare the folder again'
    ) from error


def _take(given: Any, what: str, *, allowed: Sequence[str]) -> dict:
  """`given` as an object without other keys than those allowed."""
  if not isinstance(given, dict):
    raise ValueError(f'{what} is no JSON object')
  for key in given:
    if key not in allowed:
      raise ValueError(f'{what} has the unknown entry {key!a}')
  return given


def _parse_features(given: Any) -> record_fields.Fields:
  top = _take(given, 'it', allowed=('featuresDict', 'pythonClassName'))
  if top.get('pythonClassName', _DICT) != _DICT:
    raise ValueError(f'it names the class {top["pythonClassName"]!a}')
  inner = _take(top.get('featuresDict'), 'featuresDict', allowed=('features',))
  features = inner.get('features')
  if not isinstance(features, dict) or len(features) > 1000:
    raise ValueError('featuresDict lists no features')
  return {
    name: _parse_feature(f'feature {name!a}', feature)
    for name, feature in features.items()
  }


def _parse_feature(what: str, given: Any) -> record_fields.Field:
  """The field of one feature; only texts and plain tensors are known."""
  given = _take(
    given, what, allowed=('pythonClassName', 'text', 'tensor', 'description')
  )
  name = given.get('pythonClassName')
  if name == _TEXT and 'tensor' not in given:
    _take(given.get('text', {}), f'{what}, text,', allowed=())
    return record_fields.Field('bytes')
  if name != _TENSOR or 'text' in given:
    raise ValueError(f'{what} names the class {name!a}')
  tensor = _take(
    given.get('tensor'),
    f'{what}, tensor,',
    allowed=('shape', 'dtype', 'encoding'),
  )
  shape = _take(
    tensor.get('shape', {}), f'{what}, shape,', allowed=('dimensions',)
  )
  dimensions = shape.get('dimensions', [])
  if not isinstance(dimensions, list) or len(dimensions) > 8:
    raise ValueError(f'{what} has the shape {dimensions!a:.80}')
  dtype = tensor.get('dtype')
  if dtype not in ('uint64', 'int32', 'float32', 'float16'):
    raise ValueError(f'{what} has the dtype {dtype!a:.80}')
  field = record_fields.Field(dtype, tuple(map(_count, dimensions)))
  if tensor.get('encoding', 'none') != ('bytes' if field.packed else 'none'):
    raise ValueError(f'{what} has the encoding {tensor["encoding"]!a:.80}')
  return field


def _count(given: Any) -> int:
  """A number 0 or more; protobuf's JSON writes 64 bits as text."""
  if isinstance(given, str) and re.fullmatch(r'\d{1,18}', given, re.ASCII):
    return int(given)
  if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
    return given
  raise ValueError(f'{given!a:.80} is no count')


def _parse_info(given: Any, kind: str) -> dict[str, tuple[int, ...]]:
  """The splits of dataset_info.json."""
  info = _take(
    given,
    'it',
    allowed=(
      'name',
      'version',
      'description',
      'fileFormat',
      'splits',
      'releaseNotes',
      'citation',
      'downloadSize',
    ),
  )
  wanted = {'name': kind, 'version': VERSION, 'fileFormat': FORMAT}
  for key, value in wanted.items():
    if info.get(key) != value:
      raise ValueError(f'{key} is {info.get(key)!a:.80}, not {value!r}')
  listed = info.get('splits')
  if not isinstance(listed, list) or not listed:
    raise ValueError('it lists no splits')
  splits = {}
  for split in listed:
    split = _take(
      split,
      'a split',
      allowed=('name', 'shardLengths', 'numBytes', 'filepathTemplate'),
    )
    name, template = split.get('name'), split.get('filepathTemplate')
    if not isinstance(name, str) or not SPLIT.fullmatch(name):
      raise ValueError(f'a split is named {name!a:.80}')
    if template != _TEMPLATE or name in splits:
      raise ValueError(f'split {name} lies at {template!a:.80}')
    lengths = split.get('shardLengths')
    if not isinstance(lengths, list) or not 0 < len(lengths) <= MAX_SHARDS:
      raise ValueError(f'split {name} lists no shards')
    splits[name] = tuple(map(_count, lengths))
    if sum(splits[name]) > 1 << 40:
      raise ValueError(f'split {name} has impossible shard lengths')
  return splits
