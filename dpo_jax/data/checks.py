"""Checks of a prepared folder: files, records, and what they say together."""

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import (
  cached,
  record_fields,
  record_metadata,
  records,
  side_files,
)
from dpo_jax.data import images as images_lib
from dpo_jax.data.formats import rows as rows_lib

# Records in memory at once.
CHUNK = 64
SHA256 = re.compile('[0-9a-f]{64}')
SIDES = {'pairs': ('image_0', 'image_1'), 'likes': ('image',), 'captions': ()}


class Problem(NamedTuple):
  """Something wrong: of a file, or of one record of it.

  `record` is the place in the shard, `index` the place in the split.
  """

  file: str
  reason: str
  record: int | None = None
  index: int | None = None


@dataclasses.dataclass
class Report:
  """What was checked and what is wrong with it."""

  problems: list[Problem] = dataclasses.field(default_factory=list)
  files: int = 0
  records: int = 0
  images: int = 0

  @property
  def damaged(self) -> list[tuple[str, int]]:
    """(shard, place in it) of every record with a problem, in order."""
    found = {(p.file, p.record) for p in self.problems if p.record is not None}
    return sorted(found)


class _Split(NamedTuple):
  """One split of one kind, and where its shards are."""

  kind: str
  name: str
  folder: pathlib.Path
  fields: record_fields.Fields
  shards: Sequence[records.Shard]

  def file(self, shard: records.Shard) -> str:
    return f'{self.kind}/{record_metadata.VERSION}/{shard.name}'


class Folder:
  """A prepared folder whose metadata can be trusted, and nothing else."""

  def __init__(self, root: str | os.PathLike):
    """Raises ValueError without a data set, or when metadata are refused."""
    self.root = pathlib.Path(root)
    kinds = [k for k in record_fields.KINDS if (self.root / k).exists()]
    if not {'pairs', 'likes'} & set(kinds):
      raise ValueError(
        f'{root}: holds neither pairs nor likes; name a folder that python -m '
        'dpo_jax.tools.prepare wrote'
      )
    self._splits = []
    # Captions come first, since the other records name them.
    for kind in sorted(kinds):
      metadata = record_metadata.read(self.root, kind)
      folder = record_metadata.data_folder(self.root, kind)
      for name, lengths in metadata.splits.items():
        shards = [
          records.Shard(
            record_metadata.shard_name(kind, name, i, len(lengths)), length
          )
          for i, length in enumerate(lengths)
        ]
        split = _Split(kind, name, folder, metadata.fields, shards)
        self._splits.append(split)
    self.total = sum(
      shard.length for split in self._splits for shard in split.shards
    )

  def check(
    self,
    *,
    threads: int = 2,
    on_progress: Callable[[int], None] = lambda done: None,
  ) -> Report:
    """Checks everything; on_progress gets how many of `total` are done."""
    report = Report()
    _check_files(self.root, self._splits, report)
    known: set[int] | None = None
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      for split in self._splits:
        state = _SplitCheck(split, self.root, report, known, pool)
        for done in state.run():
          report.records += done
          on_progress(report.records)
        if split.kind == 'captions':
          known = (known or set()) | state.caption_ids
    return report


def _check_files(root, splits, report) -> None:
  """Shards against checksums.json, and files that nothing names."""
  try:
    listed = side_files.read(root, 'checksums.json')
    if listed is None:
      report.problems.append(Problem('checksums.json', 'is missing'))
  except ValueError as error:
    report.problems.append(Problem('checksums.json', str(error)))
    listed = None
  expected = {
    split.file(shard): split.folder / shard.name
    for split in splits
    for shard in split.shards
  }
  for name, path in expected.items():
    report.files += 1
    if path.is_symlink() or (path.exists() and not path.is_file()):
      report.problems.append(Problem(name, 'the shard is no plain file'))
    elif not path.exists():
      report.problems.append(Problem(name, 'the shard is missing'))
    elif listed is not None:
      reason = _compare(path, listed.get(name))
      if reason:
        report.problems.append(Problem(name, reason))
  for name in sorted(set(listed or ()) - set(expected)):
    reason = f'names {name[:200]!a}, which is no shard of this data set'
    report.problems.append(Problem('checksums.json', reason))
  for split in splits:
    for path in sorted(split.folder.glob('*.array_record*')):
      name = f'{split.kind}/{record_metadata.VERSION}/{path.name}'
      if name not in expected:
        problem = Problem(name, 'is named by no metadata')
        if problem not in report.problems:
          report.problems.append(problem)


def _compare(path: pathlib.Path, entry: Any) -> str:
  """Why the file is not what checksums.json says; '' if it is."""
  if entry is None:
    return 'checksums.json does not name it'
  if not isinstance(entry, Mapping):
    return 'its entry in checksums.json is no object'
  size, digest = entry.get('bytes'), entry.get('sha256')
  if type(size) is not int or not SHA256.fullmatch(str(digest)):
    return 'its entry in checksums.json lacks bytes or sha256'
  there = path.stat().st_size
  if there != size:
    return f'holds {there} bytes of {size}'
  with path.open('rb') as file:
    if hashlib.file_digest(file, 'sha256').hexdigest() != digest:
      return 'its SHA-256 is not that of checksums.json'
  return ''


class _SplitCheck:
  """The check of one split."""

  def __init__(self, split, root, report, known, pool):
    """`known`: caption ids that the captions data set holds, or None."""
    self.split, self.report, self.known = split, report, known
    self._root, self._pool = root, pool
    self.caption_ids: set[int] = set()
    count = sum(shard.length for shard in split.shards)
    self._ids = np.zeros(count, np.uint64)
    self._split_hashes = np.zeros(count, np.uint64)
    self._read = np.zeros(count, bool)
    self._last_caption = -1
    if 'moments' in split.fields:
      self._check_cache(root)

  def run(self) -> Iterator[int]:
    """Yields numbers of records checked."""
    offset = 0
    for shard in self.split.shards:
      yield from self._check_shard(shard, offset)
      offset += shard.length
    self._check_ids()
    self._check_split_hashes()
    # Damaged captions are named already.
    if self.split.kind == 'captions' and len(self.caption_ids) == offset:
      self._check_index(self._root)

  def _check_cache(self, root) -> None:
    """Whether cache.json tells of moments of this shape."""
    shape = self.split.fields['moments'].shape[-4:]
    reason = ''
    try:
      description = cached.read_description(root)
      if description is None:
        reason = 'is missing, though the records hold latents'
      else:
        reason = _wrong_shape(shape, description)
    except ValueError as error:
      reason = str(error)
    if reason:
      self.report.problems.append(Problem(cached.NAME, reason))
    if self.known is None:
      reason = 'are missing, though the records hold latents'
      self.report.problems.append(Problem('captions', reason))

  def _check_index(self, root) -> None:
    """Whether the index over the captions is that of their records."""
    try:
      cached.open_captions(root, split=self.split.name)
      index = np.load(root / cached.INDEX, allow_pickle=False)
      reason = 'is not that of the captions'
    except (OSError, ValueError) as error:
      reason = str(error)
      index = None
    if index is None or set(index.tolist()) != self.caption_ids:
      self.report.problems.append(Problem(cached.INDEX, reason))

  def _check_split_hashes(self) -> None:
    """Whether the file that decides what is held out is that of the records."""
    if self.split.kind == 'captions':
      return
    name = side_files.split_hashes_name(self.split.kind, self.split.name)
    path = self._root / name
    reason = ''
    try:
      if not path.exists():
        reason = 'is missing, so nothing can be held out'
      else:
        found = side_files.read_split_hashes(
          self._root, self.split.kind, self.split.name, len(self._ids)
        )
        wrong = np.flatnonzero(self._read & (found != self._split_hashes))
        if len(wrong):
          reason = (
            f'{len(wrong)} numbers are not those of the captions, the first '
            f'that of number {wrong[0]} of the split'
          )
    except ValueError as error:
      reason = str(error)
    if reason:
      self.report.problems.append(Problem(name, reason))

  def _check_shard(self, shard, offset) -> Iterator[int]:
    path = self.split.folder / shard.name
    if path.is_symlink() or not path.is_file():
      yield shard.length
      return
    opened = records.Records(self.split.folder, self.split.fields, [shard])
    for start in range(0, shard.length, CHUNK):
      places = range(start, min(start + CHUNK, shard.length))
      found = []
      for place in places:
        try:
          found.append((place, opened[place]))
        except records.DamagedRecordError as error:
          self._add(shard, place, offset, error.reason)
      pictures = self._pool.map(
        _decoded_size,
        [record[s] for _, record in found for s in SIDES[self.split.kind]],
      )
      for place, record in found:
        for reason in self._reasons(record, place + offset, pictures):
          self._add(shard, place, offset, reason)
      yield len(places)

  def _check_ids(self) -> None:
    """Whether an id comes twice; of equal ids the later is the damaged."""
    if self.split.kind == 'captions':
      return
    rows = np.flatnonzero(self._read)
    _, first, group = np.unique(
      self._ids[rows], return_index=True, return_inverse=True
    )
    earlier = rows[first[group.reshape(-1)]]
    lengths = [shard.length for shard in self.split.shards]
    ends = np.cumsum(lengths)
    for index, one in zip(rows, earlier, strict=True):
      if index != one:
        number = int(np.searchsorted(ends, index, side='right'))
        offset = int(ends[number]) - lengths[number]
        reason = f'its id is that of number {one} of the split'
        shard = self.split.shards[number]
        self._add(shard, int(index) - offset, offset, reason)

  def _add(self, shard, place, offset, reason) -> None:
    file = self.split.file(shard)
    self.report.problems.append(Problem(file, reason, place, place + offset))

  def _reasons(self, record, index, pictures) -> list[str]:
    """What is wrong with a record that could be read."""
    reasons = [
      f'{name} holds a number that is not finite'
      for name, field in self.split.fields.items()
      if field.dtype.startswith('float') and not np.isfinite(record[name]).all()
    ]
    if self.split.kind == 'captions':
      return reasons + self._caption_reasons(record)
    self._ids[index], self._read[index] = record['id'], True
    self._split_hashes[index] = rows_lib.split_hash(
      record['caption'].decode('utf-8', 'replace')
    )
    name = 'label' if self.split.kind == 'pairs' else 'liked'
    # NaN is reported above.
    if record[name] < 0 or record[name] > 1:
      reasons.append(f'{name} is {record[name]}, not in [0, 1]')
    caption_id = int(record['caption_id'])
    if cached.caption_id(record['caption']) != caption_id:
      reasons.append(f'{caption_id} is not the id of its caption')
    if self.known is not None and caption_id not in self.known:
      reasons.append(f'its caption {caption_id} is not among the captions')
    return reasons + self._image_reasons(record, pictures)

  def _caption_reasons(self, record) -> list[str]:
    number = int(record['caption_id'])
    reasons = []
    if cached.caption_id(record['caption']) != number:
      reasons.append(f'{number} is not the id of its caption')
    if number in self.caption_ids:
      reasons.append(f'caption {number} comes more than once')
    elif number < self._last_caption:
      reasons.append(f'caption {number} is out of order')
    self._last_caption = max(number, self._last_caption)
    self.caption_ids.add(number)
    return reasons

  def _image_reasons(self, record, pictures) -> list[str]:
    reasons = []
    single = self.split.kind == 'likes'
    sizes = np.reshape(record['size' if single else 'sizes'], (-1, 4))
    for side, stated in zip(SIDES[self.split.kind], sizes, strict=True):
      shape = next(pictures)
      if shape is None:
        if 'moments' not in self.split.fields:
          reasons.append(f'{side} is empty, and there are no latents')
        continue
      self.report.images += 1
      if isinstance(shape, str):
        reasons.append(f'{side}: {shape}')
      elif not _could_be(shape, stated[:2].tolist()):
        reasons.append(
          f'{side} is {shape[0]} x {shape[1]} pixels (height, width), which '
          f'{stated[0]} x {stated[1]} is not and does not scale to'
        )
    return reasons


def _decoded_size(data: bytes) -> tuple[int, int] | str | None:
  """(height, width) of a picture, why there is none, None for no bytes."""
  if not data:
    return None
  try:
    return images_lib.decode(data).shape[:2]
  except ValueError as error:
    return str(error)


def _could_be(shape: tuple[int, int], stated: Sequence[int]) -> bool:
  """Whether the size is the one stated, or that scaled by `prepare --size`."""
  size = min(shape)
  if min(stated) < size:
    return False
  return shape == images_lib.resized_shape(*stated, size)


def _wrong_shape(
  shape: tuple[int, ...], description: cached.Description
) -> str:
  """Why moments [flips h w 2c] are not as described; '' if they are."""
  flips, height, width, _ = shape
  if description.flips != flips:
    return f'flips is {description.flips}, the records hold {flips}'
  size = description.size
  if height != width or size % height or (size // height).bit_count() != 1:
    return f'size is {size}, the records hold latents of {height} x {width}'
  return ''
