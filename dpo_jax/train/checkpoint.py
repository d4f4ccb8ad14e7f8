"""Checkpoints: orbax, the whole state, the data position, and a manifest."""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dpo_jax import folders, trees, types
from dpo_jax.train import array_files, manifest
from dpo_jax.train import state as state_lib

# Beside the checkpoints: which of them is the best, and by what.
BEST = 'best.json'
_TORN = '*.orbax-checkpoint-tmp*'
_MARKER = '.saving'
_DAMAGED = '.damaged'
_TRIES = 50
_NONE, _ALL_DAMAGED = -1, -2


class SaveError(RuntimeError):
  """A checkpoint could not be written; those before it are whole."""


class Checkpointer:
  """`workdir/checkpoints/<step>/`: `state`, `data` and `manifest.json`.

  A checkpoint counts once its manifest is written, and older ones are removed
  after that. While it is being written `<step>.saving` lies beside it, so
  that what a kill left is told from what was damaged later. Saving is
  asynchronous; `wait` and `close` wait for it.
  """

  def __init__(self, workdir: str | os.PathLike, *, every: int, keep: int):
    """Opens the folder and finds the newest checkpoint that is whole.

    Keeps the newest `keep` checkpoints, one every `every` steps, and the one
    that `choose` names. A damaged one that is newer than a whole one is named
    on standard error and set aside as `<step>.damaged`. With several processes
    process 0 looks and all must call this.

    Raises ValueError, naming all steps, when every checkpoint is damaged.
    """
    self._every, self._keep = every, keep
    self._folder = _folder_of(workdir)
    self._primary = jax.process_index() == 0
    self._worker, self._error, self._saving = None, None, None
    self._best, self._noted = None, None
    self._latest = self._open()
    self._manager = self._make_manager()

  def _make_manager(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._folder,
      # It keeps all: an old one goes when the new one's manifest is there.
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None, cleanup_tmp_directories=True, create=True
      ),
      item_handlers={
        'state': array_files.make_handler(),
        'data': ocp.JsonCheckpointHandler(),
      },
    )

  def _open(self) -> int | None:
    """The newest whole step; what a kill has left is removed."""
    step, problem = _NONE, ''
    if self._primary:
      self._folder.mkdir(parents=True, exist_ok=True)
      # orbax removes them too, but in the background and so at times later.
      _remove(self._folder.glob(_TORN))
      for marker in self._folder.glob(f'*{_MARKER}'):
        self._drop_unfinished(marker)
      step, problem = self._set_damaged_aside()
    if jax.process_count() > 1:
      step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step == _ALL_DAMAGED:
      raise ValueError(
        problem or f'{self._folder}: process 0 found every checkpoint damaged'
      )
    return None if step == _NONE else step

  def _drop_unfinished(self, marker: epath.Path) -> None:
    folder = marker.with_suffix('')
    if folder.exists() and manifest.NAME not in folders.list_names(folder):
      print(
        f'{folder}: the save did not come to its end; removed', file=sys.stderr
      )
      _remove([folder])
    marker.unlink(missing_ok=True)

  def _set_damaged_aside(self) -> tuple[int, str]:
    """(newest whole step or one of the codes, the error's words)."""
    good, damaged = _newest_whole(self._folder)
    if good is None and damaged:
      return _ALL_DAMAGED, _all_damaged(self._folder, damaged)
    for step, damage in damaged.items():
      aside = self._folder / f'{step}{_DAMAGED}'
      print(
        f'checkpoint of step {step} is damaged ({damage}); it is kept as '
        f'{aside.name} and the run continues from step {good}',
        file=sys.stderr,
      )
      _remove([aside])
      (self._folder / str(step)).rename(aside)
    return (_NONE if good is None else good), ''

  def latest_step(self) -> int | None:
    """Number of the newest whole checkpoint, None if there is none."""
    return self._latest

  def steps(self) -> list[int]:
    """Numbers of the checkpoints that are there, newest first."""
    return _steps(self._folder)

  def choose(self, best: Mapping[str, Any]) -> None:
    """Keeps the checkpoint of best['step'], one that is there or comes next.

    `best`, of JSON types, becomes best.json once that checkpoint is whole; the
    one that was chosen before stays until then.
    """
    self.wait()
    self._best = dict(best)
    if self._latest is not None and self._best['step'] <= self._latest:
      self._note_best()

  def _note_best(self) -> None:
    if self._primary and self._noted != self._best:
      folders.write_json(self._folder.parent / BEST, self._best)
      self._noted = self._best

  def due(self, step: int, *, last: bool) -> bool:
    """Whether the state after `step` steps is to be saved."""
    return step % self._every == 0 or last

  def save(
    self, step: int, state: state_lib.TrainState, record: Mapping[str, Any]
  ) -> None:
    """Saves unless this step is already there.

    record: JSON types, the same in all processes: the data position and what
    else the loop goes on from. Raises SaveError when this save, or the one
    before it, failed.
    """
    self.wait()
    if self._latest == step:
      return
    self._saving = step, trees.num_bytes(state)
    try:
      if self._primary:
        (self._folder / f'{step}{_MARKER}').write_text('')
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state),
          data=ocp.args.JsonSave(dict(record)),
        ),
        force=True,
      )
    except Exception as error:
      self._fail(error)
    self._worker = threading.Thread(target=self._complete, args=(step,))
    self._worker.start()

  def _complete(self, step: int) -> None:
    """Waits for orbax, then writes the manifest and removes old steps."""
    try:
      self._manager.wait_until_finished()
      if self._primary:
        manifest.write(self._folder / str(step), step)
        (self._folder / f'{step}{_MARKER}').unlink(missing_ok=True)
        self._note_best()
        kept = self._best and self._best['step']
        old = [n for n in _steps(self._folder)[self._keep :] if n != kept]
        _remove(self._folder / str(number) for number in old)
    except BaseException as error:
      self._error = error
    else:
      self._latest = step

  def _fail(self, error: BaseException) -> None:
    """Removes what the failed save wrote and raises SaveError."""
    step, needed = self._saving
    folder = self._folder
    # It remembers the failure; a new one saves again when there is room.
    with contextlib.suppress(Exception):
      self._manager.close()
    if self._primary:
      self._remove_failed(step)
    self._manager = self._make_manager()
    kept = ', '.join(map(str, sorted(_steps(folder)))) or 'none'
    raise SaveError(
      f'{folder}: the checkpoint of step {step} could not be saved '
      f'({type(error).__name__}: {" ".join(str(error).split())[:200]}); free: '
      f'{_free_bytes(folder)} bytes, needed: about {needed} bytes; steps that '
      f'can be continued from: {kept}. Make room and run the same command'
    ) from error

  def _remove_failed(self, step: int) -> None:
    folder = self._folder
    if manifest.NAME not in folders.list_names(folder / str(step)):
      _remove([folder / str(step)])
    # Writers that had not failed yet may put files back for a moment.
    for _ in range(_TRIES):
      _remove(folder.glob(_TORN))
      time.sleep(0.1)
      if not any(folder.glob(_TORN)):
        break
    (folder / f'{step}{_MARKER}').unlink(missing_ok=True)

  def check(self) -> None:
    """Raises SaveError if a save in the background has failed."""
    if self._worker is not None and not self._worker.is_alive():
      self.wait()

  def restore(
    self, target: state_lib.TrainState
  ) -> tuple[state_lib.TrainState, dict[str, Any]]:
    """Newest whole state, placed as `target` is, and the record saved with it.

    target: arrays or ShapeDtypeStructs with shardings. Raises ValueError
    naming the folder when the checkpoint cannot be read.
    """
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding
      ),
      target,
    )
    try:
      restored = self._manager.restore(
        self._latest,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
          ),
          data=ocp.args.JsonRestore(),
        ),
      )
    except Exception as error:
      folder = self._folder / str(self._latest)
      raise ValueError(
        f'{folder}: the checkpoint cannot be read '
        f'({type(error).__name__}: {str(error).splitlines()[0][:200]}); '
        'remove this folder to continue from the one before it'
      ) from error
    return restored['state'], dict(restored['data'])

  def wait(self) -> None:
    """Blocks until a save under way is complete; SaveError if it failed."""
    if self._worker is not None:
      self._worker.join()
      self._worker = None
    if self._error is not None:
      error, self._error = self._error, None
      self._fail(error)

  def close(self) -> None:
    """Waits for saves under way and releases the manager."""
    try:
      self.wait()
    finally:
      self._manager.close()


def _folder_of(workdir: str | os.PathLike) -> epath.Path:
  path = folders.to_path(workdir)
  if not folders.is_bucket(path):
    path = epath.Path(os.path.abspath(path))
  return path / 'checkpoints'


def _steps(folder: epath.Path) -> list[int]:
  """Numbers of the checkpoints, newest first."""
  names = folders.list_names(folder)
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _newest_whole(folder: epath.Path) -> tuple[int | None, dict[int, str]]:
  """(step, or None; damage of those newer than it). Changes nothing."""
  damaged = {}
  for step in _steps(folder):
    damage = manifest.find_damage(folder / str(step), step)
    if not damage:
      return step, damaged
    damaged[step] = damage
  return None, damaged


def _all_damaged(folder: epath.Path, damaged: Mapping[int, str]) -> str:
  shown = '; '.join(f'step {step}: {what}' for step, what in damaged.items())
  return (
    f'{folder}: no checkpoint is whole ({shown}); put back a copy of one, or '
    'choose another --workdir to start anew'
  )


def _remove(folders) -> None:
  for folder in folders:
    if folder.exists():
      folder.rmtree(missing_ok=True)


def _free_bytes(folder: epath.Path) -> int | str:
  try:
    return shutil.disk_usage(os.fspath(folder)).free
  except OSError:
    return 'unknown'


def restore_params(
  workdir: str | os.PathLike, *, step: int | None = None
) -> tuple[types.Params, int]:
  """(NumPy parameters, step) of a run: the EMA where it has one.

  Reads nothing of the optimizer. `step` None is the newest checkpoint that is
  whole; damaged ones that are newer are named on standard error. One that is
  being saved is left out.

  Raises:
    ValueError: no such run or step, naming those there are, or a checkpoint
      that is damaged or cannot be read.
  """
  folder = _folder_of(workdir)
  steps = [
    number
    for number in _steps(folder)
    if not (folder / f'{number}{_MARKER}').exists()
  ]
  if not steps:
    raise ValueError(f'{workdir}: no run with checkpoints')
  if step is not None and step not in steps:
    raise ValueError(
      f'{workdir}: no checkpoint of step {step}; there are '
      + ', '.join(map(str, sorted(steps)))
    )
  damaged = {}
  for number in steps if step is None else [step]:
    damage = manifest.find_damage(folder / str(number), number)
    if not damage:
      break
    damaged[number] = damage
  else:
    raise ValueError(_all_damaged(folder, damaged))
  for bad, damage in damaged.items():
    print(
      f'checkpoint of step {bad} is damaged ({damage}); step {number} is taken',
      file=sys.stderr,
    )
  return _read_params(folder / str(number) / 'state'), number


def _read_params(path: epath.Path) -> types.Params:
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      tree = reader.metadata(path).item_metadata.tree
      name = 'ema' if tree.get('ema') else 'params'
      shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree[name]
      )
      restored = reader.restore(
        path,
        args=ocp.args.PyTreeRestore(
          item={name: shapes},
          restore_args={
            name: jax.tree.map(
              lambda leaf: ocp.RestoreArgs(
                restore_type=np.ndarray, dtype=leaf.dtype
              ),
              shapes,
            )
          },
          partial_restore=True,
        ),
      )
  except Exception as error:
    raise ValueError(
      f'{path}: the checkpoint cannot be read ({type(error).__name__}: '
      f'{" ".join(str(error).split())[:200]})'
    ) from error
  return restored[name]
