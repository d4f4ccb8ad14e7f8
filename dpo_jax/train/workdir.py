"""A run's folder: its config, written once and compared ever after."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dpo_jax import folders
from dpo_jax.train import changes
from dpo_jax.train import lock as lock_lib


class Workdir:
  """Holds the folder, which may be in a bucket, for one run at a time.

  Of several processes only process 0 locks, compares and writes.
  """

  def __init__(self, folder: str | os.PathLike, *, config: Mapping[str, Any]):
    """`config`: the resolved config as JSON types.

    Raises ValueError for an address other than gs://.
    """
    try:
      self.path = folders.to_path(folder)
    except ValueError as error:
      raise ValueError(f'--workdir={error}') from error
    self._config = config
    self._lock = None
    self._on = jax.process_index() == 0

  def __enter__(self):
    """Makes or opens the folder.

    Raises ValueError when it cannot be, when another run is in it, or when it
    was written by another config: names each key with its old and new value.
    """
    if not self._on:
      return self
    self._open()
    self._lock = lock_lib.take(self.path)
    try:
      self._compare(self.path / 'config.json')
    except BaseException:
      # __exit__ is not called after this.
      self._lock.close()
      raise
    return self

  def _open(self):
    if not folders.is_bucket(self.path):
      self.path.mkdir(parents=True, exist_ok=True)
      return
    try:
      folders.list_names(self.path)
    # Of the packages that reach buckets each has its own.
    except Exception as error:
      raise ValueError(
        f'--workdir={self.path}: cannot be reached ({type(error).__name__}: '
        f'{" ".join(str(error).split())[:200]}); it needs pip install '
        "'dpo_jax[gcs]' and the rights to write there (gcloud auth "
        'application-default login)'
      ) from error

  def __exit__(self, *unused):
    """Lets the folder go."""
    if self._on:
      self._lock.close()

  def check(self) -> None:
    """Raises lock.LostError once another run has taken the folder over."""
    if self._on:
      self._lock.check()

  def keep_config(self) -> None:
    """Writes config.json; once this is done another config is refused.

    Called when the config is known to work, so that one that does not can be
    mended in the same folder.
    """
    if self._on:
      folders.write_json(self.path / 'config.json', self._config)

  def pin(self, name: str, record: Mapping[str, Any]) -> None:
    """Writes NAME.json once; raises ValueError when it says otherwise later.

    For what is known only after the start, such as the revision of a model or
    a hash of the data.
    """
    if not self._on:
      return
    path = self.path / f'{name}.json'
    text = folders.read_text(path)
    if text is not None:
      old = json.loads(text)
      if old != record:
        raise ValueError(
          f'{path}: this run began with another {name} ({old}, and now '
          f'{record}); give the same to continue, or choose another --workdir'
        )
    else:
      folders.write_json(path, record)

  def _compare(self, path):
    text = folders.read_text(path)
    if text is None:
      return
    try:
      old = json.loads(text)
    except ValueError as error:
      raise ValueError(
        f'{path}: not JSON; remove it if this folder is yours'
      ) from error
    changed = changes.find_refused(old, self._config)
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
