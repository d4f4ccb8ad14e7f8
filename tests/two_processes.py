"""Two real processes of one command, on virtual devices."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def start(module, argv, folder, *, devices, **environment):
  """Starts `python -m module` twice; ([process], [log of both streams]).

  devices: of each process. environment: more variables of both.
  """
  settings = os.environ | {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'PYTHONPATH': str(ROOT),
    'DPO_JAX_COORDINATOR': f'127.0.0.1:{free_port()}',
    'DPO_JAX_NUM_PROCESSES': '2',
    **environment,
  }
  folder.mkdir(exist_ok=True)
  processes, logs = [], [folder / f'log{index}' for index in range(2)]
  for index, log in enumerate(logs):
    with log.open('w') as stream:
      processes.append(
        subprocess.Popen(
          [sys.executable, '-m', module, *argv],
          cwd=ROOT,
          env=settings | {'DPO_JAX_PROCESS_ID': str(index)},
          stdout=stream,
          stderr=stream,
        )
      )
  return processes, logs


def run(module, argv, folder, *, devices):
  """Both to their ends; (exit codes, texts of both logs)."""
  processes, logs = start(module, argv, folder, devices=devices)
  codes = [process.wait(900) for process in processes]
  return codes, [log.read_text() for log in logs]
