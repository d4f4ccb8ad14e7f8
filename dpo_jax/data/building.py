"""Builds a prepared data set shard by shard, and continues after a kill.

A shard holds the rows of one range of the source, so that what it holds never
depends on the others or on interruptions. OUT.incomplete/state says which
shards are done; it is removed before OUT.incomplete becomes OUT.
"""

import collections
import concurrent.futures
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from dpo_jax.data import (
  build_files,
  build_report,
  examples,
  record_fields,
  record_metadata,
  records,
  side_files,
)
from dpo_jax.data.formats import rows as rows_lib

# Rows of the source in one shard, unless their number is given.
SHARD_ROWS = 1024
STATE = 'state'
CHECKSUMS = 'checksums.json'
# Kept free beyond what the shards need: metadata, the report, the state.
_SPARE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Options:
  """What a build is to do; `settings` is what a resume must agree in."""

  split: str
  shards: int
  rows: int
  settings: dict[str, Any]

  def span(self, shard: int) -> tuple[int, int]:
    """(first, last + 1) row of the source in a shard."""
    return tuple(self.rows * (shard + i) // self.shards for i in (0, 1))


@dataclasses.dataclass(frozen=True)
class _Shard:
  """A shard under way, and what is counted of it."""

  writer: records.ShardWriter
  counts: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  reasons: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  # Of each record its key and its caption's split hash.
  keys: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class Build:
  """A build of `out`, begun or continued in OUT.incomplete.

  A context manager that holds the folder's lock.
  """

  def __init__(
    self, out: str | os.PathLike, source: rows_lib.Source, options: Options
  ):
    """Raises ValueError when `out` is there, or its settings are others."""
    self.out = pathlib.Path(os.path.abspath(out))
    self.folder = self.out.with_name(f'{self.out.name}.incomplete')
    self.source, self.options = source, options
    self._state = self.folder / STATE
    self._fields = record_fields.fields(source.kind)
    self._lock = None
    check_out(out)

  def __enter__(self) -> 'Build':
    """Locks the folder and compares the settings of what is there."""
    if not self.complete:
      there = self.folder.exists() and any(self.folder.iterdir())
      if there and not self._state.exists():
        raise ValueError(
          f'{self.folder}: is there, and no build that could be continued; '
          'move it away'
        )
      self._state.mkdir(parents=True, exist_ok=True)
    self._lock = os.open(self.folder, os.O_RDONLY)
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      self._check_settings()
    except BlockingIOError as error:
      self.__exit__()
      raise ValueError(
        f'{self.folder}: another process builds it; wait for it to end'
      ) from error
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *unused) -> None:
    """Gives the folder free."""
    if self._lock is not None:
      os.close(self._lock)
      self._lock = None

  @property
  def complete(self) -> bool:
    """Whether only the rename is left to do."""
    return (self.folder / CHECKSUMS).exists()

  def _data(self) -> pathlib.Path:
    return record_metadata.data_folder(self.folder, self.source.kind)

  def _check_settings(self) -> None:
    """Raises ValueError unless the folder was begun with these settings."""
    path = self._state / 'settings.json'
    if self.complete and not path.exists():
      path = self.folder / build_report.NAME
      begun = build_files.read_json(path).get('settings')
      wanted = build_files.without_times(self.options.settings)
    elif path.exists():
      begun, wanted = build_files.read_json(path), self.options.settings
    else:
      build_files.write_json(path, self.options.settings)
      return
    # As JSON has it, without tuples.
    wanted = json.loads(json.dumps(wanted))
    if begun == wanted:
      return
    begun = begun if isinstance(begun, dict) else {}
    key = next(k for k in (*wanted, *begun) if begun.get(k) != wanted.get(k))
    raise ValueError(
      f'{self.folder} was begun with another {key} '
      f'({rows_lib.describe(begun.get(key))}, now '
      f'{rows_lib.describe(wanted.get(key))}); continue with the same command '
      'and files, or remove that folder'
    )

  def build_shards(
    self,
    make: examples.ExampleMaker,
    *,
    on_progress: Callable[[int], None] = lambda rows: None,
  ) -> None:
    """Writes the shards that are missing; on_progress gets the rows done."""
    if self.complete or (self._state / 'rows.json').exists():
      on_progress(self.options.rows)
      return
    try:
      self._data().mkdir(parents=True, exist_ok=True)
      self._build_missing(make, on_progress)
      self._finish_rows()
    except OSError as error:
      raise self._explain(error) from error

  def _build_missing(self, make, on_progress) -> None:
    """Writes shards; one is completed while the next is being made.

    Waiting for the disk would cost as much time as decoding does.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      last = None
      for shard in range(self.options.shards):
        if self._is_done(shard):
          on_progress(self.options.span(shard)[1])
          continue
        made = self._make_shard(shard, make, on_progress)
        try:
          if last is not None:
            last.result()
        except BaseException:
          made.writer.discard()
          raise
        last = pool.submit(self._complete_shard, shard, made)
      if last is not None:
        last.result()

  def _shard(self, shard: int) -> pathlib.Path:
    return self._data() / record_metadata.shard_name(
      self.source.kind, self.options.split, shard, self.options.shards
    )

  def _shard_state(self, shard: int) -> pathlib.Path:
    return self._state / f'shard-{shard:05d}.json'

  def _is_done(self, shard: int) -> bool:
    """Whether the shard is there in full; its state is written last."""
    path = self._shard_state(shard)
    if not path.exists():
      return False
    size = build_files.read_json(path)['bytes']
    file = self._shard(shard)
    return file.exists() and file.stat().st_size == size

  def _make_shard(self, shard, make, on_progress) -> '_Shard':
    """Writes the records of a shard, which is not complete then."""
    begin, end = self.options.span(shard)
    made = _Shard(records.ShardWriter(self._shard(shard), self._fields))
    try:
      rows = self.source.read(begin, end)
      for done, row in enumerate(make(rows), begin + 1):
        made.counts.update(row.counts)
        made.reasons.update(row.reasons)
        for example in row.examples:
          made.writer.write(example.record)
          made.keys.append((example.key, example.split_hash))
        on_progress(done)
    except BaseException:
      made.writer.discard()
      raise
    return made

  def _complete_shard(self, shard: int, made: '_Shard') -> None:
    """Gives the shard its name, and writes what is to be known about it."""
    with made.writer:
      pass
    path, state = self._shard(shard), self._shard_state(shard)
    build_files.write(
      state.with_suffix('.keys'), np.array(made.keys, '<u8').tobytes()
    )
    with path.open('rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
    build_files.write_json(
      state,
      {
        'length': len(made.keys),
        'bytes': path.stat().st_size,
        'sha256': digest,
        'counts': dict(made.counts),
        'reasons': dict(made.reasons),
      },
    )

  def _explain(self, error: OSError) -> OSError:
    """The error, with the free and the needed bytes when a disk is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      return error
    states = [
      build_files.read_json(path) for path in self._state.glob('shard-*.json')
    ]
    rows = sum(state['counts']['rows'] for state in states)
    needed = 'an unknown number'
    if rows:
      each = sum(state['bytes'] for state in states) / rows
      left = self.options.rows - rows
      needed = f'about {_SPARE_BYTES + int(each * left)}'
    free = shutil.disk_usage(self.folder).free
    return OSError(
      error.errno,
      f'{self.folder}: no space is left: {free} bytes are free, {needed} '
      'needed for the rest; make room and give the same command again, which '
      'continues here',
    )

  def _finish_rows(self) -> None:
    """Adds up the shards' states; writes the metadata and the report."""
    states = [
      build_files.read_json(self._shard_state(shard))
      for shard in range(self.options.shards)
    ]
    lengths = [state['length'] for state in states]
    counts, reasons = collections.Counter(), collections.Counter()
    for state in states:
      counts.update(state['counts'])
      reasons.update(state['reasons'])
    if not sum(lengths):
      raise ValueError(
        'nothing is left to train on: '
        + build_report.in_one_line(self.source.kind, counts)
      )
    records.write_metadata(
      self.folder,
      self.source.kind,
      self._fields,
      {self.options.split: lengths},
    )
    keys = [
      np.fromfile(self._shard_state(shard).with_suffix('.keys'), '<u8')
      for shard in range(self.options.shards)
    ]
    keys, split_hashes = np.concatenate(keys).reshape((-1, 2)).T
    counts['duplicates'] = len(keys) - len(np.unique(keys))
    name = side_files.split_hashes_name(self.source.kind, self.options.split)
    side_files.write_index(self.folder / name, split_hashes)
    report = build_report.make(
      self.source.kind,
      counts,
      reasons,
      settings=build_files.without_times(self.options.settings),
    )
    build_report.write(self.folder, report)
    build_files.write_json(self._state / 'rows.json', report)

  def finish(self) -> dict[str, Any]:
    """Writes the checksums, and gives OUT its name; returns the report."""
    if not self.complete:
      self._write_checksums()
    report = build_files.read_json(self.folder / build_report.NAME)
    for path in self.folder.rglob('*.partial'):
      path.unlink()
    # The settings go last, so that what is left can still be compared.
    for path in sorted(self._state.glob('*'), key=_is_settings):
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    if self._state.exists():
      self._state.rmdir()
    build_files.sync(self.folder)
    self.folder.rename(self.out)
    build_files.sync(self.out.parent)
    return report

  def _write_checksums(self) -> None:
    """Sizes and SHA-256 of every shard, of the cache's too."""
    known = {}
    for shard in range(self.options.shards):
      known[self._shard(shard)] = self._shard_state(shard)
    sums = {}
    for path in sorted(self.folder.glob('*/*/*.array_record-*')):
      if path.suffix == '.partial':
        continue
      state = known.get(path)
      size = path.stat().st_size
      digest = None
      # The cache writes the shards anew.
      if state is not None and not (self.folder / 'cache.json').exists():
        digest = build_files.read_json(state)['sha256']
      if digest is None:
        with path.open('rb') as file:
          digest = hashlib.file_digest(file, 'sha256').hexdigest()
      name = path.relative_to(self.folder).as_posix()
      sums[name] = {'bytes': size, 'sha256': digest}
    build_files.write_json(self.folder / CHECKSUMS, sums)


def check_out(out: str | os.PathLike) -> None:
  """Raises ValueError for a name that cannot become a new folder."""
  path = pathlib.Path(os.path.abspath(out))
  if os.path.lexists(path):
    raise ValueError(
      f'--out={out}: is there already; name another folder or remove it'
    )
  parent = next(p for p in path.parents if os.path.lexists(p))
  if not parent.is_dir():
    raise ValueError(f'--out={out}: {parent} is no folder')


def is_split(name: str) -> bool:
  """Whether a split can have this name, which is a part of file names."""
  return record_metadata.SPLIT.fullmatch(name) is not None


def _is_settings(path: pathlib.Path) -> bool:
  return path.name == 'settings.json'
