"""The JSON files beside the records: build report, checksums, cache."""

import json
import pathlib
from typing import Any

MAX_BYTES = 64 << 20


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
