"""Pick-a-Pic's parquet, versions 1 and 2, read a few rows at a time."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from dpo_jax.data.formats import rows as rows_lib

# Column -> (whether its arrow type will do, the type's name for the user).
_REQUIRED = {
  'caption': (pa.types.is_string, 'string'),
  'jpg_0': (pa.types.is_binary, 'binary'),
  'jpg_1': (pa.types.is_binary, 'binary'),
  'label_0': (pa.types.is_floating, 'double'),
}
_OPTIONAL = {
  'has_label': (pa.types.is_boolean, 'bool'),
  'image_0_uid': (pa.types.is_string, 'string'),
  'image_1_uid': (pa.types.is_string, 'string'),
  'model_0': (pa.types.is_string, 'string'),
  'model_1': (pa.types.is_string, 'string'),
}
_LARGE = {
  pa.types.is_string: pa.types.is_large_string,
  pa.types.is_binary: pa.types.is_large_binary,
}
_LABELS = ('has_label', 'label_0')
# Rows in memory at once: with pictures, and of labels alone.
_BATCH, _LABEL_BATCH = 8, 8192


@dataclasses.dataclass(frozen=True)
class PickAPic:
  """Parquet files in Pick-a-Pic's columns; label_0 decides."""

  files: tuple[rows_lib.File, ...]
  kind: str = 'pairs'

  def read(self, begin: int, end: int) -> Iterator[rows_lib.Row]:
    """Yields rows of the source; see `rows.Source`."""
    for file, first, last in rows_lib.spans(self.files, begin, end):
      for i, row in iterate(str(file.path), first, last):
        yield _to_row(file, i, row)


def open_source(files: Sequence[str], root: pathlib.Path) -> PickAPic:
  """Checks all schemas and labels, and returns the source.

  Raises ValueError naming file and row before a picture is read.
  """
  found = []
  for name in files:
    count = 0
    for i, row in iterate(name, columns=_LABELS):
      read_label(f'{name}, row {i}', row)
      count = i + 1
    path = pathlib.Path(name)
    relative = path.relative_to(root).as_posix()
    found.append(rows_lib.File(relative, path, count))
  return PickAPic(tuple(found))


def iterate(
  path: str,
  begin: int = 0,
  end: int | None = None,
  *,
  columns: Sequence[str] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (number, row) of a file's rows begin..end-1.

  A row has every known column, or those of `columns`, None where the file has
  it not; the caption is bytes, which need not be UTF-8. Raises ValueError for
  a file that is no parquet or lacks columns.
  """
  try:
    # Without pre-buffering a page is read when it is needed, not a row group.
    with parquet.ParquetFile(
      path, pre_buffer=False, buffer_size=1 << 20
    ) as file:
      present = check_schema(path, file.schema_arrow)
      wanted = [name for name in columns or present if name in present]
      size = _LABEL_BATCH if columns else _BATCH
      blank = dict.fromkeys(columns or (*_REQUIRED, *_OPTIONAL))
      start = 0
      for group in range(file.num_row_groups):
        length = file.metadata.row_group(group).num_rows
        stop = start + length if end is None else min(end, start + length)
        if max(start, begin) < stop:
          batches = file.iter_batches(
            size, row_groups=[group], columns=wanted, use_threads=False
          )
          for i, row in _rows(batches, start, begin, stop):
            yield i, blank | row
        start += length
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    reason = ' '.join(str(error).split())
    raise ValueError(
      f'{path}: not a readable parquet file: {reason}'
    ) from error


def _rows(
  batches: Iterator[pa.RecordBatch], start: int, begin: int, stop: int
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields numbered rows of a row group that starts at row `start`."""
  for batch in batches:
    length = batch.num_rows
    first, last = max(begin - start, 0), min(stop - start, length)
    if first < last:
      batch = batch.slice(first, last - first)
      if 'caption' in batch.schema.names:
        place = batch.schema.get_field_index('caption')
        raw = batch.column(place).cast(pa.large_binary())
        batch = batch.set_column(place, 'caption', raw)
      yield from enumerate(batch.to_pylist(), start + first)
    start += length
    if start >= stop:
      return


def check_schema(path: str, schema: pa.Schema) -> list[str]:
  """Returns the columns to read; raises ValueError naming all wrong ones."""
  problems = []
  missing = [name for name in _REQUIRED if name not in schema.names]
  if missing:
    problems.append(f'missing columns {", ".join(missing)}')
  present = [n for n in (*_REQUIRED, *_OPTIONAL) if n in schema.names]
  for name in present:
    if schema.names.count(name) > 1:
      problems.append(f'column {name} comes twice')
      continue
    kind = schema.field(name).type
    right, wanted = (_REQUIRED | _OPTIONAL)[name]
    large = _LARGE.get(right, right)
    if not (right(kind) or large(kind)):
      problems.append(f'column {name} is {kind}, not {wanted}')
  if problems:
    raise ValueError(
      f'{path}: {"; ".join(problems)}; pairs come in the columns of Pick-a-Pic'
    )
  return present


def read_label(place: str, row: dict[str, Any]) -> float | None:
  """Returns 1, 0 or 0.5, None if unlabelled; ValueError for anything else."""
  label = row['label_0']
  if row['has_label'] is False or (label is not None and math.isnan(label)):
    return None
  if label not in (0.0, 0.5, 1.0):
    given = 'null' if label is None else label
    raise ValueError(
      f'{place}: label_0 is {given}; must be 1 (image 0 won), 0 (image 1 won), '
      '0.5 (tie) or NaN (no label)'
    )
  return label


def image_uid(row: dict[str, Any], side: int) -> str:
  """Returns the image's uid, or a hash of its bytes where there is none."""
  return row[f'image_{side}_uid'] or rows_lib.hash_image(row[f'jpg_{side}'])


def _to_row(file: rows_lib.File, i: int, row: dict[str, Any]) -> rows_lib.Row:
  label = read_label(f'{file.path}, row {i}', row)
  caption, repaired = rows_lib.to_text(row['caption'])
  return rows_lib.Row(
    source=f'{file.name}:{i}',
    caption=caption,
    repaired=repaired,
    images=(row['jpg_0'], row['jpg_1']),
    uids=(row['image_0_uid'] or '', row['image_1_uid'] or ''),
    generators=(row['model_0'] or '', row['model_1'] or ''),
    comparisons=((0, 1, label),) if label in (0.0, 1.0) else (),
    ties=int(label == 0.5),
    unlabelled=int(label is None),
  )
