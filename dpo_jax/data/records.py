"""Prepared data sets: ArrayRecord shards that tensorflow-datasets reads too."""

import bisect
import contextlib
import errno
import itertools
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from dpo_jax.data import record_fields, record_metadata

# One record a group, so that any can be read alone; pictures and latents do
# not get smaller by compression.
_WRITER = 'group_size:1,uncompressed'
_READER = 'readahead_buffer_size:0'


class DamagedRecordError(ValueError):
  """A record that fails its checksum or cannot be parsed.

  `shard` is the file's name, `position` the record's place in it, `index` its
  place in the data set.
  """

  def __init__(self, shard: str, position: int, index: int, reason: str):
    """`reason`: why, in words."""
    super().__init__(
      f'{shard}: record {position} is damaged (number {index} of the data '
      f'set): {reason}'
    )
    self.shard, self.position, self.index = shard, position, index
    self.reason = reason

  def __reduce__(self):
    """Lets the error pass between processes."""
    arguments = (self.shard, self.position, self.index, self.reason)
    return type(self), arguments


class Shard(NamedTuple):
  """A file name within the data set's folder, and its number of records."""

  name: str
  length: int


def features(
  kind: str,
  *,
  cache: record_fields.CacheShapes | None = None,
  scores: Sequence[str] = (),
) -> tfds.features.FeaturesDict:
  """tensorflow-datasets' features of 'pairs', 'likes' or 'captions'."""
  return record_metadata.to_features(
    record_fields.fields(kind, cache=cache, scores=scores)
  )


class ShardWriter:
  """Writes one shard; it appears under its name when it is complete.

  Of a context that ends in an error nothing remains.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    features: Mapping[str, Any] | record_fields.Fields,
  ):
    """`features`: from `features()`, or the fields themselves."""
    self.path = pathlib.Path(path)
    self.length = 0
    self._fields = record_metadata.to_fields(features)
    self._partial = self.path.with_name(f'{self.path.name}.partial')
    self._partial.unlink(missing_ok=True)
    self._writer = array_record_module.ArrayRecordWriter(
      str(self._partial), _WRITER
    )

  def write(self, values: Mapping[str, record_fields.Value]) -> None:
    """Appends a record.

    Raises ValueError when it does not fit the features, OSError when it cannot
    be written; the last records may tell that only when the shard is closed.
    """
    self._writer.write(record_fields.encode(values, self._fields))
    if not self._writer.ok():
      self._close()
      raise OSError(f'{self._partial}: cannot be written')
    self.length += 1

  def _close(self) -> None:
    """Closes the file, which tells whether all of it could be written."""
    try:
      self._writer.close()
    except RuntimeError as error:
      for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(code) in str(error):
          raise OSError(code, os.strerror(code), str(self._partial)) from error
      raise OSError(f'{self._partial}: {error}') from error

  def close(self) -> None:
    """Completes the shard, on the disk, under its name.

    Raises OSError when it could not be written.
    """
    self._close()
    count = _open_reader(self._partial).num_records()
    if count != self.length:
      raise OSError(f'{self._partial}: {count} of {self.length} records there')
    with open(self._partial, 'rb') as file:
      os.fsync(file.fileno())
    self._partial.rename(self.path)

  def discard(self) -> None:
    """Removes what was written."""
    # On a full disk it cannot be closed; the file goes anyway.
    with contextlib.suppress(Exception):
      self._writer.close()
    self._partial.unlink(missing_ok=True)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind, *unused) -> None:
    """Completes the shard, or removes it after an error."""
    if kind is not None:
      self.discard()
      return
    try:
      self.close()
    except BaseException:
      self.discard()
      raise


def write_metadata(
  root: str | os.PathLike,
  kind: str,
  features: Mapping[str, Any] | record_fields.Fields,
  splits: Mapping[str, Sequence[int]],
) -> None:
  """Writes features.json and dataset_info.json beside the shards.

  `splits` maps a split to the lengths of its shards, which are there.
  """
  fields = record_metadata.to_fields(features)
  folder = record_metadata.data_folder(pathlib.Path(root), kind)
  record_metadata.write(folder, fields, splits)


class Records(Sequence[record_fields.Record]):
  """Random access to the records of one split; safe to share by threads."""

  def __init__(
    self,
    folder: pathlib.Path,
    fields: record_fields.Fields,
    shards: Sequence[Shard],
    split: str = '',
  ):
    """`folder` holds the shards; see `open_folder`."""
    self.folder, self.fields = folder, dict(fields)
    self.shards, self.split = tuple(shards), split
    self._ends = list(itertools.accumulate(s.length for s in self.shards))
    self._readers: list[Any] = [None] * len(self.shards)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._ends[-1]

  def place(self, index: int) -> tuple[int, int]:
    """(number of the shard, position in it) of a record."""
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    shard = bisect.bisect_right(self._ends, index)
    return shard, index - self._ends[shard] + self.shards[shard].length

  def read_bytes(self, index: int) -> bytes:
    """The record as it is stored.

    Raises DamagedRecordError when it fails its checksum, or its shard does.
    """
    shard, position = self.place(index)
    try:
      return self._reader(shard).read([position])[0]
    # The reader raises what its status codes map to.
    except Exception as error:
      raise self._damage(index, error) from error

  def __getitem__(self, index: int) -> record_fields.Record:
    """The record's entries, arrays of NumPy and bytes.

    Raises DamagedRecordError as `read_bytes`, and for bytes that are no record
    of this data set.
    """
    data = self.read_bytes(index)
    try:
      return record_fields.decode(data, self.fields)
    except ValueError as error:
      raise self._damage(index, error) from error

  def _damage(self, index: int, error: Exception) -> DamagedRecordError:
    shard, position = self.place(index)
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    return DamagedRecordError(self.shards[shard].name, position, index, reason)

  def _reader(self, shard: int) -> Any:
    """The shard's reader, opened at first use."""
    if self._readers[shard] is None:
      with self._lock:
        if self._readers[shard] is None:
          name, length = self.shards[shard]
          reader = _open_reader(self.folder / name)
          if reader.num_records() != length:
            raise ValueError(
              f'the shard holds {reader.num_records()} records, not {length}'
            )
          self._readers[shard] = reader
    return self._readers[shard]

  def __getstate__(self) -> dict[str, Any]:
    """Leaves out open files, so that a copy works in another process."""
    names = ('folder', 'fields', 'shards', 'split')
    return {name: getattr(self, name) for name in names}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__init__(**state)


def open_folder(
  path: str | os.PathLike, *, kind: str = 'pairs', split: str = ''
) -> Records:
  """The records of a split of a prepared folder, which is not trusted.

  Without `split` the folder's only one. Raises ValueError when the folder's
  metadata are not as this package writes them, when there is no such split,
  and for a missing or foreign shard file.
  """
  root = pathlib.Path(path)
  metadata = record_metadata.read(root, kind)
  if not split and len(metadata.splits) == 1:
    (split,) = metadata.splits
  if split not in metadata.splits:
    raise ValueError(
      f'{path}: no split {split!r} of {kind}; there are: '
      f'{", ".join(metadata.splits)}'
    )
  folder = record_metadata.data_folder(root, kind)
  lengths = metadata.splits[split]
  shards = [
    Shard(record_metadata.shard_name(kind, split, i, len(lengths)), length)
    for i, length in enumerate(lengths)
  ]
  for shard in shards:
    file = folder / shard.name
    if file.is_symlink() or not file.is_file():
      raise ValueError(
        f'{file}: no such shard; the folder is not complete (python -m '
        'dpo_jax.tools.verify names all that is missing)'
      )
  return Records(folder, metadata.fields, shards, split)


def _open_reader(path: pathlib.Path) -> Any:
  """A reader of single records, without reading ahead."""
  reader = array_record_module.ArrayRecordReader(
    str(path), _READER, file_reader_buffer_size=1 << 15
  )
  if not reader.ok():
    raise ValueError('the file is no readable ArrayRecord')
  return reader
