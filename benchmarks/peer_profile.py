"""Where a DPO step's time goes on a CPU, ours and PyTorch's, by operation.

  python -m benchmarks.peer_profile [--size=small] [--pairs=2] [--steps=3]
    [--program=ours|torch]

Both in float32, without compilation on PyTorch's side; run it once for each
program. Seconds a step that the operations of a kind ran for. XLA's are told
apart by the dimensions of the compiled program's convolutions; PyTorch's
profiler joins both gradients of a convolution in one operation.
"""

import argparse
import collections
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp

from benchmarks import cases, peer_torch
from dpo_jax.tasks import reference

KINDS = (
  'convolution, forward',
  'convolution, gradient of the input',
  'convolution, gradient of the kernel',
  'convolution, both gradients',
  'matrix products and attention',
  'everything else',
)
# PyTorch's names, by prefix, for KINDS but the last.
TORCH = {
  'aten::mkldnn_convolution': KINDS[0],
  'aten::thnn_conv2d': KINDS[0],
  'aten::_slow_conv2d_forward': KINDS[0],
  'aten::convolution_backward': KINDS[3],
  **dict.fromkeys(
    (
      'aten::mm',
      'aten::addmm',
      'aten::bmm',
      'aten::baddbmm',
      'aten::_scaled_dot_product_flash',
      'aten::mkldnn_linear',
    ),
    KINDS[4],
  ),
}


def kinds_of_program(text: str) -> dict[str, str]:
  """Instruction's name -> kind, from the text of a compiled program."""
  found = {}
  for line in text.splitlines():
    match = re.match(r'\s*(?:ROOT )?%?([\w.-]+) = \S+ ([\w-]+)\(', line)
    if not match:
      continue
    name, opcode = match.groups()
    labels = re.search(r'dim_labels=\w+_(\w+)->(\w+)', line)
    if labels:
      kernel, output = labels.groups()
      # A gradient of the kernel has a kernel's dimensions, 01io; that of the
      # input takes the kernel with its channels exchanged.
      if output.startswith('01'):
        found[name] = KINDS[2]
      else:
        found[name] = KINDS[1] if kernel.endswith('oi') else KINDS[0]
    elif opcode == 'dot' or ('dot_general' in line and opcode == 'fusion'):
      found[name] = KINDS[4]
    else:
      found[name] = KINDS[5]
  return found


def profile_ours(values: argparse.Namespace) -> dict[str, float]:
  """Seconds a step by kind, of the gradient that the step takes."""
  task = cases.make_task(
    values.size,
    cases.random_params(values.size),
    compute_errs=reference.separate,
  )
  batch = jax.device_put(cases.random_batch(values.size, values.pairs))
  frozen, params = jax.device_put((task.frozen, task.params))

  def loss(params, frozen, batch):
    return jnp.mean(task.loss(params, frozen, batch, jax.random.key(0))[0])

  compiled = jax.jit(jax.grad(loss)).lower(params, frozen, batch).compile()
  kinds = kinds_of_program(compiled.as_text())
  jax.block_until_ready(compiled(params, frozen, batch))
  seconds = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(values.steps):
        jax.block_until_ready(compiled(params, frozen, batch))
    data = jax.profiler.ProfileData.from_file(_only_file(folder))
    for plane in data.planes:
      for line in plane.lines:
        for event in line.events:
          if event.name in kinds:
            seconds[kinds[event.name]] += event.duration_ns / 1e9
  return {kind: value / values.steps for kind, value in seconds.items()}


def _only_file(folder: str) -> str:
  (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
  return str(path)


def profile_torch(values: argparse.Namespace) -> dict[str, float]:
  """Seconds a step by kind, of the peer's whole step."""
  import torch

  options = argparse.Namespace(
    size=values.size,
    pairs=values.pairs,
    dtype='float32',
    remat='none',
    compile='none',
  )
  step, inputs = peer_torch.prepare(options, 'cpu')
  step(inputs)
  with torch.profiler.profile() as profiler:
    for _ in range(values.steps):
      step(inputs)
  seconds = collections.Counter()
  for event in profiler.key_averages():
    prefix = next((name for name in TORCH if event.key.startswith(name)), None)
    kind = TORCH.get(prefix, KINDS[-1])
    seconds[kind] += event.self_cpu_time_total / 1e6
  return {kind: value / values.steps for kind, value in seconds.items()}


PROGRAMS = {'ours': profile_ours, 'torch': profile_torch}


def main(argv: list[str]) -> int:
  """Prints a line a kind."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--size', choices=tuple(cases.SIZES), default='small')
  parser.add_argument('--pairs', type=int, default=2)
  parser.add_argument('--steps', type=int, default=3)
  parser.add_argument('--program', choices=tuple(PROGRAMS), default='ours')
  values = parser.parse_args(argv)
  found = PROGRAMS[values.program](values)
  for kind in KINDS:
    if kind in found:
      print(f'{kind:38s} {found[kind]:8.3f} s')
  print(f'{"sum":38s} {sum(found.values()):8.3f} s')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
