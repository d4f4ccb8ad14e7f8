"""Scores of a prepared folder's pictures, kept beside its records.

FOLDER/scores/KIND-SPLIT/score_NAME.npy is float32 [n, 2] (pairs) or [n]
(likes), row i of record i, and score_NAME.json says who gave them to which
records. label.npy has the labels of the same records, so that they can be
compared without reading pictures. A scorer at work keeps its chunks in
score_NAME.parts.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float32

from dpo_jax import folders
from dpo_jax.data import cached, records, side_files

FOLDER, LABEL = 'scores', 'label'
NAME = re.compile(r'score_[a-z0-9_]{1,60}')
_AGAIN = 'score again with python -m dpo_jax.tools.label'


@dataclasses.dataclass(frozen=True)
class Description:
  """What a column's JSON file says.

  Attributes:
    name: of the column.
    data: digest of the records that were scored, see `digest_data`.
    source: of the scorer: its weights' place and digest, settings.
    sha256: of the .npy file.
  """

  name: str
  data: str
  source: Mapping[str, Any]
  sha256: str


def digest_data(given: records.Records, kind: str) -> str:
  """Of the records' identity: checksums, kind, split and number."""
  sums = cached.folder_of(given) / 'checksums.json'
  data = sums.read_bytes() if sums.is_file() else b''
  text = f'{kind} {given.split} {len(given)}\n'.encode()
  return hashlib.sha256(hashlib.sha256(data).digest() + text).hexdigest()


def place(given: records.Records, kind: str) -> epath.Path:
  """The folder of the columns of these records."""
  root = epath.Path(cached.folder_of(given))
  return root / FOLDER / f'{kind}-{given.split}'


def list_names(given: records.Records, kind: str) -> list[str]:
  """Names of the columns that are there, sorted."""
  found = folders.list_names(place(given, kind))
  stems = [name.removesuffix('.json') for name in found if '.json' in name]
  return sorted(stem for stem in stems if NAME.fullmatch(stem))


def read(
  given: records.Records, kind: str, name: str
) -> tuple[Description, Float32[np.ndarray, 'n *sides']]:
  """A column and what is known of it.

  Raises ValueError where it is missing, damaged, or of other records.
  """
  folder = place(given, kind)
  path = pathlib.Path(folder / f'{name}.npy')
  values = side_files.read(pathlib.Path(folder), f'{name}.json')
  if values is None:
    there = ', '.join(list_names(given, kind)) or 'none'
    raise ValueError(
      f'{folder}: no {name} (there are: {there}); score the folder with python '
      '-m dpo_jax.tools.label'
    )
  try:
    description = Description(**values)
    data = path.read_bytes()
  except (TypeError, OSError) as error:
    raise ValueError(f'{path}: cannot be read ({error}); {_AGAIN}') from error
  if description.data != digest_data(given, kind):
    raise ValueError(f'{path}: is of other records than those there; {_AGAIN}')
  if hashlib.sha256(data).hexdigest() != description.sha256:
    raise ValueError(f'{path}: is damaged; {_AGAIN}')
  return description, _parse(path, data, len(given), kind, name)


def _parse(path, data, length, kind, name):
  shape = (length, 2) if kind == 'pairs' and name != LABEL else (length,)
  array = np.lib.format.read_array(
    io.BytesIO(data), allow_pickle=False, max_header_size=4096
  )
  if array.dtype != np.float32 or array.shape != shape:
    raise ValueError(
      f'{path}: {array.dtype} {list(array.shape)}, must be float32 '
      f'{list(shape)}; {_AGAIN}'
    )
  return array


def check_finite(name: str, start: int, values: np.ndarray) -> None:
  """Raises ValueError naming the record, of those from `start` on."""
  if not np.isfinite(values).all():
    where = start + int(
      np.argmax(~np.isfinite(values).reshape(len(values), -1).all(1))
    )
    raise ValueError(f'{name}: record {where} has no finite score')


class Writer:
  """A column that is made chunk by chunk, and goes on after a kill."""

  def __init__(
    self,
    given: records.Records,
    kind: str,
    name: str,
    *,
    source: Mapping[str, Any],
    chunk: int = 4096,
  ):
    """`chunk`: records in a file of what is unfinished.

    Raises ValueError where what is unfinished is of another scorer.
    """
    if name != LABEL and not NAME.fullmatch(name):
      raise ValueError(f'{name!r}: must be like score_pickscore')
    self.name, self.chunk, self._length = name, chunk, len(given)
    self._folder = place(given, kind)
    self._parts = self._folder / f'{name}.parts'
    record = {
      'data': digest_data(given, kind),
      'source': dict(source),
      'chunk': chunk,
    }
    self._record = json.loads(json.dumps(record))
    before = folders.read_text(self._parts / 'settings.json')
    if before is not None and json.loads(before) != self._record:
      raise ValueError(
        f'{self._parts}: an unfinished column of another scorer or other '
        'records; finish that, or remove the folder'
      )
    self._parts.mkdir(parents=True, exist_ok=True)
    folders.write_json(self._parts / 'settings.json', self._record)

  def _path(self, start: int) -> epath.Path:
    return self._parts / f'{start:09d}.npy'

  def missing(self) -> list[tuple[int, int]]:
    """Spans [first, end) of records without a chunk."""
    starts = range(0, self._length, self.chunk)
    there = set(folders.list_names(self._parts))
    return [
      (start, min(start + self.chunk, self._length))
      for start in starts
      if self._path(start).name not in there
    ]

  def add(self, start: int, values: np.ndarray) -> None:
    """A span's numbers, on the disk when this returns.

    Raises ValueError for numbers that are not finite.
    """
    check_finite(self.name, start, values)
    folders.write_bytes(self._path(start), _dump(values))

  def finish(self) -> np.ndarray:
    """Puts the chunks together under the column's name; returns it."""
    whole = np.concatenate(
      [
        np.load(pathlib.Path(self._path(start)), allow_pickle=False)
        for start in range(0, self._length, self.chunk)
      ]
    )
    data = _dump(whole)
    description = Description(
      self.name,
      self._record['data'],
      self._record['source'],
      hashlib.sha256(data).hexdigest(),
    )
    folders.write_bytes(self._folder / f'{self.name}.npy', data)
    folders.write_json(
      self._folder / f'{self.name}.json', dataclasses.asdict(description)
    )
    shutil.rmtree(pathlib.Path(self._parts))
    return whole


def _dump(values: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  array = np.ascontiguousarray(values, np.float32)
  np.lib.format.write_array(buffer, array, allow_pickle=False)
  return buffer.getvalue()
