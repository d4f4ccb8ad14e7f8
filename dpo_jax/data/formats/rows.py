"""What every format is read as: rows of pictures and comparisons of them."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a source.

  Attributes:
    source: 'file:row', for people; the file as seen from the source's root.
    caption: None where there is none; valid Unicode.
    images: encoded bytes, None where there are none, or the file to read.
    uids: a name of each picture, equal only for equal pictures; '' if none.
    generators: the name of the model behind each picture, or ''.
    comparisons: (i, j, probability that picture i is preferred to j).
    liked: of a row with one picture: 1 or 0.
    ties, unlabelled: further comparisons (or likes) that say nothing.
    repaired: whether the caption was not valid Unicode as it came.
  """

  source: str
  caption: str | None
  images: tuple[bytes | pathlib.Path | None, ...]
  uids: tuple[str, ...]
  generators: tuple[str, ...]
  comparisons: tuple[tuple[int, int, float], ...] = ()
  liked: float | None = None
  ties: int = 0
  unlabelled: int = 0
  repaired: bool = False


@dataclasses.dataclass(frozen=True)
class File:
  """A file of a source, as seen from its root; `rows` that it holds."""

  name: str
  path: pathlib.Path
  rows: int


class Source(Protocol):
  """An opened and checked source.

  `kind` is 'pairs' or 'likes'; `files` hold its rows, in order.
  """

  kind: str
  files: tuple[File, ...]

  def read(self, begin: int, end: int) -> Iterator[Row]:
    """Yields rows begin..end-1 of all; a bounded part is in memory at once.

    Raises ValueError naming file and row for what cannot be read.
    """
    ...


def spans(
  files: tuple[File, ...], begin: int, end: int
) -> Iterator[tuple[File, int, int]]:
  """Yields (file, first, last + 1) rows within files for rows of a source."""
  start = 0
  for file in files:
    first, last = max(begin - start, 0), min(end - start, file.rows)
    if first < last:
      yield file, first, last
    start += file.rows


def hash_texts(size: int, *parts: str) -> int:
  """A number of `size` bytes from texts, equal on every machine."""
  text = '\0'.join(parts).encode('utf-8', 'surrogatepass')
  return int.from_bytes(hashlib.blake2b(text, digest_size=size).digest(), 'big')


def split_hash(caption: str) -> int:
  """64 bits that decide whether a caption is held out, whatever else is."""
  return hash_texts(8, 'split', caption)


def hash_image(data: bytes) -> str:
  """A name for a picture that has none, from its encoded bytes."""
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def describe(given: Any) -> str:
  """A value of a file that is not trusted, short and printable."""
  text = ascii(given)
  return text if len(text) <= 80 else f'{text[:77]}...'


def to_text(given: str | bytes | None) -> tuple[str | None, bool]:
  """(valid Unicode text, whether it had to be repaired).

  What is no Unicode, lone surrogates too, is replaced.
  """
  if given is None:
    return None, False
  data = given
  if isinstance(data, str):
    data = data.encode('utf-8', 'replace')
  text = data.decode('utf-8', 'replace')
  return text, text != given and text.encode() != given
