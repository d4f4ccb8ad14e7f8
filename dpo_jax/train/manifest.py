"""A checksum manifest for each checkpoint: what the array format cannot tell.

orbax notices neither a flipped bit in array data nor files that were swapped
between two steps, so the size and the SHA-256 of every file are written down
when a save is complete, and compared before it is restored.
"""

import concurrent.futures
import hashlib
import json
from typing import Any

from etils import epath

from dpo_jax import folders

NAME = 'manifest.json'
# Hashing leaves Python's lock alone, so that threads share it out.
_THREADS = 8
_CHUNK = 4 << 20


def write(folder: epath.Path, step: int) -> None:
  """Writes the manifest of a complete checkpoint, whole or not at all.

  Raises OSError, for instance when the disk is full.
  """
  text = _dump(step, _measure(folder, _list(folder)))
  folders.write_text(folder / NAME, text)


def find_damage(folder: epath.Path, step: int) -> str:
  """What is wrong with the checkpoint, by file name; '' if it is whole."""
  path = folder / NAME
  try:
    text = path.read_bytes()
  except OSError:
    return f'{NAME} is missing'
  try:
    record = json.loads(text)
    wanted, number = record['files'], record['step']
    whole = text == _dump(number, wanted).encode()
  except (ValueError, KeyError, TypeError):
    whole = False
  if not whole:
    return f'{NAME} is damaged'
  if number != step:
    return f'{NAME} is that of step {number}'
  names = _list(folder)
  for name in sorted(wanted.keys() ^ set(names)):
    state = 'missing' if name in wanted else 'not in the manifest'
    return f'{name} is {state}'
  try:
    found = _measure(folder, names)
  except OSError as error:
    return f'cannot be read: {error}'
  for name in names:
    is_size, is_sum = found[name]['bytes'], found[name]['sha256']
    if is_size != wanted[name]['bytes']:
      return f'{name} has {is_size} bytes, not {wanted[name]["bytes"]}'
    if is_sum != wanted[name]['sha256']:
      return f'{name} has another SHA-256 than when it was saved'
  return ''


def _dump(step: int, files: dict[str, Any]) -> str:
  """The one text of a manifest: any other is damage, to itself."""
  record = {'step': step, 'files': files}
  text = json.dumps(record, sort_keys=True)
  record['sha256'] = hashlib.sha256(text.encode()).hexdigest()
  return json.dumps(record, indent=1, sort_keys=True) + '\n'


def _list(folder: epath.Path) -> list[str]:
  """Names of all files but the manifest's, relative to the folder."""
  found, folders = [], [(folder, '')]
  while folders:
    place, prefix = folders.pop()
    for path in place.iterdir():
      name = f'{prefix}{path.name}'
      if path.is_dir():
        folders.append((path, f'{name}/'))
      elif name != NAME:
        found.append(name)
  return sorted(found)


def _measure(
  folder: epath.Path, names: list[str]
) -> dict[str, dict[str, int | str]]:
  """Name to `bytes` and `sha256`."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    sums = pool.map(lambda name: _measure_file(folder / name), names)
    return dict(zip(names, sums, strict=True))


def _measure_file(path: epath.Path) -> dict[str, int | str]:
  digest, size = hashlib.sha256(), 0
  with path.open('rb') as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
      size += len(chunk)
  return {'bytes': size, 'sha256': digest.hexdigest()}
