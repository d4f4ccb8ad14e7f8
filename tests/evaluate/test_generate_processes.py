"""Pictures drawn by two processes, on a mesh that mixes their devices."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(1800)

ROOT = pathlib.Path(__file__).parents[2]
# The picture of row i is i everywhere; 11 rows by batches of 4.
PROGRAM = """
import json, os, sys
import jax, numpy as np
from dpo_jax import distributed
distributed.join([], os.environ)
from dpo_jax.evaluate import generate
devices = np.array(jax.devices()).reshape(2, 2).T.reshape(4, 1)
mesh = jax.sharding.Mesh(devices, ('data', 'fsdp'))
draw = jax.jit(lambda params, batch: batch['input_ids'][:, 0].astype('uint8'))
found = generate.generate(
  draw, {}, {'input_ids': np.arange(11)[:, None, None]},
  np.zeros(11, np.uint32), seed=0, batch_size=4, mesh=mesh,
)
print(json.dumps(found.reshape(-1).tolist()))
"""


def test_rows_come_in_their_order():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  common = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    'PYTHONPATH': str(ROOT),
    'DPO_JAX_COORDINATOR': f'127.0.0.1:{port}',
    'DPO_JAX_NUM_PROCESSES': '2',
  }
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', PROGRAM],
      env=common | {'DPO_JAX_PROCESS_ID': str(index)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  for process in processes:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    assert json.loads(said.splitlines()[-1]) == list(range(11))
