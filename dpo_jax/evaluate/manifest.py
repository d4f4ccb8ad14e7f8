"""A folder of generated pictures that knows what it holds.

`settings.json` says how the pictures are made and is compared when work goes
on; `manifest.jsonl` has one line a picture, with its SHA-256.
"""

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

SETTINGS, MANIFEST = 'settings.json', 'manifest.jsonl'


class Pictures:
  """Pictures by file name; each is written whole and then entered."""

  def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any]):
    """Opens the folder or makes it; `settings` are JSON types.

    What stands under 'settings' in them is repeated in every line.

    Raises ValueError when it was made with other settings, naming them, or
    holds something else.
    """
    self.path = pathlib.Path(folder)
    self._settings = settings.get('settings', {})
    record = json.loads(json.dumps(dict(settings)))
    place = self.path / SETTINGS
    if place.is_file():
      self._compare(place, record)
    elif self.path.is_dir() and any(self.path.iterdir()):
      raise ValueError(
        f'{self.path}: holds other files and no {SETTINGS}; choose an empty '
        'folder'
      )
    self.path.mkdir(parents=True, exist_ok=True)
    _write_whole(place, (json.dumps(record, indent=2) + '\n').encode())
    self._entries = self._read()
    # Without the torn last line of a killed run, to which lines would stick.
    self.close(self._entries)

  def _compare(self, place, record):
    old = json.loads(place.read_text())
    changed = [
      f'{key}: {old.get(key)!r} -> {record.get(key)!r}'
      for key in sorted(old.keys() | record.keys())
      if old.get(key) != record.get(key)
    ]
    if changed:
      raise ValueError(
        f'{self.path}: its pictures were made with other settings '
        f'({"; ".join(changed)}); use those, or choose another --out'
      )

  def _read(self) -> dict[str, dict]:
    place, entries = self.path / MANIFEST, {}
    if not place.is_file():
      return entries
    for line in place.read_text(encoding='utf-8').splitlines():
      try:
        entry = json.loads(line)
        entries[entry['file']] = entry
      except (ValueError, KeyError, TypeError):
        # The last line of a run that was killed; its picture is made again.
        continue
    return entries

  def is_done(self, entry: Mapping[str, Any]) -> bool:
    """Whether this very picture is there, byte for byte as it was entered."""
    known = self._entries.get(entry['file'])
    if known is None or any(known.get(k) != v for k, v in entry.items()):
      return False
    path = self.path / entry['file']
    if not path.is_file():
      return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == known['sha256']

  def add(
    self,
    entries: Iterable[Mapping[str, Any]],
    images: UInt8[np.ndarray, 'n H W 3'],
  ) -> None:
    """Writes pictures and then their lines, which reach the disk."""
    lines = []
    for entry, pixels in zip(entries, images, strict=True):
      buffer = io.BytesIO()
      Image.fromarray(pixels).save(buffer, 'PNG')
      data = buffer.getvalue()
      _write_whole(self.path / entry['file'], data)
      made = {
        **entry,
        'settings': self._settings,
        'sha256': hashlib.sha256(data).hexdigest(),
      }
      self._entries[entry['file']] = made
      lines.append(json.dumps(made) + '\n')
    with (self.path / MANIFEST).open('a', encoding='utf-8') as file:
      file.write(''.join(lines))
      file.flush()
      os.fsync(file.fileno())

  def close(self, order: Iterable[str]) -> None:
    """Writes the manifest anew: one line a picture, in this order of files."""
    lines = [json.dumps(self._entries[name]) + '\n' for name in order]
    _write_whole(self.path / MANIFEST, ''.join(lines).encode())


def _write_whole(path: pathlib.Path, data: bytes) -> None:
  partial = path.with_name(path.name + '.partial')
  partial.write_bytes(data)
  os.replace(partial, path)
