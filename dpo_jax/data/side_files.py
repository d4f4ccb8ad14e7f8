"""The small files beside the records: build report, checksums, indices."""

import json
import pathlib
from typing import Any

import numpy as np
from jaxtyping import UInt64

MAX_BYTES = 64 << 20


def split_hashes_name(kind: str, split: str) -> str:
  """The file with the split hash of each record's caption, in their order.

  It tells which records are held out without a look at them.
  """
  return f'{kind}-{split}.split_hashes.npy'


def read(root: pathlib.Path, name: str) -> dict[str, Any] | None:
  """The JSON object in root/name; None when there is no such file.

  Raises ValueError for a link, a file of more than MAX_BYTES, and anything
  but a JSON object: the folder is not trusted.
  """
  path = root / name
  if not path.exists() and not path.is_symlink():
    return None
  if path.is_symlink() or not path.is_file():
    raise ValueError(f'{path}: is no plain file; give the file itself')
  if path.stat().st_size > MAX_BYTES:
    raise ValueError(f'{path}: larger than {MAX_BYTES} bytes')
  try:
    values = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(f'{path}: not JSON: {reason}') from error
  if not isinstance(values, dict):
    raise ValueError(f'{path}: not a JSON object')
  return values


def read_index(
  path: pathlib.Path, length: int, *, numbers: str, of: str
) -> UInt64[np.ndarray, ' n']:
  """The array of numbers in a file, one for each of `length` records.

  `numbers` and `of` say in words what they are and what the records are.
  Raises ValueError for anything else: the folder is not trusted.
  """
  try:
    with path.open('rb') as file:
      # Nothing but numbers is read: no pickle, no header of any length.
      index = np.lib.format.read_array(
        file, allow_pickle=False, max_header_size=4096
      )
  except (OSError, ValueError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(
      f'{path}: no index of {of}: {reason}; prepare the folder again'
    ) from error
  if index.dtype != np.uint64 or index.shape != (length,):
    raise ValueError(
      f'{path}: {index.dtype} {list(index.shape)}: must be the {numbers} of '
      f'{length} {of}, uint64; prepare the folder again'
    )
  return index


def read_split_hashes(
  root: pathlib.Path, kind: str, split: str, length: int
) -> UInt64[np.ndarray, ' n']:
  """What `split_hashes_name` names; ValueError where it is not as it should."""
  return read_index(
    root / split_hashes_name(kind, split),
    length,
    numbers='split hashes',
    of=kind,
  )


def write_index(path: pathlib.Path, index: UInt64[np.ndarray, ' n']) -> None:
  """Writes an index, which is there in full or not at all."""
  partial = path.with_name(f'{path.name}.partial')
  with partial.open('wb') as file:
    np.save(file, np.asarray(index, np.uint64), allow_pickle=False)
  partial.rename(path)
