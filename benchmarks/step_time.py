"""Time, FLOP/s and memory of the training step of a config.

  python -m benchmarks.step_time --config=configs/quickstart.py [--steps=20]

Prints one table: compile time apart, then the median, fastest and slowest
step after a warm-up, examples a second, model FLOP/s and peak memory. FLOPs
are those the compiler counts over all devices, matrix products and the rest;
with model.remat=full they include what is computed again, and the table says
so. Overrides as for dpo_jax.main.
"""

import resource
import statistics
import sys
import tempfile
import time

import jax

from dpo_jax import build, flags, limits, sharding
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib


def _take(argv: list[str], name: str, default: int) -> tuple[list[str], int]:
  prefix = f'--{name}='
  values = [word for word in argv if word.startswith(prefix)]
  rest = [word for word in argv if not word.startswith(prefix)]
  return rest, int(values[-1].removeprefix(prefix)) if values else default


def _flops(compiled, accumulate: int, devices: int) -> float:
  analysis = compiled.cost_analysis() or {}
  if isinstance(analysis, list):
    analysis = analysis[0]
  # The compiler counts one device's program, and the body of the
  # accumulation loop once.
  return float(analysis.get('flops', 0.0)) * accumulate * devices


def _peak_bytes(device: jax.Device) -> tuple[int, str]:
  stats = device.memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use'], 'device'
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return peak, 'whole process'


def main(argv: list[str]) -> int:
  """Prints the table; returns 2 with one line for bad input."""
  argv, steps = _take(argv, 'steps', 20)
  if not any(word.startswith('--workdir') for word in argv):
    argv = [*argv, f'--workdir={tempfile.gettempdir()}']
  try:
    config, _ = flags.parse(argv)
    record = limits.validate(config)
    job = build.build(config)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  given = job.loop_arguments
  task, options, mesh = given['task'], given['options'], given['mesh']
  state = state_lib.init_state(
    task.params, given['optimizer'], use_ema=options.ema_decay > 0
  )
  state = jax.device_put(state, sharding.state_shardings(state, mesh))
  frozen = jax.device_put(task.frozen, sharding.replicated(mesh))
  batch = sharding.put_batch(next(given['loader']), mesh)
  key = jax.random.key(options.seed)
  step = jax.jit(
    step_lib.make_step(
      task.loss,
      given['optimizer'],
      accumulate=options.accumulate,
      ema_decay=options.ema_decay,
    ),
    donate_argnums=0,
  )
  started = time.perf_counter()
  compiled = step.lower(state, frozen, batch, key).compile()
  compile_seconds = time.perf_counter() - started
  times = []
  for _ in range(steps + 2):
    started = time.perf_counter()
    state, metrics = compiled(state, frozen, batch, key)
    jax.block_until_ready((state, metrics))
    times.append(time.perf_counter() - started)
  times = times[2:]
  median = statistics.median(times)
  flops = _flops(compiled, options.accumulate, mesh.devices.size)
  again = ' with remat' if record['model']['remat'] != 'none' else ''
  peak, whose = _peak_bytes(mesh.devices.flat[0])
  examples = 'pairs' if record['task'] == 'preference' else 'images'
  rows = [
    ('task', record['task']),
    ('devices', f'{mesh.devices.size} x {mesh.devices.flat[0].device_kind}'),
    ('jax', jax.__version__),
    (f'{examples} a step', options.batch_size),
    ('compile', f'{compile_seconds:.1f} s'),
    ('step, median of ' + str(steps), f'{median * 1e3:.1f} ms'),
    ('step, fastest', f'{min(times) * 1e3:.1f} ms'),
    ('step, slowest', f'{max(times) * 1e3:.1f} ms'),
    (f'{examples} a second', f'{options.batch_size / median:.2f}'),
    (f'FLOP a step{again}', f'{flops:.3e}' if flops else 'not counted here'),
    (
      f'FLOP/s{again}',
      f'{flops / median:.3e}' if flops else 'not counted here',
    ),
    (f'peak memory ({whose})', f'{peak / 2**20:.0f} MiB'),
  ]
  for name, value in rows:
    print(f'{name:28s} {value}')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
