"""One run at a time in a folder: the system's lock, or an object's beat."""

import datetime
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from typing import Any

from etils import epath

from dpo_jax import folders

# Seconds: between two beats, until a lock without one is nobody's, and until
# what two runs wrote at the same time has settled.
BEAT, STALE, SETTLE = 15.0, 60.0, 2.0


class LostError(RuntimeError):
  """Another run has taken the folder over."""


def take(folder: epath.Path) -> 'DiskLock | BucketLock':
  """Takes `folder` for this process; the file `lock` says who has it.

  Raises ValueError naming the run that is in it.
  """
  kind = BucketLock if folders.is_bucket(folder) else DiskLock
  return kind(folder / 'lock')


def _refuse(path, holder):
  return ValueError(
    f'{path.parent}: {holder} is running here; wait for it or choose another '
    '--workdir'
  )


def _name(record: Any) -> str:
  if not isinstance(record, dict):
    return 'another process'
  return f'pid {record.get("pid")} on {record.get("host")}'


def _me() -> dict[str, Any]:
  return {'pid': os.getpid(), 'host': socket.gethostname()}


class DiskLock:
  """The operating system's: it goes with the process, however that ends."""

  def __init__(self, path: epath.Path):
    """Takes the lock; ValueError if another run has it."""
    self._file = path.open('a')
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._file.close()
      holder = path.read_text().strip() or 'another process'
      raise _refuse(path, holder) from error
    self._file.truncate(0)
    self._file.write(_name(_me()))
    self._file.flush()

  def check(self) -> None:
    """Does nothing: this lock cannot be lost."""

  def close(self) -> None:
    """Lets the folder go."""
    self._file.close()


class BucketLock:
  """An object that names its owner and is written again at every beat.

  One that stays as it is for STALE seconds is that of a run that died and is
  taken over; the clocks of two hosts are never compared. Buckets cannot
  compare and swap by way of fsspec, so two that start within moments of each
  other may both write: the one that reads another's name afterwards, now or at
  its next beat, gives up.
  """

  def __init__(self, path: epath.Path):
    """Takes the lock; ValueError if another run has it.

    Waits up to STALE seconds where a run that was killed has left its lock.
    """
    self._path, self._token = path, uuid.uuid4().hex
    self._lost, self._end = '', threading.Event()
    self._wait_for_stale()
    self._write()
    time.sleep(SETTLE)
    other = self._find_other()
    if other:
      raise _refuse(path, other)
    self._thread = threading.Thread(target=self._keep_beating, daemon=True)
    self._thread.start()

  def _wait_for_stale(self):
    first = self._read()
    if first is None:
      return
    print(
      f'{self._path}: left by {_name(first)}; waiting up to {STALE:.0f} s to '
      'see whether it still runs',
      file=sys.stderr,
      flush=True,
    )
    end = time.monotonic() + STALE
    while time.monotonic() < end:
      time.sleep(BEAT / 5)
      now = self._read()
      if now is None:
        return
      if now != first:
        raise _refuse(self._path, _name(now))

  def _read(self) -> Any:
    """What the object says; None if there is none."""
    text = folders.read_text(self._path)
    try:
      return None if text is None else json.loads(text)
    except ValueError:
      return 'damaged'

  def _write(self):
    now = datetime.datetime.now(datetime.UTC)
    record = _me() | {'token': self._token, 'time': now.isoformat()}
    folders.write_json(self._path, record)

  def _find_other(self) -> str:
    """The name of another run that has written the object, or ''."""
    record = self._read()
    mine = isinstance(record, dict) and record.get('token') == self._token
    return '' if mine or record is None else _name(record)

  def _keep_beating(self):
    while not self._end.wait(BEAT):
      try:
        self._lost = self._find_other()
        if self._lost:
          return
        self._write()
      except Exception as error:
        # The network may be back at the next beat.
        print(
          f'{self._path}: no beat ({" ".join(str(error).split())[:200]})',
          file=sys.stderr,
          flush=True,
        )

  def check(self) -> None:
    """Raises LostError once another run has taken the folder over."""
    if self._lost:
      raise LostError(
        f'{self._path.parent}: {self._lost} has taken this folder over; this '
        'run stops and saves nothing more'
      )

  def close(self) -> None:
    """Lets the folder go, unless it is another's by now."""
    self._end.set()
    self._thread.join()
    if not self._lost and not self._find_other():
      self._path.unlink(missing_ok=True)
