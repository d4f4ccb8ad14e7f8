"""Our DPO step beside PyTorch's: processes in turn, on the same cores.

  python -m benchmarks.peer_step [--size=small] [--pairs=2] [--rounds=3]
    [--seconds=15] [--dtype=float32] [--compile=none] [--threads=2]
    [--our_python=PYTHON with another jax] [--json=FILE]

benchmarks.step_time and benchmarks.peer_torch run in processes of their own,
one after the other, `rounds` times each, for `seconds` of steps after their
warm-up. Both do the same: the size's UNet with random weights as policy and
as reference, stored in the dtype of compute but for the policy's float32
weights, a batch of latents and text states, noise and timesteps drawn in the
step, gradient, clipping, AdamW. The table has the median over all rounds, the
fastest and slowest step, and the ratio of the medians (above 1: ours is
faster). Compilation is not in it. --compile is PyTorch's, as in peer_torch.
The processor time says more where the machine has other work: with --threads=1
nobody waits for a thread that does not run.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from benchmarks import cases

ROOT = pathlib.Path(__file__).parents[1]


def command(program: str, values: argparse.Namespace, file: str) -> list[str]:
  """The command line of one program, 'torch' or 'ours'."""
  shared = [
    f'--size={values.size}',
    f'--pairs={values.pairs}',
    f'--dtype={values.dtype}',
    f'--seconds={values.seconds}',
    f'--json={file}',
  ]
  if program == 'torch':
    extra = [f'--compile={values.compile}']
    return [sys.executable, '-m', 'benchmarks.peer_torch', *shared, *extra]
  extra = [f'--ref_dtype={values.dtype}']
  return [values.our_python, '-m', 'benchmarks.step_time', *shared, *extra]


def _run(program: str, values: argparse.Namespace) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    file = f'{folder}/record.json'
    done = subprocess.run(
      command(program, values, file),
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode:
      raise RuntimeError(f'{program}: {done.stderr[-2000:]}')
    return json.loads(pathlib.Path(file).read_text())


def lines(records: dict[str, list[dict]]) -> list[str]:
  """The table of the rounds' records: a line a program, and the ratio."""
  medians, used, shown = {}, {}, []
  for program, rounds in records.items():
    times = [second for record in rounds for second in record['seconds']]
    medians[program] = statistics.median(times)
    used[program] = statistics.median(
      second for record in rounds for second in record['processor_seconds']
    )
    peak = max(record['peak_gib'] for record in rounds)
    compiled = statistics.median(r['compile_seconds'] for r in rounds)
    shown.append(
      f'{program:6s} {medians[program]:8.3f} s a step [{min(times):.3f}, '
      f'{max(times):.3f}], processor {used[program]:.3f} s, '
      f'{len(times)} steps, peak {peak:.1f} GiB, first '
      f'calls {compiled:.0f} s more, {rounds[0]["version"]}'
    )
  shown.append(
    f'ratio {medians["torch"] / medians["ours"]:.2f}, of processor time '
    f'{used["torch"] / used["ours"]:.2f}'
  )
  return shown


def main(argv: list[str]) -> int:
  """Prints the table; 2 with one line where a program fails."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--size', choices=tuple(cases.SIZES), default='small')
  parser.add_argument('--pairs', type=int, default=2)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--seconds', type=float, default=15.0)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument(
    '--dtype', choices=('float32', 'bfloat16'), default='float32'
  )
  parser.add_argument('--compile', default='none')
  parser.add_argument('--our_python', default=sys.executable)
  parser.add_argument('--json', default='')
  values = parser.parse_args(argv)
  cores = sorted(os.sched_getaffinity(0))[: values.threads]
  os.sched_setaffinity(0, set(cores))
  records: dict[str, list[dict]] = {'torch': [], 'ours': []}
  try:
    for number in range(values.rounds):
      for program, found in records.items():
        found.append(_run(program, values))
      print(f'round {number + 1} of {values.rounds}', file=sys.stderr)
  except RuntimeError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(
    f'{values.size}: {values.pairs} pairs a step, {values.dtype}, '
    f'{len(cores)} threads, {values.rounds} rounds'
  )
  print('\n'.join(lines(records)))
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(records))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
