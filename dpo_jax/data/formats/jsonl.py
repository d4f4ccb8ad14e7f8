"""JSON Lines beside a folder of pictures: pairs, or single likes.

A pair is {"caption", "winner", "loser"}, with "winner_generator" and
"loser_generator" if known; a like is {"caption", "image", "liked"}, with
"generator". Pictures are files below the folder of the JSON Lines.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax.data.formats import json_rows
from dpo_jax.data.formats import paths as paths_lib
from dpo_jax.data.formats import rows as rows_lib

_KEYS = {'pairs': ('winner', 'loser'), 'likes': ('image', 'liked')}
_HINT = (
  'a pair has caption, winner and loser; a like has caption, image and liked'
)


@dataclasses.dataclass(frozen=True)
class JsonLines:
  """Files of pairs, or of likes."""

  files: tuple[rows_lib.File, ...]
  indices: tuple[json_rows.JsonRows, ...]
  kind: str

  def read(self, begin: int, end: int) -> Iterator[rows_lib.Row]:
    """Yields rows of the source; see `rows.Source`."""
    places = dict(zip(self.files, self.indices, strict=True))
    for file, first, last in rows_lib.spans(self.files, begin, end):
      for i, row in places[file].read(first, last):
        yield _to_row(file, i, row, self.kind)


def open_source(files: Sequence[str], root: pathlib.Path) -> JsonLines:
  """Checks every line, and returns the source, all pairs or all likes.

  Raises ValueError naming file and row before a picture is read.
  """
  found, indices, kind = [], [], None
  for name in files:
    path = pathlib.Path(name)
    index = json_rows.find_rows(path)
    file = rows_lib.File(path.relative_to(root).as_posix(), path, len(index))
    for i, row in index.read(0, len(index)):
      own = _kind(f'{path}, row {i}', row)
      if own != (kind or own):
        raise ValueError(
          f'{path}, row {i}: one of {own} among {kind}; put them into files of '
          'their own and prepare them apart'
        )
      kind = own
      _to_row(file, i, row, kind)
    found.append(file)
    indices.append(index)
  return JsonLines(tuple(found), tuple(indices), kind or 'pairs')


def _kind(place: str, row: dict[str, Any]) -> str:
  """'pairs' or 'likes', by the keys; ValueError for both or neither."""
  present = {
    kind: [name for name in names if name in row]
    for kind, names in _KEYS.items()
  }
  kinds = [kind for kind, names in present.items() if names]
  missing = [
    name
    for kind in kinds
    for name in ('caption', *_KEYS[kind])
    if name not in row
  ]
  if len(kinds) != 1 or missing:
    given = rows_lib.describe(sorted(row))
    raise ValueError(f'{place} has the keys {given}; {_HINT}')
  return kinds[0]


def _to_row(
  file: rows_lib.File, i: int, row: dict[str, Any], kind: str
) -> rows_lib.Row:
  """The row as it is meant; ValueError names file and row."""
  place = f'{file.path}, row {i}'
  names = ('winner', 'loser') if kind == 'pairs' else ('image',)
  prefixes = ('winner_', 'loser_') if kind == 'pairs' else ('',)
  generators = [f'{prefix}generator' for prefix in prefixes]
  for name in ('caption', *names, *generators):
    if not isinstance(row.get(name), str | None):
      raise ValueError(
        f'{place}: {name} is {rows_lib.describe(row[name])}; must be a text'
      )
  try:
    images = [
      row[name] and paths_lib.resolve_inside(file.path.parent, row[name])
      for name in names
    ]
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from error
  liked = None
  if kind == 'likes':
    liked = row['liked']
    if liked is not None and liked not in (0, 1):
      raise ValueError(
        f'{place}: liked is {rows_lib.describe(liked)}; must be true, false or '
        'null'
      )
  caption, repaired = rows_lib.to_text(row['caption'])
  return rows_lib.Row(
    source=f'{file.name}:{i}',
    caption=caption,
    images=tuple(image or None for image in images),
    uids=('',) * len(names),
    generators=tuple(row.get(name) or '' for name in generators),
    comparisons=((0, 1, 1.0),) if kind == 'pairs' else (),
    liked=None if liked is None else float(liked),
    unlabelled=int(kind == 'likes' and liked is None),
    repaired=repaired,
  )
