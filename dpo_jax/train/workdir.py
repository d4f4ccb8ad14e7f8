"""A run's folder: its config, written once and compared ever after."""

import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax

# May differ when a run continues: they change no number of the training.
FREE_KEYS = frozenset(
  {
    'train.log_every',
    'train.eval_every',
    'train.checkpoint_every',
    'train.keep',
    'mesh.data',
    'mesh.fsdp',
    'mesh.tensor',
    'mesh.dcn_data',
    'optim.offload',
    'eval.num_prompts',
    'eval.images_per_prompt',
    'eval.sampler',
    'eval.num_steps',
    'eval.guidance_scale',
    'eval.guidance_rescale',
    'eval.batch_size',
    'eval.num_draws',
    'eval.num_pairs',
    'eval.judge',
    'eval.preferred',
    'eval.retrieval',
    'export.dtype',
  }
)


def flatten(record: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested mappings to dotted keys."""
  flat = {}
  for name, value in record.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[f'{prefix}{name}'] = value
  return flat


def _write_json(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(record, indent=2) + '\n')
  temporary.replace(path)


class Workdir:
  """Holds the folder for one run at a time.

  The lock is the operating system's (it goes with the process, however that
  ends); the file says who holds it. Of several processes only process 0
  locks, compares and writes.
  """

  def __init__(self, folder: str | os.PathLike, *, config: Mapping[str, Any]):
    """`config`: the resolved config as JSON types.

    Raises ValueError for an address such as gs://, which is no folder.
    """
    if '://' in os.fspath(folder):
      raise ValueError(
        f'--workdir={folder}: must be a folder; mount the bucket (gcsfuse) or '
        'use a file system that all hosts share'
      )
    self.path = pathlib.Path(folder)
    self._config = config
    self._lock = None
    self._on = jax.process_index() == 0

  def __enter__(self):
    """Makes or opens the folder.

    Raises ValueError when another run is in it, or when it was written by
    another config: names each key with its old and new value.
    """
    if not self._on:
      return self
    self.path.mkdir(parents=True, exist_ok=True)
    self._take_lock()
    path = self.path / 'config.json'
    try:
      if path.exists():
        self._compare(path)
    except BaseException:
      # __exit__ is not called after this.
      self._lock.close()
      raise
    return self

  def __exit__(self, *unused):
    """Lets the folder go."""
    if self._on:
      self._lock.close()

  def keep_config(self) -> None:
    """Writes config.json; once this is done another config is refused.

    Called when the config is known to work, so that one that does not can be
    mended in the same folder.
    """
    if self._on:
      _write_json(self.path / 'config.json', self._config)

  def pin(self, name: str, record: Mapping[str, Any]) -> None:
    """Writes NAME.json once; raises ValueError when it says otherwise later.

    For what is known only after the start, such as the revision of a model or
    a hash of the data.
    """
    if not self._on:
      return
    path = self.path / f'{name}.json'
    if path.exists():
      old = json.loads(path.read_text())
      if old != record:
        raise ValueError(
          f'{path}: this run began with another {name} ({old}, and now '
          f'{record}); give the same to continue, or choose another --workdir'
        )
    else:
      _write_json(path, record)

  def _take_lock(self):
    path = self.path / 'lock'
    self._lock = path.open('a+')
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._lock.seek(0)
      holder = self._lock.read().strip() or 'another process'
      self._lock.close()
      raise ValueError(
        f'{self.path}: {holder} is running here; wait for it or choose '
        'another --workdir'
      ) from error
    self._lock.truncate(0)
    self._lock.write(f'pid {os.getpid()} on {socket.gethostname()}')
    self._lock.flush()

  def _compare(self, path):
    try:
      old = flatten(json.loads(path.read_text()))
    except ValueError as error:
      raise ValueError(
        f'{path}: not JSON; remove it if this folder is yours'
      ) from error
    new = flatten(self._config)
    missing = 'absent'
    changed = [
      f'{key}: {old.get(key, missing)!r} -> {new.get(key, missing)!r}'
      for key in sorted(old.keys() | new.keys())
      if old.get(key, missing) != new.get(key, missing) and key not in FREE_KEYS
    ]
    if changed:
      raise ValueError(
        f'{self.path} was written by another config ({"; ".join(changed)}); '
        'use that config to continue, or choose another --workdir'
      )

  def describe(self, devices: Sequence) -> str:
    """One line for the start of a run."""
    count = jax.process_count()
    shared = f', {count} processes' if count > 1 else ''
    kind = devices[0].device_kind
    return f'workdir {self.path}, {len(devices)} x {kind}{shared}'
