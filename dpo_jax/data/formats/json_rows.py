"""Finds the rows of JSON files, so that any can be read without the others."""

import codecs
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64

# A row holds texts and names, never pictures.
MAX_ROW_BYTES = 16 << 20
_CHUNK = 1 << 20
_SPACE = ' \t\r\n'


@dataclasses.dataclass(frozen=True)
class JsonRows:
  """Where each row of a file begins and ends, in bytes."""

  path: pathlib.Path
  begins: Int64[np.ndarray, ' n']
  ends: Int64[np.ndarray, ' n']

  def __len__(self) -> int:
    return len(self.begins)

  def read(self, first: int, last: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, object) of rows first..last-1.

    Raises ValueError naming file and row for anything but JSON objects.
    """
    with open(self.path, 'rb') as file:
      for i in range(first, last):
        file.seek(self.begins[i])
        data = file.read(self.ends[i] - self.begins[i])
        try:
          row = json.loads(data.decode())
          if not isinstance(row, dict):
            raise ValueError('is no JSON object')
        except (ValueError, RecursionError) as error:
          reason = ' '.join(str(error).split())
          raise ValueError(f'{self.path}, row {i}: {reason}') from error
        yield i, row


def find_rows(path: pathlib.Path) -> JsonRows:
  """The rows of a file: of one JSON array, or of JSON Lines.

  Blank lines are no rows. Raises ValueError for a file that is neither.
  """
  try:
    with open(path, 'rb') as file:
      start = file.read(3)
      place = 3 if start == codecs.BOM_UTF8 else 0
      file.seek(place)
      first = file.read(1)
      while first and first in _SPACE.encode():
        place, first = place + 1, file.read(1)
      file.seek(place)
      find = _array_spans if first == b'[' else _line_spans
      places = np.fromiter(
        itertools.chain.from_iterable(find(file, place)), np.int64
      ).reshape(-1, 2)
  except (OSError, ValueError, RecursionError) as error:
    reason = ' '.join(str(error).split())
    raise ValueError(
      f'{path}: cannot be read as JSON rows: {reason}'
    ) from error
  return JsonRows(path, places[:, 0], places[:, 1])


def _line_spans(file, place: int) -> Iterator[tuple[int, int]]:
  """Yields (begin, end) of every line that is not blank."""
  while line := file.readline(MAX_ROW_BYTES + 1):
    if len(line) > MAX_ROW_BYTES:
      raise ValueError(f'a line of more than {MAX_ROW_BYTES} bytes at {place}')
    if line.strip():
      yield place, place + len(line)
    place += len(line)


def _array_spans(file, place: int) -> Iterator[tuple[int, int]]:
  """Yields (begin, end) of every element of an array.

  Bytes are read as Latin-1, of which each is one character: JSON's own
  characters are ASCII, and places in the text are places in the file.
  """
  decoder = json.JSONDecoder()
  text, at = '', 0
  ended = False

  def fill() -> None:
    nonlocal text, at, place, ended
    chunk = file.read(_CHUNK).decode('latin-1')
    ended = not chunk
    text, at, place = text[at:] + chunk, 0, place + at

  def skip_space() -> str:
    nonlocal at
    while True:
      while at < len(text) and text[at] in _SPACE:
        at += 1
      if at < len(text) or ended:
        return text[at : at + 1]
      fill()

  fill()
  at = 1
  if skip_space() == ']':
    at += 1
    _check_end(skip_space(), place + at)
    return
  while True:
    skip_space()
    while True:
      try:
        _, stop = decoder.raw_decode(text, at)
        # A number could go on in the next chunk.
        if stop < len(text) or ended:
          break
      except ValueError:
        if ended:
          raise
      if len(text) - at > MAX_ROW_BYTES:
        raise ValueError(
          f'a row of more than {MAX_ROW_BYTES} bytes, or no JSON, at '
          f'{place + at}'
        )
      fill()
    yield place + at, place + stop
    at = stop
    mark = skip_space()
    at += 1
    if mark == ']':
      _check_end(skip_space(), place + at)
      return
    if mark != ',':
      raise ValueError(f'neither , nor ] follows a row at {place + at - 1}')


def _check_end(rest: str, place: int) -> None:
  if rest:
    raise ValueError(f'text after the array at {place}')
