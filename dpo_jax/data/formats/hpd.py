"""JSON of ranked lists, as HPDv2 has them; every strict pair is taken.

A row is {"prompt": TEXT, "image_path": [FILES], ...} with one of
  "rank": [NUMBERS], the smaller the better;
  "human_preference": [NUMBERS], the larger the better;
  "raw_annotations": [[NUMBERS], ...], each a ranking; their mean counts.
Pictures lie beside the JSON, or in a folder of its name (test.json, test/).
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax.data.formats import json_rows
from dpo_jax.data.formats import paths as paths_lib
from dpo_jax.data.formats import rows as rows_lib

# 64 pictures make 2016 pairs of one row.
MAX_IMAGES = 64
_RANKINGS = ('rank', 'human_preference', 'raw_annotations')


@dataclasses.dataclass(frozen=True)
class RankedLists:
  """JSON files of rows with a prompt and ranked pictures."""

  files: tuple[rows_lib.File, ...]
  indices: tuple[json_rows.JsonRows, ...]
  kind: str = 'pairs'

  def read(self, begin: int, end: int) -> Iterator[rows_lib.Row]:
    """Yields rows of the source; see `rows.Source`."""
    places = dict(zip(self.files, self.indices, strict=True))
    for file, first, last in rows_lib.spans(self.files, begin, end):
      for i, row in places[file].read(first, last):
        yield _to_row(file, i, row)


def open_source(files: Sequence[str], root: pathlib.Path) -> RankedLists:
  """Checks every row, and returns the source.

  Raises ValueError naming file and row before a picture is read.
  """
  found, indices = [], []
  for name in files:
    path = pathlib.Path(name)
    index = json_rows.find_rows(path)
    file = rows_lib.File(path.relative_to(root).as_posix(), path, len(index))
    for i, row in index.read(0, len(index)):
      _to_row(file, i, row)
    found.append(file)
    indices.append(index)
  return RankedLists(tuple(found), tuple(indices))


def _to_row(file: rows_lib.File, i: int, row: dict[str, Any]) -> rows_lib.Row:
  """The row with all its comparisons; ValueError names file and row."""
  place = f'{file.path}, row {i}'
  prompt, names = row.get('prompt'), row.get('image_path')
  if not isinstance(prompt, str | None):
    raise ValueError(
      f'{place}: prompt is {rows_lib.describe(prompt)}; must be a text'
    )
  if (
    not isinstance(names, list)
    or not 2 <= len(names) <= MAX_IMAGES
    or not all(isinstance(name, str) for name in names)
  ):
    raise ValueError(
      f'{place}: image_path is {rows_lib.describe(names)}; must be a list of '
      f'2 to {MAX_IMAGES} file names'
    )
  try:
    images = [_find(file.path, name) for name in names]
    ranks = _read_ranks(row, len(names))
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from error
  pairs = list(itertools.combinations(range(len(names)), 2))
  strict = [(a, b) for a, b in pairs if ranks and ranks[a] != ranks[b]]
  caption, repaired = rows_lib.to_text(prompt)
  return rows_lib.Row(
    source=f'{file.name}:{i}',
    caption=caption,
    images=tuple(images),
    uids=('',) * len(names),
    generators=('',) * len(names),
    comparisons=tuple((a, b, float(ranks[a] < ranks[b])) for a, b in strict),
    ties=len(pairs) - len(strict) if ranks else 0,
    unlabelled=0 if ranks else len(pairs),
    repaired=repaired,
  )


def _find(path: pathlib.Path, name: str) -> pathlib.Path:
  """The picture's file; it need not be there."""
  beside = paths_lib.resolve_inside(path.parent, name)
  within = path.parent / path.stem
  if not beside.is_file() and within.is_dir():
    return paths_lib.resolve_inside(within, name)
  return beside


def _read_ranks(row: dict[str, Any], count: int) -> list[float] | None:
  """A number for each picture, smaller is better; None without a label."""
  name = next((n for n in _RANKINGS if row.get(n) is not None), None)
  if name is None:
    if not any(n in row for n in _RANKINGS):
      raise ValueError(f'has none of {", ".join(_RANKINGS)}')
    return None
  lists = row[name] if name == 'raw_annotations' else [row[name]]
  if not isinstance(lists, list) or not lists:
    raise ValueError(f'{name} is {rows_lib.describe(lists)}; must be lists')
  for numbers in lists:
    if (
      not isinstance(numbers, list)
      or len(numbers) != count
      or not all(_is_number(n) for n in numbers)
    ):
      raise ValueError(
        f'{name} is {rows_lib.describe(numbers)}; must be {count} numbers, one '
        'for each picture of image_path'
      )
  sign = -1 if name == 'human_preference' else 1
  return [sign * math.fsum(ranks) for ranks in zip(*lists, strict=True)]


def _is_number(given: Any) -> bool:
  return (
    isinstance(given, int | float)
    and not isinstance(given, bool)
    and abs(given) < 1e9
  )
