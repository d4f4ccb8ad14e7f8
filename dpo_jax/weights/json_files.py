"""JSON objects in files, with errors that name the file."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any


def read(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; ValueError naming the file if it is not there or not one."""
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except (FileNotFoundError, NotADirectoryError) as error:
    raise ValueError(f'{path}: no such file') from error
  except IsADirectoryError as error:
    raise ValueError(f'{path}: is a folder') from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: not JSON: {error}') from error
  if not isinstance(values, dict):
    raise ValueError(f'{path}: not a JSON object')
  return values


def write(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Indented, keys sorted, so that equal values are equal bytes."""
  text = json.dumps(values, indent=2, sort_keys=True) + '\n'
  path.write_text(text, encoding='utf-8')
