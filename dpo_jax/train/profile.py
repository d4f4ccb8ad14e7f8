"""A window of steps in JAX's profiler, for TensorBoard or Perfetto."""

import os
from typing import Any

import jax


class Profiler:
  """Traces steps `first` to `first + count - 1` of this process.

  The trace is in `workdir/profile`; `tensorboard --logdir` shows it (with the
  plugin of xprof), and the file *.trace.json.gz opens in ui.perfetto.dev.
  """

  def __init__(self, workdir: str | os.PathLike, *, first: int, count: int):
    """first: 0 is off. A window that a resumed run starts inside is left."""
    self._folder = os.path.join(os.fspath(workdir), 'profile')
    self._first, self._last = first, first + count - 1
    self._running = False

  def before(self, step: int) -> None:
    """Starts where the window begins."""
    if step == self._first:
      jax.profiler.start_trace(self._folder)
      self._running = True

  def after(self, step: int, results: Any) -> None:
    """Ends with the window, once its `results` are computed."""
    if self._running and step >= self._last:
      jax.block_until_ready(results)
      self._stop()

  def _stop(self):
    self._running = False
    jax.profiler.stop_trace()

  def __enter__(self):
    """Traces nothing yet."""
    return self

  def __exit__(self, *unused):
    """Ends a trace that is under way."""
    if self._running:
      self._stop()
