"""python -m dpo_jax.main --config=configs/sd15.py --workdir=runs/sd15"""

import sys

import jax

from dpo_jax import build, finish, flags, limits
from dpo_jax.train import loop, workdir

USAGE_ERROR, RUN_ERROR = 2, 3


def run(argv: list[str]) -> int:
  """Trains, evaluates and exports; returns the process's exit code.

  2: the user's input is wrong, one line on standard error says how.
  3: the run cannot go on (a loss that is not finite).
  """
  try:
    config, folder = flags.parse(argv)
    record = limits.validate(config)
    with workdir.Workdir(folder, config=record) as place:
      print(place.describe(jax.devices()), file=sys.stderr)
      job = build.build(config)
      for name, record in job.pinned.items():
        place.pin(name, record)
      place.keep_config()
      result = loop.run(**job.loop_arguments, workdir=place.path)
      finish.finish(job, result, place.path)
  except loop.NonFiniteLossError as error:
    print(f'error: {error}', file=sys.stderr)
    return RUN_ERROR
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return USAGE_ERROR
  return 0


if __name__ == '__main__':
  sys.exit(run(sys.argv))
