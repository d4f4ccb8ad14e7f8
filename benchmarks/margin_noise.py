"""The margin of policy against an equal reference, by precision and path.

  python -m benchmarks.margin_noise [--size=tiny] [--pairs=64] [--seeds=1]
    [--rows=ROW,...] [--json=FILE]

At beta 5000 the DPO margin multiplies differences of denoising errors by
2,500. With equal weights it must be 0; what it is instead is rounding. Each
row compiles loss and gradient of the real preference task in one jit, with
the gradient returned (else it is not computed, and both passes compile alike),
and prints the margin's standard deviation over all pairs; the same for a
policy that has moved, against float32 ('moved'), beside the spread of that
policy's margins ('margin'); and what the row costs: FLOPs
that the compiler counts (a loop's body once), its temporary memory and the
fastest of five runs. `--rows=list` shows the names.
"""

import argparse
import dataclasses
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases
from dpo_jax import task as task_lib
from dpo_jax import trees
from dpo_jax.tasks import reference

NO_EXCESS = {'xla_allow_excess_precision': False}
# Relative change of every weight of the policy that has moved.
MOVE = 3e-4


def keep_residuals(err_fn, policy, ref, inputs):
  """The reference differentiated too, its pullback dropped behind a barrier.

  Measured only: the barrier must keep the residuals of both in memory.
  """
  err, pullback = jax.vjp(lambda params: err_fn(params, inputs), ref)
  err, _ = jax.lax.optimization_barrier((err, jax.tree.leaves(pullback)))
  return err_fn(policy, inputs), jax.lax.stop_gradient(err)


def drop_pullback(err_fn, policy, ref, inputs):
  """The reference differentiated too, its pullback not used. Measured only."""
  err, _ = jax.vjp(lambda params: err_fn(params, inputs), ref)
  return err_fn(policy, inputs), jax.lax.stop_gradient(err)


def map_stacked(err_fn, policy, ref, inputs):
  """lax.map over both, 12 passes for 8. Measured only."""
  stacked = jax.tree.map(
    lambda a, b: jnp.stack([a, jax.lax.stop_gradient(b)]), policy, ref
  )
  policy_err, ref_err = jax.lax.map(lambda p: err_fn(p, inputs), stacked)
  return policy_err, ref_err


def _bf16(compute_errs, compiler_options=None, **options):
  options |= {'dtype': 'bfloat16', 'compute_errs': compute_errs}
  return options, compiler_options


# name -> (options of cases.make_task, options of the compiler).
ROWS = {
  'float32 separate': ({'compute_errs': reference.separate}, None),
  'float32 loop': ({'compute_errs': reference.loop}, None),
  'bfloat16 separate': _bf16(reference.separate),
  'bfloat16 loop': _bf16(reference.loop),
  'bfloat16 revalued': _bf16(reference.revalued),
  'bfloat16 map_stacked': _bf16(map_stacked),
  'bfloat16 drop_pullback': _bf16(drop_pullback),
  'bfloat16 keep_residuals': _bf16(keep_residuals),
  'bfloat16 separate, no excess': _bf16(reference.separate, NO_EXCESS),
  'bfloat16 keep_residuals, no excess': _bf16(keep_residuals, NO_EXCESS),
  'bfloat16 separate, remat full': _bf16(reference.separate, remat='full'),
  'bfloat16 loop, remat full': _bf16(reference.loop, remat='full'),
  'bfloat16 separate, sequential': _bf16(reference.separate, sequential=True),
  'bfloat16 separate, float32 residuals': _bf16(
    reference.separate, residual_dtype='float32'
  ),
  'bfloat16 loop, float32 residuals': _bf16(
    reference.loop, residual_dtype='float32'
  ),
  'bfloat16 separate, bfloat16 reference': _bf16(
    reference.separate, ref_dtype=jnp.bfloat16
  ),
  'bfloat16 loop, bfloat16 reference': _bf16(
    reference.loop, ref_dtype=jnp.bfloat16
  ),
  'bfloat16 loop, bfloat16 master': _bf16(
    reference.loop, ref_dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
  ),
  'bfloat16 loop, int8 reference': _bf16(
    reference.loop, ref_dtype=jnp.dtype('int8')
  ),
  'bfloat16 loop, float8 reference': _bf16(
    reference.loop, ref_dtype=jnp.dtype('float8_e4m3fn')
  ),
  'float32 loop, bfloat16 reference': (
    {'compute_errs': reference.loop, 'ref_dtype': jnp.bfloat16},
    None,
  ),
  'float32 loop, int8 reference': (
    {'compute_errs': reference.loop, 'ref_dtype': jnp.dtype('int8')},
    None,
  ),
}


@dataclasses.dataclass
class Compiled:
  """Margins and gradient of a task in one program.

  `margins(params, batch)` is [b], float64 numpy; the gradient is computed and
  returned to here, or the reference's pass would compile as the policy's.
  """

  task: task_lib.Task
  executable: jax.stages.Compiled
  compile_seconds: float

  def run(self, params, batch):
    """(gradient, margins [b]) on the device."""
    return self.executable(params, self.task.frozen, batch, jax.random.key(0))

  def margins(self, params, batch):
    """Margins [b] as numpy, once everything is computed."""
    return np.asarray(jax.block_until_ready(self.run(params, batch))[1])


def compile_margins(
  task: task_lib.Task, batch: dict, compiler_options: dict | None = None
) -> Compiled:
  """Compiles gradient and margins of a task for batches like this one."""

  def loss(params, frozen, batch, key):
    value, metrics = task.loss(params, frozen, batch, key)
    return jnp.mean(value), metrics['reward/margin']

  started = time.perf_counter()
  executable = (
    jax.jit(jax.grad(loss, has_aux=True))
    .lower(task.params, task.frozen, batch, jax.random.key(0))
    .compile(compiler_options)
  )
  return Compiled(task, executable, time.perf_counter() - started)


def moved(params):
  """Params with every entry changed by MOVE times a normal number of its own.

  Always the same for the same tree.
  """
  rng = np.random.default_rng(9)

  def move(leaf):
    noise = rng.standard_normal(leaf.shape, np.float32)
    changed = np.asarray(leaf, np.float32) * (1 + np.float32(MOVE) * noise)
    return jnp.asarray(changed, leaf.dtype)

  return jax.tree.map(move, params)


def _costs(compiled: Compiled, batch) -> dict[str, float]:
  analysis = compiled.executable.cost_analysis() or {}
  memory = compiled.executable.memory_analysis()
  seconds = []
  for _ in range(5):
    started = time.perf_counter()
    jax.block_until_ready(compiled.run(compiled.task.params, batch))
    seconds.append(time.perf_counter() - started)
  return {
    'gflop': analysis.get('flops', np.nan) / 1e9,
    'temp_mib': memory.temp_size_in_bytes / 2**20 if memory else np.nan,
    'seconds': min(seconds),
    'compile_seconds': compiled.compile_seconds,
  }


def measure(size: str, rows: list[str], *, pairs: int, seeds: int):
  """Yields a record a row: sd and max of the margin, moved, costs.

  'moved' is the standard deviation of the margin's difference to float32's
  for the moved policy, nan where no float32 row came before; with a rounded
  reference it holds the rounding of the weights too.
  """
  params = cases.random_params(size)
  batches = [cases.random_batch(size, pairs, seed=i) for i in range(seeds)]
  exact = None
  for name in rows:
    options, compiler_options = ROWS[name]
    task = cases.make_task(size, params, **options)
    compiled = compile_margins(task, batches[0], compiler_options)
    at_start = np.concatenate(
      [compiled.margins(task.params, batch) for batch in batches]
    )
    policy = moved(task.params)
    after = np.concatenate(
      [compiled.margins(policy, batch) for batch in batches]
    )
    if exact is None and name.startswith('float32'):
      exact = after
    yield {
      'row': name,
      'sd': float(at_start.std()),
      'max': float(np.abs(at_start).max()),
      'moved': float(np.std(after - exact)) if exact is not None else np.nan,
      'moved_size': float(after.std()),
      **_costs(compiled, batches[0]),
    }


def main(argv: list[str]) -> int:
  """Prints the table, a row as soon as it is measured."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--size', choices=tuple(cases.SIZES), default='tiny')
  parser.add_argument('--pairs', type=int, default=64)
  parser.add_argument('--seeds', type=int, default=1)
  parser.add_argument('--rows', default=','.join(ROWS))
  parser.add_argument('--json', default='')
  values = parser.parse_args(argv)
  if values.rows == 'list':
    print('\n'.join(ROWS))
    return 0
  rows = _split(values.rows)
  unknown = [row for row in rows if row not in ROWS]
  if unknown:
    print(f'error: --rows={unknown}: see --rows=list', file=sys.stderr)
    return 2
  count = trees.count(cases.random_params(values.size))
  device = jax.devices()[0]
  print(
    f'{values.size}: {count:,} parameters, '
    f'{values.pairs * values.seeds} pairs, beta {cases.BETA:.0f}, '
    f'{device.device_kind}, jax {jax.__version__}'
  )
  print(
    f'{"":38s}      sd     max   moved  margin   GFLOP  temp MiB       s '
    'compile s'
  )
  records = []
  for record in measure(
    values.size, rows, pairs=values.pairs, seeds=values.seeds
  ):
    records.append(record)
    print(
      f'{record["row"]:38s} {record["sd"]:7.4f} {record["max"]:7.4f} '
      f'{record["moved"]:7.4f} {record["moved_size"]:7.4f} '
      f'{record["gflop"]:7.2f} '
      f'{record["temp_mib"]:9.1f} {record["seconds"]:7.3f} '
      f'{record["compile_seconds"]:7.1f}',
      flush=True,
    )
  if values.json:
    with open(values.json, 'w', encoding='utf-8') as file:
      json.dump({'device': device.device_kind, 'rows': records}, file)
  return 0


def _split(text: str) -> list[str]:
  """Names of rows, which hold ', ' themselves."""
  return [
    word.replace('\0', ', ') for word in text.replace(', ', '\0').split(',')
  ]


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
