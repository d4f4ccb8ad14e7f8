"""A small model's DPO training on this device against CPU and float32.

  python -m benchmarks.device_check [--size=tiny] [--pairs=8] [--steps=200]
    [--json=FILE]

Trains the same random policy on the same batches, once on the CPU in float32,
then on the default device in float32 (products in full precision) and in
bfloat16. Prints the loss at the start and at the end, the largest difference
of the loss curves, and of the first gradients (of their largest entry, worst
tensor). Ends with 1 if float32 on the device is off by more than 1e-3 in its
first gradient or bfloat16 by more than 0.1.
"""

import argparse
import json
import pathlib
import sys

import jax
import numpy as np
import optax

from benchmarks import cases
from dpo_jax.train import optimizer as optimizer_lib
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib

BATCHES = 8
LEARNING_RATE = 1e-5
# Of a tensor's largest gradient: what is more than rounding.
LIMITS = {'float32': 1e-3, 'bfloat16': 0.1}


def _optimizer():
  return optimizer_lib.make_optimizer(
    name='adamw',
    schedule=lambda step: LEARNING_RATE,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=1.0,
  )


def run(size: str, device: jax.Device, *, dtype: str, pairs: int, steps: int):
  """(losses [steps], first gradient up to a factor) of a run, numpy."""
  with (
    jax.default_device(device),
    jax.default_matmul_precision(
      'highest' if dtype == 'float32' else 'default'
    ),
  ):
    task = cases.make_task(size, cases.random_params(size), dtype=dtype)
    batches = [cases.random_batch(size, pairs, seed=i) for i in range(BATCHES)]
    optimizer, key = _optimizer(), jax.random.key(0)
    frozen = jax.device_put(task.frozen, device)
    step = jax.jit(step_lib.make_step(task.loss, optimizer), donate_argnums=0)
    state = state_lib.init_state(
      jax.device_put(task.params, device), optimizer, use_ema=False
    )
    losses = []
    for i in range(steps):
      state, metrics = step(state, frozen, batches[i % BATCHES], key)
      losses.append(metrics['loss'])
      if i == 0:
        # A tenth of the clipped gradient: nothing more to compile.
        moment = optax.tree_utils.tree_get(state.opt_state, 'mu')
        gradient = jax.device_get(moment)
    return np.array([float(loss) for loss in losses]), gradient


def apart(gradient, wanted) -> float:
  """Largest difference over the tensor's largest entry, worst tensor."""
  ratios = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)),
    gradient,
    wanted,
  )
  return max(jax.tree.leaves(ratios))


def main(argv: list[str]) -> int:
  """Prints the table; 1 where the device is off."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--size', choices=tuple(cases.SIZES), default='tiny')
  parser.add_argument('--pairs', type=int, default=8)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--json', default='')
  values = parser.parse_args(argv)
  options = {'pairs': values.pairs, 'steps': values.steps}
  wanted, wanted_gradient = run(
    values.size, jax.devices('cpu')[0], dtype='float32', **options
  )
  device, records, good = jax.devices()[0], [], True
  print(f'cpu float32: loss {wanted[0]:.6f} to {wanted[-1]:.6f}')
  for dtype, limit in LIMITS.items():
    losses, gradient = run(values.size, device, dtype=dtype, **options)
    off = apart(gradient, wanted_gradient)
    good &= off <= limit
    records.append(
      {
        'device': device.device_kind,
        'dtype': dtype,
        'gradient_apart': off,
        'curve_apart': float(np.abs(losses - wanted).max()),
        'losses': losses.tolist(),
      }
    )
    print(
      f'{device.device_kind} {dtype}: loss {losses[0]:.6f} to '
      f'{losses[-1]:.6f}, curves apart by {records[-1]["curve_apart"]:.2e}, '
      f'first gradient by {off:.2e} (at most {limit:g})',
      flush=True,
    )
  if values.json:
    record = {'cpu': wanted.tolist(), 'runs': records}
    pathlib.Path(values.json).write_text(json.dumps(record))
  return 0 if good else 1


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
