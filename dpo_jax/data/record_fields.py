"""What a record of a prepared data set holds, and its bytes.

A record is a tf.train.Example, as tensorflow-datasets writes it, made without
TensorFlow. Of the same values the bytes are always the same.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

KINDS = ('pairs', 'likes', 'captions')
Value = np.ndarray | np.generic | bytes | int | float
Record = dict[str, np.ndarray | np.generic | bytes]

_SCORE = re.compile(r'score_[a-z0-9_]{1,60}')
# A shape out of a folder that is not trusted makes no larger array than this.
_MAX_ITEMS = 1 << 28
_INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True)
class Field:
  """One entry of a record; `dtype` is a NumPy name, or 'bytes'."""

  dtype: str
  shape: tuple[int, ...] = ()

  @property
  def packed(self) -> bool:
    """Whether the array is stored as its bytes; a list of numbers is not."""
    return self.dtype == 'float16'


@dataclasses.dataclass(frozen=True)
class CacheShapes:
  """Shapes of what is computed once: moments [flips h w 2c], text states.

  `input_ids` [k s] of k tokenizers, `prompt_embeds` [s d], `pooled_embeds` [e]
  (None where the model has none).
  """

  moments: tuple[int, int, int, int]
  input_ids: tuple[int, int] | None = None
  prompt_embeds: tuple[int, int] | None = None
  pooled_embeds: tuple[int] | None = None


Fields = dict[str, Field]
_TEXT = Field('bytes')
_ID = Field('uint64')
_COMMON = {'id': _ID, 'caption': _TEXT, 'caption_id': _ID, 'source': _TEXT}
_PAIR = _COMMON | {
  'image_0': _TEXT,
  'image_1': _TEXT,
  'sizes': Field('int32', (2, 4)),
  'generator_0': _TEXT,
  'generator_1': _TEXT,
  'label': Field('float32'),
}
_LIKE = _COMMON | {
  'image': _TEXT,
  'size': Field('int32', (4,)),
  'generator': _TEXT,
  'liked': Field('float32'),
}
_CAPTION = {'caption_id': _ID, 'caption': _TEXT}
_BARE = {'pairs': _PAIR, 'likes': _LIKE, 'captions': _CAPTION}


def fields(
  kind: str, *, cache: CacheShapes | None = None, scores: Sequence[str] = ()
) -> Fields:
  """The fields of a kind of record.

  `scores` are names of columns score_NAME, float32 [2] for pairs and a number
  for likes. Raises ValueError for another kind, name or a missing shape.
  """
  if kind not in KINDS:
    raise ValueError(f'kind {kind!r}: must be one of {", ".join(KINDS)}')
  found = dict(_BARE[kind])
  sides = (2,) if kind == 'pairs' else ()
  for name in scores:
    if not _SCORE.fullmatch(name) or kind == 'captions':
      raise ValueError(f'{name!r} of {kind}: must be like score_pickscore')
    found[name] = Field('float32', sides)
  if cache and kind != 'captions':
    found['moments'] = Field('float16', (*sides, *cache.moments))
  elif kind == 'captions':
    if not cache or not cache.input_ids or not cache.prompt_embeds:
      raise ValueError('captions need the shapes of the text states')
    found['input_ids'] = Field('int32', cache.input_ids)
    found['prompt_embeds'] = Field('float16', cache.prompt_embeds)
    if cache.pooled_embeds:
      found['pooled_embeds'] = Field('float16', cache.pooled_embeds)
  return found


def check(kind: str, given: Fields) -> None:
  """Raises ValueError unless `given` could have come from `fields(kind)`."""
  for name, field in given.items():
    if any(n < 1 for n in field.shape) or math.prod(field.shape) > _MAX_ITEMS:
      raise ValueError(f'{name} has the shape {list(field.shape)}')
  moments = given.get('moments', Field('')).shape
  shapes = {
    name: given[name].shape
    for name in ('input_ids', 'prompt_embeds', 'pooled_embeds')
    if name in given
  }
  cache = CacheShapes(
    # The axis of the two images is added by fields().
    moments[1:] if kind == 'pairs' else moments,
    **shapes,
  )
  scores = [name for name in given if _SCORE.fullmatch(name)]
  wanted = fields(
    kind,
    cache=cache if kind == 'captions' or 'moments' in given else None,
    scores=scores,
  )
  for name in sorted(wanted.keys() | given.keys()):
    if name not in wanted:
      raise ValueError(f'{name} is no feature of {kind}')
    if name not in given:
      raise ValueError(f'{name} is missing')
    if given[name] != wanted[name]:
      raise ValueError(f'{name} is {given[name]}, not {wanted[name]}')
  ranks = {'moments': 4 + (kind == 'pairs'), 'input_ids': 2}
  ranks |= {'prompt_embeds': 2, 'pooled_embeds': 1}
  for name, rank in ranks.items():
    if name in given and len(given[name].shape) != rank:
      raise ValueError(f'{name} has {len(given[name].shape)} axes, not {rank}')


def encode(values: Mapping[str, Value], wanted: Fields) -> bytes:
  """The bytes of a record.

  Raises ValueError when names, types, or shapes are not those wanted.
  """
  if values.keys() != wanted.keys():
    odd = ', '.join(sorted(values.keys() ^ wanted.keys()))
    raise ValueError(f'a record lacks, or has beyond its features: {odd}')
  example = tf_example_pb2.Example()
  entries = example.features.feature
  for name, field in wanted.items():
    value = values[name]
    if field.dtype == 'bytes':
      if not isinstance(value, bytes):
        raise ValueError(f'{name}: must be bytes, is {type(value).__name__}')
      entries[name].bytes_list.value.append(value)
      continue
    array = _to_array(name, value, field)
    if field.packed:
      entries[name].bytes_list.value.append(array.tobytes())
    elif field.dtype == 'float32':
      entries[name].float_list.value.extend(array.ravel().tolist())
    else:
      # 64 bits without a sign are stored as those with one, as tfds does.
      signed = array.astype(np.int64, casting='unsafe')
      entries[name].int64_list.value.extend(signed.ravel().tolist())
  return example.SerializeToString(deterministic=True)


def _to_array(name: str, value: Value, field: Field) -> np.ndarray:
  """The value in the field's type and shape; ValueError if it is another."""
  array = np.asarray(value)
  wanted = np.dtype(field.dtype)
  if array.shape != field.shape:
    raise ValueError(f'{name}: shape {array.shape}, must be {field.shape}')
  if isinstance(value, np.ndarray | np.generic):
    if array.dtype != wanted:
      raise ValueError(f'{name}: {array.dtype}, must be {wanted}')
    return array
  return np.array(value, wanted)


def decode(data: bytes, wanted: Fields) -> Record:
  """The values of a record; arrays in it may be read-only.

  Raises ValueError for bytes that are no such record.
  """
  try:
    entries = tf_example_pb2.Example.FromString(data).features.feature
  except Exception as error:
    # protobuf's DecodeError derives from no built-in error but Exception.
    raise ValueError(f'no tf.train.Example: {error}') from error
  if set(entries) != wanted.keys():
    odd = ', '.join(sorted(set(entries) ^ wanted.keys()))
    raise ValueError(f'entries are missing or unknown: {odd!a}')
  return {name: _decode(name, entries[name], wanted[name]) for name in wanted}


def _decode(name: str, entry, field: Field) -> np.ndarray | np.generic | bytes:
  """One entry's value."""
  if field.dtype == 'bytes' or field.packed:
    values = entry.bytes_list.value
    if len(values) != 1:
      raise ValueError(f'{name} holds {len(values)} texts, not 1')
    if not field.packed:
      return values[0]
    array = np.frombuffer(values[0], np.uint8)
    size = math.prod(field.shape) * np.dtype(field.dtype).itemsize
    if array.size != size:
      raise ValueError(f'{name} holds {array.size} bytes, not {size}')
    return array.view(field.dtype).reshape(field.shape)
  floats = field.dtype == 'float32'
  values = entry.float_list.value if floats else entry.int64_list.value
  if len(values) != math.prod(field.shape):
    raise ValueError(
      f'{name} holds {len(values)} numbers, not {math.prod(field.shape)}'
    )
  # As a list, since NumPy takes protobuf's own kind a number at a time.
  numbers = values[:]
  if field.dtype == 'int32' and numbers:
    if min(numbers) < _INT32.min or max(numbers) > _INT32.max:
      raise ValueError(f'{name} does not fit in 32 bits')
  array = np.array(numbers, np.float32 if floats else np.int64)
  return array.astype(field.dtype).reshape(field.shape)[()]
