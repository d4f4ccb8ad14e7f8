"""Plans a config for cpu:N, runs its step, prints both on the last line.

  python tests/tools/plan_and_run.py --config=... --topology=cpu:8 ...

{"planned": bytes, "measured": bytes} of all devices together. Measured is what
the step's arguments take, and by how much the process' resident memory then
grows at most while the step runs: temporaries, results, and what the CPU
backend takes beside the compiler's plan (packed operands of its products).
"""

import contextlib
import ctypes
import gc
import io
import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from dpo_jax.planning import chips, devices, shapes
from dpo_jax.planning import step as step_lib
from dpo_jax.tools import plan


def _status(name: str) -> int:
  """Bytes that the kernel tells of this process: VmRSS or VmHWM."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith(f'{name}:'):
      return int(line.split()[1]) * 1024
  raise RuntimeError(f'no {name} in /proc/self/status')


def _ones(shapes):
  """Arguments in buffers of their own: numpy's are shared, never donated."""

  def make():
    return jax.tree.map(
      lambda leaf: (
        jax.random.key(0)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.ones(leaf.shape, leaf.dtype)
      ),
      shapes,
    )

  places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
  return jax.block_until_ready(jax.jit(make, out_shardings=places)())


def main(argv):
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    plan.main([*argv, '--json'])
  record = json.loads(printed.getvalue().splitlines()[-1])
  own, rest = plan._split(argv)
  config = plan._read(rest)
  problem = step_lib.make_problem(
    config,
    shapes.read_model(config.model.folder),
    devices.make(chips.parse_topology(own.topology)),
    from_cache=record['from_cache'],
  )
  step = jax.jit(
    problem.step, donate_argnums=0, out_shardings=problem.out_shardings
  )
  compiled = step.lower(*problem.arguments).compile()
  arguments = _ones(problem.arguments)
  held = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(arguments)
    for shard in getattr(leaf, 'addressable_shards', ())
    if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  )
  # What is free is given back, and the high-water mark is set to what is left.
  gc.collect()
  ctypes.CDLL('libc.so.6').malloc_trim(0)
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  before = _status('VmRSS')
  jax.block_until_ready(compiled(*arguments))
  grown = _status('VmHWM') - before
  planned = record['peak_bytes_per_device'] * record['n_devices']
  print(json.dumps({'planned': planned, 'measured': held + grown} | record))


if __name__ == '__main__':
  main(sys.argv[1:])
