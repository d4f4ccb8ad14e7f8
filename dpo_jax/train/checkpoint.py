"""Checkpoints: orbax, the whole state and the data position."""

import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from dpo_jax import types
from dpo_jax.train import state as state_lib


class Checkpointer:
  """`workdir/checkpoints/<step>/`: `state` (arrays) and `data` (an integer).

  A save is atomic: an interrupted one leaves a temporary folder that the next
  start removes. Saving is asynchronous; `close` waits for it.
  """

  def __init__(self, workdir: pathlib.Path, *, every: int, keep: int):
    """Keeps the newest `keep` checkpoints, one every `every` steps."""
    self._every = every
    folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    # orbax removes them too, but in the background and so at times later.
    for torn in folder.glob('*.orbax-checkpoint-tmp*'):
      shutil.rmtree(torn, ignore_errors=True)
    self._manager = ocp.CheckpointManager(
      folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True, create=True
      ),
      item_names=('state', 'data'),
    )

  def latest_step(self) -> int | None:
    """Number of the newest complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  def due(self, step: int, *, last: bool) -> bool:
    """Whether the state after `step` steps is to be saved."""
    return step % self._every == 0 or last

  def save(self, step: int, state: state_lib.TrainState, position: int):
    """Saves unless this step is already there."""
    if self._manager.latest_step() == step:
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave({'position': position}),
      ),
    )

  def restore(
    self, target: state_lib.TrainState
  ) -> tuple[state_lib.TrainState, int]:
    """Newest state, placed as `target` is, and the data position.

    target: arrays or ShapeDtypeStructs with shardings. Raises ValueError
    naming the folder when the checkpoint cannot be read.
    """
    step = self._manager.latest_step()
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding
      ),
      target,
    )
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract),
          data=ocp.args.JsonRestore(),
        ),
      )
    except Exception as error:
      folder = self._manager.directory / str(step)
      raise ValueError(
        f'{folder}: the checkpoint cannot be read '
        f'({type(error).__name__}: {str(error).splitlines()[0][:200]}); '
        'remove this folder to continue from the one before it'
      ) from error
    return restored['state'], int(restored['data']['position'])

  def wait(self):
    """Blocks until a save under way is complete."""
    self._manager.wait_until_finished()

  def close(self):
    """Waits for saves under way and releases the manager."""
    self._manager.close()


def restore_params(
  workdir: pathlib.Path, *, step: int | None = None
) -> tuple[types.Params, int]:
  """(NumPy parameters, step) of a run: the EMA where it has one.

  Reads nothing of the optimizer. `step` None is the newest checkpoint.

  Raises:
    ValueError: no such run or step, naming those there are, or a checkpoint
      that cannot be read.
  """
  folder = pathlib.Path(workdir).absolute() / 'checkpoints'
  steps = sorted(
    int(path.name) for path in folder.glob('*') if path.name.isdigit()
  )
  if not steps:
    raise ValueError(f'{workdir}: no run with checkpoints')
  if step is not None and step not in steps:
    raise ValueError(
      f'{workdir}: no checkpoint of step {step}; there are '
      + ', '.join(map(str, steps))
    )
  step = steps[-1] if step is None else step
  path = folder / str(step) / 'state'
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
  return restored[name], step
