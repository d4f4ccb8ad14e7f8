"""Small files of a build, there in full or not at all; what a source is."""

import json
import os
import pathlib
from typing import Any

from dpo_jax.data.formats import rows as rows_lib


def without_times(settings: dict[str, Any]) -> dict[str, Any]:
  """The settings that a copy of the source has too."""
  files = [
    {key: value for key, value in file.items() if key != 'modified_ns'}
    for file in settings['files']
  ]
  return settings | {'files': files}


def describe_files(files: tuple[rows_lib.File, ...]) -> list[dict[str, Any]]:
  """What tells that the files of a source are still the same."""
  found = []
  for file in files:
    stat = file.path.stat()
    found.append(
      {
        'name': file.name,
        'bytes': stat.st_size,
        'rows': file.rows,
        'modified_ns': stat.st_mtime_ns,
      }
    )
  return found


def read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise ValueError(
      f'{path}: cannot be read; remove {path.parent} and build again'
    ) from error


def write_json(path: pathlib.Path, value: Any) -> None:
  write(path, json.dumps(value, indent=1, sort_keys=True).encode() + b'\n')


def write(path: pathlib.Path, data: bytes) -> None:
  """Writes a file that is there in full or not at all."""
  partial = path.with_name(f'{path.name}.partial')
  try:
    with partial.open('wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    partial.rename(path)
  except OSError:
    partial.unlink(missing_ok=True)
    raise


def sync(folder: pathlib.Path) -> None:
  """Makes renames in a folder last through a power cut."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
