"""python -m dpo_jax.main --config=configs/sd15.py --workdir=runs/sd15"""

import contextlib
import os
import sys

import jax
from absl import logging

from dpo_jax import build, distributed, finish, flags, limits
from dpo_jax.train import checkpoint, compile_cache, loop, preemption, workdir

USAGE_ERROR, RUN_ERROR, PREEMPTED = 2, 3, 4


def run(argv: list[str]) -> int:
  """Trains, evaluates and exports; returns the process's exit code.

  2: the user's input is wrong, one line on standard error says how.
  3: the run cannot go on (a loss that is not finite, a full disk, another
  process that is gone).
  4: stopped by SIGTERM or SIGINT; the last finished step is saved and the
  same command continues the run.
  """
  # What orbax logs, with tracebacks, comes as an exception too.
  logging.set_verbosity(logging.FATAL)
  try:
    argv, environment = distributed.take_flags(argv, os.environ)
    if not jax.distributed.is_initialized():
      distributed.start(distributed.read_settings(environment))
    with preemption.Watch() as watch:
      _run(argv, watch)
  except preemption.Preempted as stop:
    distributed.say(str(stop))
    return PREEMPTED
  except (
    loop.NonFiniteLossError,
    checkpoint.SaveError,
    distributed.OtherProcessError,
  ) as error:
    print(f'error: {error}', file=sys.stderr)
    return RUN_ERROR
  except jax.errors.JaxRuntimeError as error:
    if not jax.distributed.is_initialized():
      raise
    print(f'error: {distributed.explain(error)}', file=sys.stderr)
    distributed.leave(RUN_ERROR)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return USAGE_ERROR
  return 0


def _run(argv, watch):
  config, folder = flags.parse(argv)
  distributed.check_started()
  place = workdir.Workdir(folder, config=limits.validate(config))
  with contextlib.ExitStack() as stack:
    with distributed.together():
      stack.enter_context(place)
      distributed.say(place.describe(jax.devices()))
      compile_cache.start(
        compile_cache.choose(
          config.train.compile_cache,
          workdir=folder,
          platform=jax.devices()[0].platform,
        )
      )
      job = build.build(config)
      for name, record in job.pinned.items():
        place.pin(name, record)
      place.keep_config()
    with watch.looping():
      result = loop.run(
        **job.loop_arguments, workdir=place.path, should_stop=watch.reached
      )
    finish.finish(job, result, place.path)


if __name__ == '__main__':
  sys.exit(run(sys.argv))
