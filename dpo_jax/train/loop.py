"""The training loop: data in, steps, logs, checkpoints, and a clear stop."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from dpo_jax import distributed, sharding
from dpo_jax import keys as keys_lib
from dpo_jax import task as task_lib
from dpo_jax.train import best as best_lib
from dpo_jax.train import checkpoint as checkpoint_lib
from dpo_jax.train import evaluators as evaluators_lib
from dpo_jax.train import feed as feed_lib
from dpo_jax.train import log as log_lib
from dpo_jax.train import offload as offload_lib
from dpo_jax.train import preemption
from dpo_jax.train import profile as profile_lib
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib
from dpo_jax.train import totals as totals_lib


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
  profile_from: int = 0
  profile_steps: int = 0
  offload: bool = False
  warmup_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run ends with.

  `seconds` and `compile_seconds` are this process's, `steps` the number of
  steps it made itself (fewer than num_steps after a resume), `best` what
  best.json says.
  """

  state: state_lib.TrainState
  position: int
  seconds: float
  compile_seconds: float
  steps: int
  best: dict[str, Any] | None = None


class _Window:
  """The steps since the host last looked at the totals."""

  def __init__(self, workdir: pathlib.Path):
    self._workdir = workdir
    # Step to 'id' and 'epoch' of this process's examples.
    self.rows: dict[int, dict[str, np.ndarray]] = {}

  def read(
    self, totals: totals_lib.Totals, last_saved: int | None
  ) -> totals_lib.Totals:
    """The totals on the host; waits until they are computed.

    Raises NonFiniteLossError for a bad step, after dumping its batch.
    """
    totals = jax.device_get(totals)
    if totals.bad_step:
      self._stop(totals, last_saved)
    self.rows.clear()
    return totals

  def _stop(self, totals, last_saved):
    step = int(totals.bad_step)
    names = [name for name in totals_lib.FATAL if totals.bad[name]]
    rows = self.rows[step]
    ids, epochs = (_all_rows(rows[name]) for name in ('id', 'epoch'))
    ids = keys_lib.id_numbers(ids)
    path = self._workdir / f'nonfinite_step_{step}.json'
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


def _restore_or_start(task, optimizer, options, mesh, checkpointer):
  """(state on the mesh, what was saved beside it or None)."""

  def init(params):
    return state_lib.init_state(
      params,
      optimizer,
      use_ema=options.ema_decay > 0,
      moving=task.moving,
    )

  shapes = jax.eval_shape(init, task.params)
  placement = sharding.state_shardings(shapes, mesh)
  if options.offload:
    placement = offload_lib.place(placement, shapes)
  if checkpointer.latest_step() is None:
    # They may be on the host.
    params = jax.device_put(task.params, placement.params)
    return jax.jit(init, out_shardings=placement)(params), None
  target = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    shapes,
    placement,
  )
  return checkpointer.restore(target)


def _place(frozen, seed, mesh):
  """What the step takes beside the state, on the mesh."""
  make_key = jax.jit(
    lambda: jax.random.key(seed), out_shardings=sharding.replicated(mesh)
  )
  placement = sharding.state_shardings(frozen, mesh)
  return jax.device_put(frozen, placement), make_key()


@dataclasses.dataclass(frozen=True)
class _Ready:
  """All that the steps need; without steps `step` is None.

  totals: where a window goes on that a stop has cut; empty: a new window's.
  """

  state: state_lib.TrainState
  frozen: Any
  key: Any
  feed: feed_lib.Feed
  step: Callable | None = None
  totals: totals_lib.Totals | None = None
  empty: totals_lib.Totals | None = None
  compile_seconds: float = 0.0


def _prepare(task, optimizer, options, mesh, checkpointer, loader) -> _Ready:
  """Restores or starts the state and compiles the step."""
  state, saved = _restore_or_start(task, optimizer, options, mesh, checkpointer)
  if saved is not None:
    loader.set_state(saved['position'])
  feed = feed_lib.Feed(loader, mesh)
  frozen, key = _place(task.frozen, options.seed, mesh)
  ready = _Ready(state, frozen, key, feed)
  if state.step >= options.num_steps:
    return ready
  step_fn = step_lib.make_step(
    task.loss,
    optimizer,
    accumulate=options.accumulate,
    ema_decay=options.ema_decay,
    moving=task.moving,
  )
  arguments = frozen, feed.peek(), key
  _, metrics = jax.eval_shape(step_fn, state, *arguments)
  totals, whole = totals_lib.empty(metrics), sharding.replicated(mesh)
  empty = jax.device_put(totals, whole)
  if saved is not None:
    totals = totals_lib.from_record(saved['window'], names=metrics)
  totals = jax.device_put(totals, whole)
  train_step = jax.jit(
    totals_lib.add_to(step_fn),
    donate_argnums=0,
    out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), whole),
  )
  before = time.monotonic()
  compiled = train_step.lower(state, totals, *arguments).compile()
  distributed.wait_for_all()
  return dataclasses.replace(
    ready,
    step=compiled,
    totals=totals,
    empty=empty,
    compile_seconds=time.monotonic() - before,
  )


def run(
  *,
  task: task_lib.Task,
  optimizer: optax.GradientTransformation,
  schedule: Callable[[int], Any],
  loader: feed_lib.Loader,
  eval_batches: Callable[[], evaluators_lib.Batches],
  options: Options,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
  should_stop: Callable[[int], bool] = lambda step: False,
  selection: best_lib.Selection | None = None,
) -> Result:
  """Trains to `options.num_steps`, continuing from the newest checkpoint.

  After a NaN the run stops with NonFiniteLossError where it next logs or would
  save, and names the step; nothing of it is kept. Everything is logged at step
  multiples of log_every as the mean over the window; between them the host
  waits for no result. should_stop(step): asked after every step but the last;
  where it is true, in all processes, the step is saved and Preempted raised.
  selection: scores the steps of multiples of eval_every and the last one; the
  one with the largest median is saved, and kept.
  """
  started = time.monotonic()
  window = _Window(workdir)
  checkpointer = checkpoint_lib.Checkpointer(
    workdir, every=options.checkpoint_every, keep=options.keep
  )
  # However the run ends, a save under way is finished first.
  with contextlib.ExitStack() as stack:
    stack.callback(checkpointer.close)
    ready = _prepare(task, optimizer, options, mesh, checkpointer, loader)
    state, totals, feed = ready.state, ready.totals, ready.feed
    evaluate_all = evaluators_lib.make_all(
      task, ready.frozen, eval_batches, ready.key, mesh
    )
    first, last_saved = int(state.step), checkpointer.latest_step()
    log, profiler = _observe(stack, workdir, first, options, schedule)
    keeper = best_lib.Keeper(
      selection, checkpointer, log, workdir=workdir, first=first
    )
    if first and _evaluates(first, options):
      keeper.catch_up(first, state)
    for step in range(first + 1, options.num_steps + 1):
      behind = totals
      window.rows[step], batch = feed.take()
      profiler.before(step)
      state, totals = ready.step(state, totals, ready.frozen, batch, ready.key)
      profiler.after(step, totals)
      last = step == options.num_steps
      if not last:
        feed.load()
      # Fetches nothing; but two steps are under way at most, so that batches
      # that wait for theirs do not fill the memory.
      jax.block_until_ready(behind)
      checkpointer.check()
      stops = not last and should_stop(step)
      logs = step == 1 or last or step % options.log_every == 0
      saves = stops or checkpointer.due(step, last=last)
      scores = selection and not stops and _evaluates(step, options)
      if logs or saves or scores:
        totals = window.read(totals, last_saved)
      if logs:
        log.write(step, totals)
        totals = ready.empty
      # Before the save: a step that counts as measured was saved with that.
      if scores and keeper.measure(step, state):
        saves = True
      if saves:
        checkpointer.save(step, state, _record(feed, totals))
        last_saved = step
      if stops:
        checkpointer.wait()
      if _evaluates(step, options):
        log.write_eval(step, evaluate_all(state))
      if stops:
        raise preemption.Preempted(step)
  jax.block_until_ready(state)
  return Result(
    state=state,
    position=feed.position,
    seconds=time.monotonic() - started,
    compile_seconds=ready.compile_seconds,
    steps=options.num_steps - first,
    best=keeper.best,
  )


def _evaluates(step: int, options: Options) -> bool:
  every = options.eval_every
  return step == options.num_steps or bool(every and step % every == 0)


def _observe(stack, workdir, first, options, schedule):
  """(log, profiler), which end with the stack."""
  log = log_lib.Log(
    workdir,
    first=first,
    num_steps=options.num_steps,
    batch_size=options.batch_size,
    schedule=schedule,
    warmup_steps=options.warmup_steps,
  )
  profiler = profile_lib.Profiler(
    workdir, first=options.profile_from, count=options.profile_steps
  )
  return stack.enter_context(log), stack.enter_context(profiler)


def _record(feed, totals):
  """What is saved beside the state, as JSON types."""
  return {
    'position': feed.position,
    'window': totals_lib.to_record(totals),
  }
