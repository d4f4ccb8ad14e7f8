"""The training loop: data in, steps, logs, checkpoints, and a clear stop."""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax import sharding, types
from dpo_jax import task as task_lib
from dpo_jax.train import checkpoint as checkpoint_lib
from dpo_jax.train import metrics as metrics_lib
from dpo_jax.train import progress as progress_lib
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib


class Loader(Protocol):
  """Batches of numpy arrays with an integer position."""

  def __next__(self) -> dict[str, np.ndarray]: ...

  def get_state(self) -> int: ...

  def set_state(self, position: int) -> None: ...


class NonFiniteLossError(RuntimeError):
  """The loss or the gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Numbers of a run; see configs/common.py for their meaning."""

  seed: int
  num_steps: int
  batch_size: int
  accumulate: int
  ema_decay: float
  log_every: int
  eval_every: int
  checkpoint_every: int
  keep: int


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run ends with.

  `seconds` and `compile_seconds` are this process's, `steps` the number of
  steps it made itself (fewer than num_steps after a resume).
  """

  state: state_lib.TrainState
  position: int
  seconds: float
  compile_seconds: float
  steps: int


def _check_finite(
  pending: tuple | None, workdir: pathlib.Path, last_saved: int | None
) -> None:
  """Raises NonFiniteLossError for a bad step, after dumping its batch."""
  if pending is None:
    return
  step, metrics, batch = pending
  names = [
    name
    for name in ('loss', 'norm/grads')
    if not math.isfinite(float(metrics[name]))
  ]
  if not names:
    return
  ids = [int(value) for value in batch['id']]
  path = workdir / f'nonfinite_step_{step}.json'
  record = {
    'step': step,
    'bad': names,
    'ids': ids,
    'epochs': [int(value) for value in batch['epoch']],
  }
  path.write_text(json.dumps(record) + '\n')
  shown = ', '.join(map(str, ids[:8])) + (' ...' if len(ids) > 8 else '')
  kept = 'no checkpoint yet' if last_saved is None else f'step {last_saved}'
  raise NonFiniteLossError(
    f'step {step}: {" and ".join(names)} is not finite; example ids {shown} '
    f'(all in {path.name}); last good checkpoint: {kept}. Lower optim.lr, or '
    'look at these examples.'
  )


def evaluate(
  eval_step: Callable,
  params: types.Params,
  frozen: types.PyTree,
  batches: Iterable[tuple[dict[str, np.ndarray], int]],
  key: types.Key,
  mesh: jax.sharding.Mesh,
) -> dict[str, float]:
  """Means over (batch, number of valid rows); padding rows are cut off."""
  window = metrics_lib.Window()
  for batch, valid in batches:
    values = eval_step(params, frozen, sharding.put_batch(batch, mesh), key)
    values = {name: np.asarray(value) for name, value in values.items()}
    for row in range(valid):
      window.add({name: float(value[row]) for name, value in values.items()})
  return window.take()


def _restore_or_start(task, optimizer, options, mesh, checkpointer, loader):
  """State on the mesh, and the loader at its position."""

  # The state is donated at every step: copies, so that nothing else dies.
  def init(params):
    return state_lib.init_state(
      jax.tree.map(jnp.copy, params),
      optimizer,
      use_ema=options.ema_decay > 0,
    )

  shapes = jax.eval_shape(init, task.params)
  placement = sharding.state_shardings(shapes, mesh)
  if checkpointer.latest_step() is None:
    return jax.jit(init, out_shardings=placement)(task.params)
  target = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    shapes,
    placement,
  )
  state, position = checkpointer.restore(target)
  loader.set_state(position)
  return state


def run(
  *,
  task: task_lib.Task,
  optimizer: optax.GradientTransformation,
  schedule: Callable[[int], Any],
  loader: Loader,
  eval_batches: Callable[[], Iterable[tuple[dict[str, np.ndarray], int]]],
  options: Options,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
) -> Result:
  """Trains to `options.num_steps`, continuing from the newest checkpoint.

  Stops with NonFiniteLossError within one step of a NaN; the checkpoint
  before it stays. Everything is logged at step multiples of log_every as the
  mean over the window.
  """
  checkpointer = checkpoint_lib.Checkpointer(
    workdir, every=options.checkpoint_every, keep=options.keep
  )
  state = _restore_or_start(
    task, optimizer, options, mesh, checkpointer, loader
  )
  first = int(state.step)
  frozen = jax.device_put(task.frozen, sharding.replicated(mesh))
  key = jax.device_put(jax.random.key(options.seed), sharding.replicated(mesh))
  train_step = jax.jit(
    step_lib.make_step(
      task.loss,
      optimizer,
      accumulate=options.accumulate,
      ema_decay=options.ema_decay,
    ),
    donate_argnums=0,
    out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
  )
  eval_steps = {
    name: jax.jit(step_lib.make_eval_step(fn))
    for name, fn in task.evaluators.items()
  }
  writer = metrics_lib.Writer(workdir, step=first)
  window = metrics_lib.Window()
  started = time.monotonic()
  compile_seconds, pending = 0.0, None
  last_saved = checkpointer.latest_step()
  position = loader.get_state()

  def log_eval(step):
    params = state_lib.final_params(state)
    values = {}
    for name, fn in eval_steps.items():
      means = evaluate(fn, params, frozen, eval_batches(), key, mesh)
      values |= {f'eval/{name}/{k}': v for k, v in means.items()}
    if values:
      writer.write(step, values)

  with progress_lib.Progress(first, options.num_steps) as progress:
    mark, marked = time.monotonic(), first
    for step in range(first + 1, options.num_steps + 1):
      batch = next(loader)
      before = time.monotonic()
      state, metrics = train_step(
        state, frozen, sharding.put_batch(batch, mesh), key
      )
      if step == first + 1:
        jax.block_until_ready(metrics)
        compile_seconds = time.monotonic() - before
        mark, marked = time.monotonic(), step
      # One step late, so that the device always has work queued.
      _check_finite(pending, workdir, last_saved)
      if pending is not None:
        window.add({k: float(v) for k, v in pending[1].items()})
      pending = (step, metrics, batch)
      position = loader.get_state()
      last = step == options.num_steps
      log = step % options.log_every == 0 or last
      save = checkpointer.due(step, last=last)
      if log or save or step == first + 1:
        _check_finite(pending, workdir, last_saved)
        window.add({k: float(v) for k, v in metrics.items()})
        pending = None
      if log or step == 1:
        now = time.monotonic()
        values = window.take() | {'lr': float(schedule(step - 1))}
        if step > marked:
          rate = (step - marked) / (now - mark)
          values |= {
            'time/steps_per_second': rate,
            'time/examples_per_second': rate * options.batch_size,
          }
        values['time/seconds'] = now - started
        writer.write(step, values)
        progress.update(step, values)
        mark, marked = now, step
      if save:
        checkpointer.save(step, state, position)
        last_saved = step
      if last or (options.eval_every and step % options.eval_every == 0):
        log_eval(step)
        mark, marked = time.monotonic(), step
  checkpointer.close()
  writer.close()
  jax.block_until_ready(state)
  return Result(
    state=state,
    position=position,
    seconds=time.monotonic() - started,
    compile_seconds=compile_seconds,
    steps=options.num_steps - first,
  )
