"""How a run ends: its exit code, and one line on standard error."""

import os
import sys

import jax

from dpo_jax import distributed
from dpo_jax.train import checkpoint, lock, loop, preemption

USAGE_ERROR, RUN_ERROR, PREEMPTED = 2, 3, 4
_RUN_ERRORS = (
  loop.NonFiniteLossError,
  checkpoint.SaveError,
  lock.LostError,
  distributed.OtherProcessError,
)


class Exit:
  """Context manager that turns the ends of a run into `code`.

  0: the run is done.
  2: the user's input is wrong, one line on standard error says how.
  3: the run cannot go on (a loss that is not finite, a full disk, another
  process that is gone).
  4: stopped by SIGTERM or SIGINT; the last finished step is saved and the
  same command continues the run.

  Other errors pass: they are mistakes of the program.
  """

  def __init__(self):
    """The code of a run that has not failed is 0."""
    self.code = 0

  def __enter__(self):
    """Nothing to open."""
    return self

  def __exit__(self, kind, error, trace):
    """Says what happened; ends the process where others are gone."""
    if isinstance(error, preemption.Preempted):
      distributed.say(str(error))
      self.code = PREEMPTED
    elif isinstance(error, _RUN_ERRORS):
      self.code = _say(error, RUN_ERROR)
    elif isinstance(error, jax.errors.JaxRuntimeError):
      if not jax.distributed.is_initialized():
        return False
      _leave(_say(distributed.explain(error), RUN_ERROR))
    elif isinstance(error, ValueError | OSError):
      self.code = _say(error, USAGE_ERROR)
    else:
      return False
    return True


def _say(error: object, code: int) -> int:
  print(f'error: {error}', file=sys.stderr)
  return code


def _leave(code: int) -> None:
  """Ends the process at once: there is nobody to wait for."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
