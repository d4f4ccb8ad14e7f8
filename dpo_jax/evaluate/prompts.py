"""Prompt sets read from files: text, JSON, JSON Lines, CSV, TSV, parquet."""

import csv
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pyarrow import parquet

# Names under which files hold the prompt; the first one found is taken.
TEXT_KEYS = ('prompt', 'Prompt', 'caption', 'text')
ID_KEYS = ('id', 'prompt_id')
# Columns that sort a set's prompts: PartiPrompts', HPSv2's, Pick-a-Pic's.
GROUP_KEYS = ('category', 'challenge', 'style')
SAFE_ID = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,99}')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One line of a prompt set.

  Attributes:
    id: unique in the set and safe as the stem of a file's name.
    seed: its own seed, or None.
    groups: what the set sorts it under: {'category': 'Animals', ...}.
  """

  id: str
  text: str
  negative: str | None = None
  seed: int | None = None
  groups: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read(path: str | pathlib.Path) -> list[Prompt]:
  """The prompts of a .txt, .json, .jsonl, .csv, .tsv or .parquet file.

  Text files hold one prompt a line (empty lines are skipped); JSON a list of
  strings or objects, or an object whose values are such lists; the others
  rows. Objects and rows have the prompt under one of TEXT_KEYS, and
  optionally `id`, `negative_prompt` and `seed`, and are sorted by what stands
  under GROUP_KEYS in any case (PartiPrompts' Category and Challenge); in an
  object of lists its keys are the style (HPSv2's benchmark). Without an id the
  position is taken, 000000 first.

  Raises:
    ValueError: names the file, the row and what is wrong.
  """
  path = pathlib.Path(path)
  reader = _READERS.get(path.suffix.lower())
  if reader is None:
    raise ValueError(
      f'{path}: prompts are read from {", ".join(_READERS)}; not from '
      f'{path.suffix or "a file without suffix"!r}'
    )
  try:
    rows = list(reader(path))
  except FileNotFoundError as error:
    raise ValueError(f'{path}: no such file') from error
  # Readers raise what they like on damaged files.
  except Exception as error:
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(f'{path}: cannot be read: {reason}') from error
  prompts = [_to_prompt(path, i, row) for i, row in enumerate(rows)]
  if not prompts:
    raise ValueError(f'{path}: holds no prompts')
  _check_unique(path, prompts)
  return prompts


def _check_unique(path, prompts):
  seen = {}
  for i, prompt in enumerate(prompts):
    # Some file systems do not tell a.png from A.png.
    first = seen.setdefault(prompt.id.lower(), i)
    if first != i:
      raise ValueError(
        f'{path}: rows {first} and {i} have the same id {prompt.id!r}; ids '
        'name files and must differ by more than case'
      )


def _to_prompt(path: pathlib.Path, i: int, row: Any) -> Prompt:
  if isinstance(row, str):
    return Prompt(f'{i:06d}', row)
  if not isinstance(row, Mapping):
    raise ValueError(f'{path}: row {i} is neither a text nor an object')
  text = next((row[key] for key in TEXT_KEYS if key in row), None)
  if not isinstance(text, str):
    raise ValueError(
      f'{path}: row {i} has no prompt; name it one of {", ".join(TEXT_KEYS)}'
    )
  given = next((row[key] for key in ID_KEYS if row.get(key) is not None), None)
  name = f'{i:06d}' if given in (None, '') else str(given)
  if not SAFE_ID.fullmatch(name):
    raise ValueError(
      f'{path}: row {i} has id {name!r}; ids name files: letters, digits, '
      'dot, dash and underscore, at most 100, no dot first'
    )
  negative = row.get('negative_prompt') or None
  if negative is not None and not isinstance(negative, str):
    raise ValueError(f'{path}: row {i}: negative_prompt is not a text')
  groups = {
    key.lower(): value
    for key, value in row.items()
    if str(key).lower() in GROUP_KEYS and isinstance(value, str) and value
  }
  return Prompt(name, text, negative, _seed(path, i, row.get('seed')), groups)


def _seed(path, i, value):
  if value in (None, ''):
    return None
  try:
    seed = int(value)
    if seed != float(value) or not 0 <= seed < 2**32:
      raise ValueError
  except (TypeError, ValueError):
    raise ValueError(
      f'{path}: row {i}: seed={value!r}; give an integer from 0 to 2^32 - 1'
    ) from None
  return seed


def _read_text(path: pathlib.Path) -> Iterable[str]:
  lines = path.read_text(encoding='utf-8-sig').splitlines()
  return [line.strip() for line in lines if line.strip()]


def _read_json(path: pathlib.Path) -> Iterable[Any]:
  values = json.loads(path.read_text(encoding='utf-8-sig'))
  if isinstance(values, dict):
    if not all(isinstance(value, list) for value in values.values()):
      raise ValueError('an object must hold lists of prompts')
    return [
      {'prompt': row, 'style': key} if isinstance(row, str) else row
      for key, value in values.items()
      for row in value
    ]
  if not isinstance(values, list):
    raise ValueError('neither a list nor an object of lists')
  return values


def _read_json_lines(path: pathlib.Path) -> Iterable[Any]:
  with path.open(encoding='utf-8-sig') as file:
    return [json.loads(line) for line in file if line.strip()]


def _read_table(path: pathlib.Path) -> Iterable[Mapping]:
  delimiter = '\t' if path.suffix.lower() == '.tsv' else ','
  with path.open(encoding='utf-8-sig', newline='') as file:
    return list(csv.DictReader(file, delimiter=delimiter))


def _read_parquet(path: pathlib.Path) -> Iterable[Mapping]:
  # Pick-a-Pic's rows hold images of megabytes: only what is asked for.
  known = {*TEXT_KEYS, *ID_KEYS, *GROUP_KEYS, 'negative_prompt', 'seed'}
  names = parquet.read_schema(path).names
  columns = [name for name in names if name in known or name.lower() in known]
  return parquet.read_table(path, columns=columns).to_pylist()


_READERS: dict[str, Callable[[pathlib.Path], Iterable[Any]]] = {
  '.txt': _read_text,
  '.json': _read_json,
  '.jsonl': _read_json_lines,
  '.csv': _read_table,
  '.tsv': _read_table,
  '.parquet': _read_parquet,
}
# What names of files may end in.
SUFFIXES = tuple(_READERS)
