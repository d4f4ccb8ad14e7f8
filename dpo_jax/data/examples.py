"""Makes the records of rows: pictures are checked in threads, in order."""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dpo_jax.data import picture_check, threads
from dpo_jax.data.formats import rows as rows_lib

# Encoded bytes that wait for a thread at most; a row may be larger.
_WAITING_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Example:
  """A record, and what is known of it beside.

  Only repeats of its caption and images share the `key`; `split_hash` is that
  of its caption.
  """

  record: dict[str, Any]
  key: int
  split_hash: int


@dataclasses.dataclass(frozen=True)
class Made:
  """What a row gave; `reasons` of images that cannot be read."""

  examples: list[Example]
  counts: collections.Counter
  reasons: collections.Counter


class ExampleMaker:
  """Turns rows into examples; a context manager that holds the threads."""

  def __init__(
    self,
    *,
    size: int | None = None,
    threads: int = 2,
    count_long: Callable[[list[str]], int] | None = None,
  ):
    """`size`: see picture_check; `count_long`: captions over the limit."""
    self._check = picture_check.PictureCheck(size)
    self._threads = threads
    self._pool = None
    # The same captions come in runs.
    self._is_long = count_long and functools.lru_cache(maxsize=4096)(
      lambda caption: count_long([caption])
    )

  def __enter__(self) -> 'ExampleMaker':
    """Starts the threads."""
    threads.keep_freed_memory()
    self._pool = concurrent.futures.ThreadPoolExecutor(self._threads)
    return self

  def __exit__(self, *unused) -> None:
    """Stops the threads."""
    self._pool.shutdown(cancel_futures=True)

  def __call__(self, rows: Iterable[rows_lib.Row]) -> Iterator[Made]:
    """Yields what each row gives, in order."""
    waiting = collections.deque()
    pending = images = 0
    for row in rows:
      futures = {
        i: self._pool.submit(self._check, row.images[i]) for i in _needed(row)
      }
      size = sum(
        len(row.images[i]) for i in futures if isinstance(row.images[i], bytes)
      )
      waiting.append((row, futures, size))
      pending, images = pending + size, images + len(futures)
      while waiting and (
        pending > _WAITING_BYTES or images > 4 * self._threads
      ):
        row, futures, size = waiting.popleft()
        pending, images = pending - size, images - len(futures)
        yield self._make(row, futures)
    while waiting:
      row, futures, _ = waiting.popleft()
      yield self._make(row, futures)

  def _make(self, row: rows_lib.Row, futures: dict[int, Any]) -> Made:
    """The examples of a row whose pictures are being checked."""
    counts = collections.Counter(rows=1, captions_repaired=int(row.repaired))
    reasons = collections.Counter()
    pictures = {}
    for i, future in futures.items():
      try:
        pictures[i] = future.result()
      except picture_check.UnreadableError as error:
        reasons[str(error)] += 1
    counts.update(images=len(futures), images_unreadable=reasons.total())
    like = row.liked is not None
    total = len(row.comparisons) + row.ties + row.unlabelled + like
    counts['examples'] = total
    if row.caption is None:
      counts['without_caption'] = total
      return Made([], counts, reasons)
    counts.update(ties=row.ties, unlabelled=row.unlabelled)
    examples = []
    if like:
      made = _make_like(row, pictures)
      examples += [made] if made else []
      counts['unreadable'] += not made
    for comparison in row.comparisons:
      made = _make_pair(row, pictures, comparison)
      if isinstance(made, str):
        counts[made] += 1
      else:
        examples.append(made)
    counts['kept'] = len(examples)
    if self._is_long:
      counts['over_token_limit'] = len(examples) * self._is_long(row.caption)
    return Made(examples, counts, reasons)


def _needed(row: rows_lib.Row) -> list[int]:
  """The pictures whose bytes an example needs."""
  if row.caption is None:
    return []
  if row.liked is not None:
    return [0]
  return sorted(
    {
      i
      for a, b, _ in row.comparisons
      if not _same_given(row, a, b)
      for i in (a, b)
    }
  )


def _same_given(row: rows_lib.Row, a: int, b: int) -> bool:
  """Whether the row itself shows one picture twice."""
  if row.images[a] is not None and row.images[a] == row.images[b]:
    return True
  return bool(row.uids[a]) and row.uids[a] == row.uids[b]


def _uid(
  row: rows_lib.Row, pictures: dict[int, picture_check.Picture], i: int
) -> str:
  return row.uids[i] or pictures[i].digest


def _make_pair(
  row: rows_lib.Row,
  pictures: dict[int, picture_check.Picture],
  comparison: tuple[int, int, float],
) -> Example | str:
  """The example of a comparison, or the count it goes to instead."""
  a, b, label = comparison
  if _same_given(row, a, b):
    return 'identical'
  if a not in pictures or b not in pictures:
    return 'unreadable'
  uids = [_uid(row, pictures, i) for i in (a, b)]
  if uids[0] == uids[1]:
    return 'identical'
  record = _common('pair', row, *uids, f'{a}/{b}')
  record |= {'label': label, 'sizes': _sizes(pictures[a], pictures[b])}
  for side, i in enumerate((a, b)):
    record[f'image_{side}'] = pictures[i].data
    record[f'generator_{side}'] = _encode(row.generators[i])
  key = rows_lib.hash_texts(8, 'pair', row.caption, *sorted(uids))
  return Example(record, key, rows_lib.split_hash(row.caption))


def _make_like(
  row: rows_lib.Row, pictures: dict[int, picture_check.Picture]
) -> Example | None:
  """The example of a like; None without a picture."""
  if 0 not in pictures:
    return None
  uid = _uid(row, pictures, 0)
  record = _common('like', row, uid) | {
    'image': pictures[0].data,
    'size': _sizes(pictures[0])[0],
    'generator': _encode(row.generators[0]),
    'liked': row.liked,
  }
  key = rows_lib.hash_texts(8, 'like', row.caption, uid)
  return Example(record, key, rows_lib.split_hash(row.caption))


def _common(kind: str, row: rows_lib.Row, *parts: str) -> dict[str, Any]:
  """The entries of every kind of record.

  The id is of the row too: one that repeats another is an example of its own,
  and its label may be another.
  """
  ids = (row.caption, *parts, row.source)
  return {
    'id': rows_lib.hash_texts(8, kind, *ids),
    'caption': row.caption.encode(),
    'caption_id': rows_lib.hash_texts(8, row.caption),
    'source': _encode(row.source),
  }


def _sizes(*pictures: picture_check.Picture) -> np.ndarray:
  """int32 [p, 4]: height and width as they came, and no crop."""
  rows = [(picture.height, picture.width, 0, 0) for picture in pictures]
  return np.array(rows, np.int32)


def _encode(text: str) -> bytes:
  return text.encode('utf-8', 'replace')
