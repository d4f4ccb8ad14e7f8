"""The training loop: data in, steps, logs, checkpoints, and a clear stop."""

import contextlib
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from dpo_jax import keys as keys_lib
from dpo_jax import sharding, types
from dpo_jax import task as task_lib
from dpo_jax.train import checkpoint as checkpoint_lib
from dpo_jax.train import metrics as metrics_lib
from dpo_jax.train import offload as offload_lib
from dpo_jax.train import preemption
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
  offload: bool = False


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


def make_per_example(
  loss_fn: task_lib.LossFn, mesh: jax.sharding.Mesh
) -> Callable[..., dict[str, np.ndarray]]:
  """evaluate(params, frozen, batch, key) -> metrics [b] of the whole batch.

  batch: this process's rows, [b_local, ...]. All processes call it and get
  all rows, in the loader's order: that of the devices may be another one.
  """
  whole = sharding.replicated(mesh)
  eval_step = jax.jit(step_lib.make_eval_step(loss_fn), out_shardings=whole)
  gather = jax.jit(lambda rows: rows, out_shardings=whole)

  def evaluate(params, frozen, batch, key):
    values = eval_step(params, frozen, sharding.put_batch(batch, mesh), key)
    count = len(batch['id'])
    rows = np.arange(count, dtype=np.int32) + jax.process_index() * count
    rows = gather(sharding.put_batch({'rows': rows}, mesh)['rows'])
    order = np.argsort(np.asarray(rows))
    return {name: np.asarray(value)[order] for name, value in values.items()}

  return evaluate


def _check_finite(
  pending: tuple, workdir: pathlib.Path, last_saved: int | None
) -> None:
  """Raises NonFiniteLossError for a bad step, after dumping its batch."""
  step, metrics, batch = pending
  names = [
    name
    for name in ('loss', 'norm/grads')
    if not math.isfinite(float(metrics[name]))
  ]
  if not names:
    return
  ids, epochs = (_all_rows(batch[name]) for name in ('id', 'epoch'))
  ids = keys_lib.id_numbers(ids)
  path = workdir / f'nonfinite_step_{step}.json'
  record = {
    'step': step,
    'bad': names,
    'ids': ids,
    'epochs': epochs.tolist(),
  }
  if jax.process_index() == 0:
    path.write_text(json.dumps(record) + '\n')
  shown = ', '.join(map(str, ids[:8])) + (' ...' if len(ids) > 8 else '')
  kept = 'no checkpoint yet' if last_saved is None else f'step {last_saved}'
  raise NonFiniteLossError(
    f'step {step}: {" and ".join(names)} is not finite; example ids {shown} '
    f'(all in {path.name}); last good checkpoint: {kept}. Lower optim.lr, or '
    'look at these examples.'
  )


def _all_rows(rows: np.ndarray) -> np.ndarray:
  """The rows of all processes, in the loader's order."""
  if jax.process_count() == 1:
    return rows
  return multihost_utils.process_allgather(rows, tiled=True)


def evaluate(
  eval_step: Callable,
  params: types.Params,
  frozen: types.PyTree,
  batches: Iterable[tuple[dict[str, np.ndarray], int]],
  key: types.Key,
) -> dict[str, float]:
  """Means over (batch, number of valid rows); padding rows are cut off.

  eval_step: as make_per_example makes it.
  """
  window = metrics_lib.Window()
  for batch, valid in batches:
    values = eval_step(params, frozen, batch, key)
    for row in range(valid):
      window.add({name: float(value[row]) for name, value in values.items()})
  return window.take()


def _restore_or_start(task, optimizer, options, mesh, checkpointer, loader):
  """State on the mesh and the log window; the loader is at its position."""

  def init(params):
    return state_lib.init_state(
      params, optimizer, use_ema=options.ema_decay > 0
    )

  shapes = jax.eval_shape(init, task.params)
  placement = sharding.state_shardings(shapes, mesh)
  if options.offload:
    placement = offload_lib.place(placement, shapes)
  if checkpointer.latest_step() is None:
    return jax.jit(init, out_shardings=placement)(task.params), {}
  target = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    shapes,
    placement,
  )
  state, record = checkpointer.restore(target)
  loader.set_state(record['position'])
  return state, record['window']


class _Log:
  """Means over the log window, the rates, and who writes them."""

  def __init__(self, workdir, *, first, window, options, schedule):
    self._writer = metrics_lib.Writer(workdir, step=first)
    self._window = metrics_lib.Window(window)
    self._options, self._schedule = options, schedule
    self._started = time.monotonic()
    self.restart_clock(first)

  def restart_clock(self, step):
    """Rates count from here: what came before was no training."""
    self._mark, self._marked = time.monotonic(), step

  def add(self, metrics):
    self._window.add({name: float(value) for name, value in metrics.items()})

  def window(self):
    """What a run that goes on from here must know of the window."""
    return self._window.values()

  def write(self, step) -> dict[str, float]:
    """Writes and returns the window's means."""
    now = time.monotonic()
    values = self._window.take() | {'lr': float(self._schedule(step - 1))}
    if step > self._marked:
      rate = (step - self._marked) / (now - self._mark)
      values |= {
        'time/steps_per_second': rate,
        'time/examples_per_second': rate * self._options.batch_size,
      }
    values['time/seconds'] = now - self._started
    self._writer.write(step, values)
    self.restart_clock(step)
    return values

  def write_eval(self, step, values):
    if values:
      self._writer.write(step, values)
    self.restart_clock(step)

  def close(self):
    self._writer.close()


def _make_evaluate(task, frozen, eval_batches, key, mesh):
  """state -> metrics `eval/NAME/...` of all the task's evaluators."""
  steps = {
    name: make_per_example(fn, mesh) for name, fn in task.evaluators.items()
  }

  def run_all(state):
    params = state_lib.final_params(state)
    values = {}
    for name, fn in steps.items():
      means = evaluate(fn, params, frozen, eval_batches(), key)
      values |= {f'eval/{name}/{k}': v for k, v in means.items()}
    return values

  return run_all


def _place(frozen, seed, mesh):
  """What the step takes beside the state, on the mesh."""
  make_key = jax.jit(
    lambda: jax.random.key(seed), out_shardings=sharding.replicated(mesh)
  )
  placement = sharding.state_shardings(frozen, mesh)
  return jax.device_put(frozen, placement), make_key()


def _make_train_step(task, optimizer, options, state):
  step_fn = step_lib.make_step(
    task.loss,
    optimizer,
    accumulate=options.accumulate,
    ema_decay=options.ema_decay,
  )
  placement = jax.tree.map(lambda leaf: leaf.sharding, state)
  return jax.jit(step_fn, donate_argnums=0, out_shardings=(placement, None))


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
  should_stop: Callable[[int], bool] = lambda step: False,
) -> Result:
  """Trains to `options.num_steps`, continuing from the newest checkpoint.

  Stops with NonFiniteLossError within one step of a NaN; the checkpoint
  before it stays. Everything is logged at step multiples of log_every as the
  mean over the window. should_stop(step): asked after every step but the
  last; where it is true, in all processes, the step is saved and Preempted
  raised.
  """
  checkpointer = checkpoint_lib.Checkpointer(
    workdir, every=options.checkpoint_every, keep=options.keep
  )
  state, window = _restore_or_start(
    task, optimizer, options, mesh, checkpointer, loader
  )
  first, last_saved = int(state.step), checkpointer.latest_step()
  frozen, key = _place(task.frozen, options.seed, mesh)
  train_step = _make_train_step(task, optimizer, options, state)
  evaluate_all = _make_evaluate(task, frozen, eval_batches, key, mesh)
  log = _Log(
    workdir, first=first, window=window, options=options, schedule=schedule
  )
  started = time.monotonic()
  compile_seconds, pending = 0.0, None
  # However the loop ends, a save under way is finished first.
  with (
    contextlib.closing(checkpointer),
    contextlib.closing(log),
    progress_lib.Progress(first, options.num_steps) as progress,
  ):
    for step in range(first + 1, options.num_steps + 1):
      batch = next(loader)
      before = time.monotonic()
      state, metrics = train_step(
        state, frozen, sharding.put_batch(batch, mesh), key
      )
      if step == first + 1:
        jax.block_until_ready(metrics)
        compile_seconds = time.monotonic() - before
        log.restart_clock(step)
      checkpointer.check()
      # One step late, so that the device always has work queued.
      _settle(pending, log, workdir, last_saved)
      pending = (step, metrics, batch)
      last = step == options.num_steps
      due = step == 1 or last or step % options.log_every == 0
      if due or checkpointer.due(step, last=last):
        _settle(pending, log, workdir, last_saved)
        pending = None
      if due:
        progress.update(step, log.write(step))
      if checkpointer.due(step, last=last):
        checkpointer.save(step, state, _record(loader, log))
        last_saved = step
      if last or (options.eval_every and step % options.eval_every == 0):
        log.write_eval(step, evaluate_all(state))
      if not last and should_stop(step):
        _settle(pending, log, workdir, last_saved)
        checkpointer.save(step, state, _record(loader, log))
        checkpointer.wait()
        raise preemption.Preempted(step)
  jax.block_until_ready(state)
  return Result(
    state=state,
    position=loader.get_state(),
    seconds=time.monotonic() - started,
    compile_seconds=compile_seconds,
    steps=options.num_steps - first,
  )


def _record(loader, log):
  """What is saved beside the state, as JSON types."""
  return {'position': loader.get_state(), 'window': log.window()}


def _settle(pending, log, workdir, last_saved):
  """Checks a finished step and takes its metrics into the window."""
  if pending is not None:
    _check_finite(pending, workdir, last_saved)
    log.add(pending[1])
