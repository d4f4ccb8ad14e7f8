"""Two processes agree on the best step, stop, go on, and read it back."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(1800)

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import json, os, pathlib, sys
import jax, numpy as np, optax
from dpo_jax import distributed
distributed.join([], os.environ)
from dpo_jax import selecting, sharding
from dpo_jax import task as task_lib
from dpo_jax.train import best, loop, preemption
import test_loop

class Loader(test_loop._Loader):
  def __next__(self):
    half = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
    return {name: rows[half] for name, rows in super().__next__().items()}

asked = []
def score(state):
  asked.append(int(state.step))
  return {best.MEDIAN: {2: 1.0, 4: 3.0, 6: 2.0}[asked[-1]]}

def run(should_stop):
  return loop.run(
    task=task_lib.Task(
      params={'w': np.zeros((), np.float32)}, frozen={}, loss=test_loop._loss
    ),
    optimizer=optax.sgd(0.1), schedule=lambda step: 0.1, loader=Loader(),
    eval_batches=lambda: [],
    options=loop.Options(
      seed=0, num_steps=6, batch_size=8, accumulate=1, ema_decay=0.0,
      log_every=3, eval_every=2, checkpoint_every=6, keep=1,
    ),
    mesh=sharding.make_mesh(), workdir=workdir, should_stop=should_stop,
    selection=best.Selection(score, {'judge': 'known'}),
  )

workdir = pathlib.Path(sys.argv[1])
try:
  run(lambda step: step == 4)
except preemption.Preempted:
  asked.append('stop')
result = run(lambda step: False)
chosen = selecting.choose(
  result.state, result.best, by='best', workdir=workdir
)
w = float(chosen.params['w'])
print(json.dumps([asked, result.best, chosen.record['step'], w]))
"""


def test_both_find_the_same_and_one_writes_it(tmp_path):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  common = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests" / "train"}',
    'DPO_JAX_COORDINATOR': f'127.0.0.1:{port}',
    'DPO_JAX_NUM_PROCESSES': '2',
  }
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(tmp_path)],
      env=common | {'DPO_JAX_PROCESS_ID': str(index)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  said = [process.communicate(timeout=600)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  one, other = (json.loads(text.splitlines()[-1]) for text in said)
  assert one == other
  asked, record, step, w = one
  # Saved at the stop at once, and scored when the run went on.
  assert asked == [2, 'stop', 4, 6]
  assert record == {'step': 4, 'median': 3.0, 'judge': 'known'} and step == 4
  assert record == json.loads((tmp_path / 'best.json').read_text())
  wanted = 0.0
  for number in range(1, 5):
    wanted -= 0.1 * 2 * (wanted - number)
  assert w == pytest.approx(wanted, rel=1e-6)
  names = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
  assert names == ['4', '6']
