"""What was computed once for a prepared folder: cache.json, text states."""

import collections
import dataclasses
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt64

from dpo_jax.data import record_metadata, records, side_files
from dpo_jax.data.formats import rows

NAME = 'cache.json'
# Ids of the captions in the order of their records.
INDEX = 'captions_index.npy'
POSTERIOR_DTYPE = 'float16'
# Text states kept in memory, in bytes.
KEEP_BYTES = 64 << 20
_STATES = ('prompt_embeds', 'pooled_embeds')


@dataclasses.dataclass(frozen=True)
class Description:
  """What cache.json says.

  Attributes:
    model: name and revision of the model that computed the cache.
    weights: SHA-256 of the parameters of each component that did.
    size: side of the square pictures, pixels, from their middle.
    flips: 2 where the mirrored pictures were encoded too, else 1.
    keep_images: whether the encoded pictures are still in the records.
    compute_dtype: dtype of the networks' computation.
    versions: of the packages, for the record.
  """

  model: dict[str, str]
  weights: dict[str, str]
  size: int
  flips: int
  keep_images: bool
  compute_dtype: str
  versions: dict[str, str]

  def to_json(self) -> dict[str, Any]:
    """The object of cache.json."""
    return dataclasses.asdict(self) | {'posterior_dtype': POSTERIOR_DTYPE}


def read_description(root: pathlib.Path) -> Description | None:
  """What the folder's cache.json says; None where there is none.

  Raises ValueError for a file that is not as `Description` writes it.
  """
  given = side_files.read(root, NAME)
  if given is None:
    return None
  kinds = {
    field.name: field.type for field in dataclasses.fields(Description)
  } | {'posterior_dtype': str}
  problems = [name for name in kinds.keys() ^ given.keys()]
  problems += [
    name
    for name in kinds.keys() & given.keys()
    if not _is_kind(given[name], kinds[name])
  ]
  if not problems:
    if given.pop('posterior_dtype') != POSTERIOR_DTYPE:
      problems.append('posterior_dtype')
    if given['size'] < 1:
      problems.append('size')
    if given['flips'] not in (1, 2):
      problems.append('flips')
  if problems:
    raise ValueError(
      f'{root / NAME}: not as dpo_jax.caching writes it: '
      f'{", ".join(sorted(problems))!a:.200}; prepare the folder again'
    )
  return Description(**given)


def _is_kind(value: Any, kind: Any) -> bool:
  if kind == dict[str, str]:
    return isinstance(value, dict) and all(
      isinstance(text, str) for text in value.values()
    )
  return isinstance(value, kind) and (kind is bool or value is not True)


def caption_id(caption: str | bytes) -> int:
  """The 64-bit id of a caption, as the records have it."""
  if isinstance(caption, bytes):
    caption = caption.decode('utf-8', 'replace')
  return rows.hash_texts(8, caption)


class Captions:
  """Text states of captions, read when they are wanted; safe for threads."""

  def __init__(self, source: records.Records, ids: UInt64[np.ndarray, ' n']):
    """`ids` are those of the records of `source`, rising."""
    self.source, self._ids = source, ids
    self._kept: collections.OrderedDict[int, dict[str, np.ndarray]] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()
    self._names = [name for name in _STATES if name in source.fields]
    size = sum(
      2 * int(np.prod(source.fields[name].shape)) for name in self._names
    )
    self._room = max(1, KEEP_BYTES // size)

  def __len__(self) -> int:
    return len(self._ids)

  def find(self, number: int, caption: bytes) -> Mapping[str, np.ndarray]:
    """`prompt_embeds` [s d] and, of SDXL, `pooled_embeds` [e], float16.

    Raises ValueError when there is no such caption, or another text has its
    id, and DamagedRecordError for a damaged record.
    """
    with self._lock:
      if number in self._kept:
        self._kept.move_to_end(number)
        return self._kept[number]
    place = int(np.searchsorted(self._ids, np.uint64(number)))
    if place == len(self._ids) or self._ids[place] != number:
      raise ValueError(f'caption {number} has no text states in the cache')
    record = self.source[place]
    if record['caption_id'] != number or record['caption'] != caption:
      raise ValueError(f'the text states of caption {number} are of another')
    found = {name: record[name] for name in self._names}
    with self._lock:
      self._kept[number] = found
      if len(self._kept) > self._room:
        self._kept.popitem(last=False)
    return found

  @property
  def empty(self) -> Mapping[str, np.ndarray]:
    """The states of the empty prompt."""
    return self.find(caption_id(''), b'')


def open_captions(root: pathlib.Path, *, split: str = 'train') -> Captions:
  """The captions of a prepared folder with a cache.

  Raises ValueError when they, or the index over them, are not as they should
  be.
  """
  source = records.open_folder(root, kind='captions', split=split)
  path = root / INDEX
  ids = side_files.read_index(
    path, len(source), numbers='rising ids', of='captions'
  )
  if not (ids[1:] > ids[:-1]).all():
    raise ValueError(
      f'{path}: must be the rising ids of {len(source)} captions; prepare the '
      'folder again'
    )
  return Captions(source, ids)


def moments_shape(source: records.Records) -> tuple[int, ...] | None:
  """[flips h w 2c] of the records' latents; None where they have none."""
  field = source.fields.get('moments')
  return field and field.shape[-4:]


def folder_of(source: records.Records) -> pathlib.Path:
  """The prepared folder that the records lie in."""
  depth = len(record_metadata.data_folder(pathlib.Path('.'), 'pairs').parts)
  return source.folder.parents[depth - 1]
