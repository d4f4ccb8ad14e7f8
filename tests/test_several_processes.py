"""Real processes that train together, are stopped, and continue otherwise."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dpo_jax import build, datasets, flags, trees
from dpo_jax.train import checkpoint, loop

# On a busy machine two processes compile for minutes.
pytestmark = pytest.mark.timeout(1800)

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 6
# At beta 5000 rounding alone moves the losses by 1e-4 (tests/test_main.py).
OPTIONS = {
  'train__num_steps': STEPS,
  'train__eval_every': 3,
  'objective__numbers__beta': 100.0,
  'objective__reward_beta': 100.0,
}
ENDLESS = OPTIONS | {
  'train__num_steps': 100_000,
  'train__eval_every': 0,
  # What is saved is saved because of the signal.
  'train__checkpoint_every': 100_000,
}


def _start(argv, log, *, devices, environment=None):
  """Starts the command; what it says goes to the file `log`."""
  settings = os.environ | {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'PYTHONPATH': str(ROOT),
    **(environment or {}),
  }
  with log.open('w') as stream:
    return subprocess.Popen(
      [sys.executable, '-m', 'dpo_jax.main', *argv[1:]],
      cwd=ROOT,
      env=settings,
      stdout=subprocess.DEVNULL,
      stderr=stream,
    )


def _free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _start_two(argv, folder, **environment):
  """Two processes of four devices each; ([process], [log])."""
  common = {
    'DPO_JAX_COORDINATOR': f'127.0.0.1:{_free_port()}',
    'DPO_JAX_NUM_PROCESSES': '2',
    **environment,
  }
  folder.mkdir(exist_ok=True)
  logs = [folder / f'log{index}' for index in range(2)]
  processes = [
    _start(
      argv,
      log,
      devices=4,
      environment=common | {'DPO_JAX_PROCESS_ID': str(index)},
    )
    for index, log in enumerate(logs)
  ]
  return processes, logs


def _text(logs):
  return '\n'.join(log.read_text() for log in logs)


def _losses(workdir):
  """Step to loss; each step once."""
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return {}
  records = []
  for line in path.read_text().splitlines():
    try:
      records.append(json.loads(line))
    except ValueError:
      continue
  losses = [(r['step'], r['loss']) for r in records if 'loss' in r]
  assert len(losses) == len(dict(losses)), losses
  return dict(losses)


def _wait_for_step(workdir, step, processes, logs):
  deadline = time.monotonic() + 600
  while max(_losses(workdir), default=0) < step:
    assert time.monotonic() < deadline, _text(logs)
    assert all(p.poll() is None for p in processes), _text(logs)
    time.sleep(0.02)


def _newest(workdir):
  names = (path.name for path in (workdir / 'checkpoints').iterdir())
  return max(int(name) for name in names if name.isdigit())


@pytest.fixture
def calm(arguments, tmp_path):
  """Command line and workdir of a run of two processes from start to end."""
  workdir = tmp_path / 'calm'
  argv = arguments(workdir=workdir, **OPTIONS)
  processes, logs = _start_two(argv, tmp_path / 'logs')
  codes = [process.wait(900) for process in processes]
  assert codes == [0, 0], _text(logs)
  assert 'done: ' in logs[0].read_text()
  # Process 0 speaks for both.
  assert 'done: ' not in logs[1].read_text()
  assert '2 processes' in logs[0].read_text()
  return argv, workdir


def _restore(argv, data):
  """(state on `data` devices, record, job) of the newest checkpoint."""
  config, folder = flags.parse([*argv, f'--config.mesh.data={data}'])
  with pytest.MonkeyPatch.context() as patch:
    found = jax.devices()[:data]
    patch.setattr(jax, 'devices', lambda *unused: found)
    job = build.build(config)
  settings = job.loop_arguments
  saver = checkpoint.Checkpointer(folder, every=1, keep=2)
  state, record = loop._restore_or_start(
    settings['task'],
    settings['optimizer'],
    settings['options'],
    job.mesh,
    saver,
  )
  saver.close()
  return state, record['position'], job


def _ids(job, position, count):
  """Ids of the next two global batches, loaded by `count` processes."""
  loaders = [
    datasets.make_loader(
      job.data.train,
      job.tokenizer,
      batch_size=8,
      seed=0,
      resolution=16,
      random_crop=False,
      flip=False,
      process_index=index,
      process_count=count,
    )
    for index in range(count)
  ]
  for loader in loaders:
    loader.set_state(position)
  found = [
    np.concatenate([next(loader)['id'] for loader in loaders]).tolist()
    for _ in range(2)
  ]
  for loader in loaders:
    loader.close()
  return found


def test_two_processes_leave_a_run_that_one_restores(calm):
  argv, workdir = calm
  final = json.loads((workdir / 'final.json').read_text())
  assert final['step'] == STEPS
  for data in (8, 1):
    state, position, job = _restore(argv, data)
    assert position == final['data_position'] == STEPS
    assert trees.digest(state) == final['state_sha256']
  assert _ids(job, position, 2) == _ids(job, position, 1)
  losses = _losses(workdir)
  assert sorted(losses) == [*range(1, STEPS + 1)]
  report = json.loads((workdir / 'report.json').read_text())
  assert 0 <= report['implicit_accuracy'] <= 1
  assert (workdir / 'export' / 'model_index.json').is_file()
  evaluated = [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
    if 'eval/pairs/loss' in line
  ]
  assert [record['step'] for record in evaluated] == [3, 6]
  # One process on 8 devices makes the same run.
  alone = workdir.with_name('alone')
  argv = [
    word if not word.startswith('--workdir') else f'--workdir={alone}'
    for word in argv
  ]
  log = workdir.with_name('alone.log')
  assert _start(argv, log, devices=8).wait(900) == 0, log.read_text()
  _compare(_losses(alone), losses)
  mine = json.loads((alone / 'report.json').read_text())
  for key in ('implicit_accuracy', 'implicit_accuracy_interval'):
    assert mine[key] == report[key]
  for key in ('eval/pairs/loss', 'eval/pairs/err/ref'):
    values = [
      [r[key] for r in map(json.loads, path.open()) if key in r]
      for path in (alone / 'metrics.jsonl', workdir / 'metrics.jsonl')
    ]
    np.testing.assert_allclose(*values, rtol=1e-5)


def _compare(losses, wanted):
  assert losses.keys() == wanted.keys()
  np.testing.assert_allclose(
    list(losses.values()), [wanted[step] for step in losses], rtol=1e-5
  )


def test_sigterm_to_one_of_two_saves_on_both(arguments, tmp_path):
  workdir = tmp_path / 'run'
  argv = arguments(workdir=workdir, **ENDLESS)
  processes, logs = _start_two(argv, tmp_path / 'logs')
  _wait_for_step(workdir, 2, processes, logs)
  processes[1].send_signal(signal.SIGTERM)
  codes = [process.wait(600) for process in processes]
  assert codes == [4, 4], _text(logs)
  saved = _newest(workdir)
  assert saved == max(_losses(workdir)) > 2
  assert f'after step {saved}, which is saved' in logs[0].read_text()
  # Eight devices of one process, and a single one, go on alike.
  losses = []
  for devices in (8, 1):
    copy = tmp_path / f'copy{devices}'
    shutil.copytree(workdir, copy)
    log = tmp_path / f'log{devices}'
    argv = arguments(workdir=copy, **ENDLESS)
    process = _start(argv, log, devices=devices)
    _wait_for_step(copy, saved + 3, [process], [log])
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 4, log.read_text()
    found = _losses(copy)
    assert sorted(found) == [*range(1, max(found) + 1)]
    assert _newest(copy) == max(found)
    losses.append({step: found[step] for step in range(1, saved + 4)})
  _compare(*losses)


def test_a_killed_process_ends_the_other_with_a_message(
  arguments, tmp_path, calm
):
  workdir = tmp_path / 'run'
  argv = arguments(workdir=workdir, **OPTIONS)
  processes, logs = _start_two(
    argv, tmp_path / 'killed', DPO_JAX_HEARTBEAT_SECONDS='30'
  )
  _wait_for_step(workdir, 2, processes, logs)
  processes[1].kill()
  killed = time.monotonic()
  assert processes[0].wait(600) not in (0, 4)
  text = logs[0].read_text()
  assert 'cannot go on' in text or 'another task died' in text, text
  assert time.monotonic() - killed < 60, 'not within the heartbeat'
  log = tmp_path / 'alone'
  assert _start(argv, log, devices=1).wait(900) == 0, log.read_text()
  _compare(_losses(workdir), _losses(calm[1]))
