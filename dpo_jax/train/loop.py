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

from dpo_jax import keys as keys_lib
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
  ids = keys_lib.id_numbers(batch['id'])
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

  def init(params):
    return state_lib.init_state(
      params, optimizer, use_ema=options.ema_decay > 0
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


class _Log:
  """Means over the log window, the rates, and who writes them."""

  def __init__(self, workdir, *, first, options, schedule):
    self._writer = metrics_lib.Writer(workdir, step=first)
    self._window = metrics_lib.Window()
    self._options, self._schedule = options, schedule
    self._started = time.monotonic()
    self.restart_clock(first)

  def restart_clock(self, step):
    """Rates count from here: what came before was no training."""
    self._mark, self._marked = time.monotonic(), step

  def add(self, metrics):
    self._window.add({name: float(value) for name, value in metrics.items()})

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
    name: jax.jit(step_lib.make_eval_step(fn))
    for name, fn in task.evaluators.items()
  }

  def run_all(state):
    params = state_lib.final_params(state)
    values = {}
    for name, fn in steps.items():
      means = evaluate(fn, params, frozen, eval_batches(), key, mesh)
      values |= {f'eval/{name}/{k}': v for k, v in means.items()}
    return values

  return run_all


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
  first, last_saved = int(state.step), checkpointer.latest_step()
  frozen = jax.device_put(
    task.frozen, sharding.state_shardings(task.frozen, mesh)
  )
  key = jax.device_put(jax.random.key(options.seed), sharding.replicated(mesh))
  step_fn = step_lib.make_step(
    task.loss,
    optimizer,
    accumulate=options.accumulate,
    ema_decay=options.ema_decay,
  )
  placement = jax.tree.map(lambda leaf: leaf.sharding, state)
  train_step = jax.jit(
    step_fn, donate_argnums=0, out_shardings=(placement, None)
  )
  evaluate_all = _make_evaluate(task, frozen, eval_batches, key, mesh)
  log = _Log(workdir, first=first, options=options, schedule=schedule)
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
        checkpointer.save(step, state, loader.get_state())
        last_saved = step
      if last or (options.eval_every and step % options.eval_every == 0):
        log.write_eval(step, evaluate_all(state))
  jax.block_until_ready(state)
  return Result(
    state=state,
    position=loader.get_state(),
    seconds=time.monotonic() - started,
    compile_seconds=compile_seconds,
    steps=options.num_steps - first,
  )


def _settle(pending, log, workdir, last_saved):
  """Checks a finished step and takes its metrics into the window."""
  if pending is not None:
    _check_finite(pending, workdir, last_saved)
    log.add(pending[1])
