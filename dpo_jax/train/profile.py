"""A window of steps in JAX's profiler, for TensorBoard or Perfetto."""

import contextlib
import os
from typing import Any

import jax

from dpo_jax import folders


class Profiler:
  """Traces steps `first` to `first + count - 1` of this process.

  The trace is in `workdir/profile`; `tensorboard --logdir` shows it (with the
  plugin of xprof), and the file *.trace.json.gz opens in ui.perfetto.dev.
  """

  def __init__(self, workdir: str | os.PathLike, *, first: int, count: int):
    """first: 0 is off. A window that a resumed run starts inside is left."""
    self._folder = folders.to_path(workdir) / 'profile'
    self._first, self._last = first, first + count - 1
    self._stack = None

  def before(self, step: int) -> None:
    """Starts where the window begins."""
    if step == self._first:
      self._stack = contextlib.ExitStack()
      place = self._stack.enter_context(folders.on_disk(self._folder))
      jax.profiler.start_trace(str(place))

  def after(self, step: int, results: Any) -> None:
    """Ends with the window, once its `results` are computed."""
    if self._stack is not None and step >= self._last:
      jax.block_until_ready(results)
      self._stop()

  def _stop(self):
    jax.profiler.stop_trace()
    self._stack.close()
    self._stack = None

  def __enter__(self):
    """Traces nothing yet."""
    return self

  def __exit__(self, *unused):
    """Ends a trace that is under way."""
    if self._stack is not None:
      self._stop()
