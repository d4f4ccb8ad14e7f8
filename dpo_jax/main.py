"""python -m dpo_jax.main --config=configs/sd15.py --workdir=runs/sd15"""

import contextlib
import os
import sys

import jax
from absl import logging

from dpo_jax import build, distributed, exits, finish, flags, limits
from dpo_jax.train import compile_cache, loop, preemption, workdir


def run(argv: list[str]) -> int:
  """Trains, evaluates and exports; returns the exit code (exits.Exit)."""
  # What orbax logs, with tracebacks, comes as an exception too.
  logging.set_verbosity(logging.FATAL)
  with exits.Exit() as end:
    argv = distributed.join(argv, os.environ)
    with preemption.Watch() as watch:
      _run(argv, watch)
  return end.code


def _run(argv, watch):
  config, folder = flags.parse(argv)
  distributed.check_started()
  place = workdir.Workdir(folder, config=limits.validate(config))
  with contextlib.ExitStack() as stack:
    with distributed.together():
      stack.enter_context(place)
      distributed.say(place.describe(jax.devices()))
      compile_cache.start(config.train.compile_cache, workdir=folder)
      job = build.build(config)
      for name, record in job.pinned.items():
        place.pin(name, record)
      place.keep_config()

    def should_stop(step):
      place.check()
      return watch.reached(step)

    with watch.looping():
      result = loop.run(
        **job.loop_arguments,
        workdir=place.path,
        should_stop=should_stop,
        selection=job.validation and job.validation.select(place.path),
      )
    finish.finish(job, result, place.path)


if __name__ == '__main__':
  sys.exit(run(sys.argv))
