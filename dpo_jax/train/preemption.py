"""SIGTERM and SIGINT: stop after a step that all processes finish.

Several processes must stop after the same step. JAX's coordination service
sees SIGTERM itself and settles on one; a single process just looks at a flag.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(BaseException):
  """The run was asked to stop; `step` is saved, None outside of the steps.

  No Exception, like KeyboardInterrupt: it may come anywhere.
  """

  def __init__(self, step: int | None = None):
    """Says what was saved."""
    what = 'outside of the training steps'
    if step is not None:
      what = f'after step {step}, which is saved'
    super().__init__(
      f'stopped by a signal {what}; the same command continues the run'
    )
    self.step = step


class Watch:
  """Context manager that takes the signals while it is open.

  A second SIGINT stops at once. With several processes SIGTERM is JAX's and
  SIGINT becomes SIGTERM.
  """

  def __init__(self):
    """Takes nothing yet."""
    self._asked = False
    self._looping = False
    self._before = {}

  def __enter__(self):
    """Takes the signals; does nothing outside of the main thread."""
    if threading.current_thread() is threading.main_thread():
      taken = SIGNALS[1:] if jax.process_count() > 1 else SIGNALS
      for number in taken:
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *unused):
    """Puts back what was there."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number, frame):
    del frame
    if self._asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._asked = True
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    elif not self._looping:
      raise Preempted

  @contextlib.contextmanager
  def looping(self) -> Iterator[None]:
    """Within it the signals wait for `reached`; outside they stop at once."""
    self._looping = True
    try:
      yield
    finally:
      self._looping = False

  def reached(self, step: int) -> bool:
    """Whether to stop after `step`, the same answer in all processes.

    All of them ask after every step.
    """
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked
