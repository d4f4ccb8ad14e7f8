"""Real processes that train together, are stopped, and continue otherwise."""

import contextlib
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import two_processes

from dpo_jax import build, datasets, flags, main, trees
from dpo_jax import keys as keys_lib
from dpo_jax.train import checkpoint, feed, loop

# On a busy machine two processes compile for minutes.
pytestmark = pytest.mark.timeout(1800)

# At beta 5000 rounding alone moves the losses by 1e-4 (tests/test_main.py).
PAIRS = {
  'train__num_steps': 6,
  'train__eval_every': 3,
  'objective__numbers__beta': 100.0,
  'objective__reward_beta': 100.0,
}
SMALL = {'train__num_steps': 4, 'train__checkpoint_every': 2}
# Ends by a signal only; what is saved is saved because of it.
ENDLESS = {
  'train__num_steps': 100_000,
  'train__checkpoint_every': 100_000,
}


def _start_two(argv, folder, **environment):
  """Two processes of four devices each; ([process], [log])."""
  return two_processes.start(
    'dpo_jax.main', argv[1:], folder, devices=4, **environment
  )


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
  # A save that a kill has cut off has no manifest, and does not count.
  whole = (workdir / 'checkpoints').glob('*/manifest.json')
  return max(
    int(path.parent.name) for path in whole if path.parent.name.isdigit()
  )


def _run_two(argv, folder):
  """Two processes from start to end, of which process 0 speaks."""
  processes, logs = _start_two(argv, folder)
  codes = [process.wait(900) for process in processes]
  assert codes == [0, 0], _text(logs)
  assert 'done: ' in logs[0].read_text()
  assert '2 processes' in logs[0].read_text()
  assert 'done: ' not in logs[1].read_text()


@contextlib.contextmanager
def _devices(count):
  """As if there were only so many."""
  found = jax.devices()[:count]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *unused: found)
    yield


def _restore(argv, count):
  """(state on `count` devices, position, job) of the newest checkpoint."""
  config, folder = flags.parse(argv)
  with _devices(count):
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


def _batches(job, position, count):
  """Of 20 global batches, loaded by `count` processes: ids and noise."""
  record = job.record
  loaders = [
    datasets.make_loader(
      job.data.train,
      job.tokenizer,
      batch_size=record['train']['batch_size'],
      seed=record['seed'],
      resolution=record['data']['resolution'],
      random_crop=False,
      flip=False,
      process_index=index,
      process_count=count,
    )
    for index in range(count)
  ]
  key = jax.random.key(record['seed'])
  for loader in loaders:
    loader.set_state(position)
  found = []
  for _ in range(20):
    parts = [next(loader) for loader in loaders]
    ids, epochs = (
      np.concatenate([part[name] for part in parts]) for name in ('id', 'epoch')
    )
    noise = keys_lib.normal(keys_lib.per_example(key, ids, epochs), (4,))
    found.append((ids.tolist(), epochs.tolist(), np.asarray(noise).tobytes()))
  for loader in loaders:
    loader.close()
  return found


def _compare(losses, wanted):
  assert losses.keys() == wanted.keys()
  np.testing.assert_allclose(
    list(losses.values()), [wanted[step] for step in losses], rtol=1e-5
  )


def _check_restored(argv, workdir):
  """One process of 8 devices, and of 1, has the state that two left."""
  final = json.loads((workdir / 'final.json').read_text())
  for count in (8, 1):
    state, position, job = _restore(argv, count)
    assert len(job.mesh.devices.flat) == count
    assert position == final['data_position'] == final['step']
    assert trees.digest(state) == final['state_sha256']
  assert _batches(job, position, 2) == _batches(job, position, 1)


def test_two_processes_leave_a_run_that_one_restores(small_arguments, tmp_path):
  workdir = tmp_path / 'run'
  argv = small_arguments(workdir, **SMALL)
  _run_two(argv, tmp_path / 'logs')
  _check_restored(argv, workdir)
  assert sorted(_losses(workdir)) == [1, 2, 3, 4]
  assert (workdir / 'export' / 'config.json').is_file()
  # One process on 8 devices makes the same run.
  alone = tmp_path / 'alone'
  assert main.run(small_arguments(alone, **SMALL)) == 0
  _compare(_losses(alone), _losses(workdir))


@pytest.mark.slow
def test_two_processes_align_a_model_as_one_does(arguments, tmp_path):
  workdir, alone = tmp_path / 'run', tmp_path / 'alone'
  argv = arguments(workdir=workdir, **PAIRS)
  _run_two(argv, tmp_path / 'logs')
  _check_restored(argv, workdir)
  assert main.run(arguments(workdir=alone, **PAIRS)) == 0
  _compare(_losses(alone), _losses(workdir))
  assert (workdir / 'export' / 'model_index.json').is_file()
  reports = [
    json.loads((place / 'report.json').read_text())
    for place in (workdir, alone)
  ]
  for key in ('implicit_accuracy', 'implicit_accuracy_interval'):
    assert reports[0][key] == reports[1][key]
  for key in ('eval/pairs/loss', 'eval/pairs/err/ref'):
    values = [
      [r[key] for r in map(json.loads, path.open()) if key in r]
      for path in (alone / 'metrics.jsonl', workdir / 'metrics.jsonl')
    ]
    assert len(values[0]) == 2
    np.testing.assert_allclose(*values, rtol=1e-5)


def _go_on(argv, *, count, steps):
  """The run in this process on `count` devices, stopped after so many steps."""
  taken, real = [], feed.Feed.take

  def take(self):
    taken.append(1)
    if len(taken) == steps:
      os.kill(os.getpid(), signal.SIGTERM)
    return real(self)

  with pytest.MonkeyPatch.context() as patch, _devices(count):
    patch.setattr(feed.Feed, 'take', take)
    assert main.run(argv) == 4


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """A run of two processes after SIGTERM to one: (workdir, codes, logs)."""
  folder = tmp_path_factory.mktemp('stopped')

  def run(small_arguments):
    if not (folder / 'logs').exists():
      argv = small_arguments(folder / 'run', **ENDLESS)
      processes, logs = _start_two(argv, folder / 'logs')
      _wait_for_step(folder / 'run', 2, processes, logs)
      processes[1].send_signal(signal.SIGTERM)
      found.extend([process.wait(600) for process in processes])
    return folder / 'run', found, [folder / 'logs' / f'log{i}' for i in (0, 1)]

  found = []
  return run


def test_sigterm_to_one_of_two_saves_on_both(
  small_arguments, tmp_path, stopped
):
  workdir, codes, logs = stopped(small_arguments)
  assert codes == [4, 4], _text(logs)
  saved = _newest(workdir)
  assert saved == max(_losses(workdir)) > 2
  assert f'after step {saved}, which is saved' in logs[0].read_text()
  # Eight devices of one process, and a single one, go on alike.
  losses = []
  for count in (8, 1):
    copy = tmp_path / f'copy{count}'
    shutil.copytree(workdir, copy)
    _go_on(small_arguments(copy, **ENDLESS), count=count, steps=3)
    found = _losses(copy)
    assert sorted(found) == [*range(1, max(found) + 1)]
    assert _newest(copy) == max(found) >= saved + 3
    losses.append({step: found[step] for step in range(1, saved + 4)})
  _compare(*losses)


def test_a_killed_process_ends_the_other_with_a_message(
  small_arguments, tmp_path, stopped
):
  workdir = tmp_path / 'run'
  argv = small_arguments(workdir, **ENDLESS | {'train__checkpoint_every': 1})
  processes, logs = _start_two(
    argv, tmp_path / 'logs', DPO_JAX_HEARTBEAT_SECONDS='20'
  )
  _wait_for_step(workdir, 3, processes, logs)
  processes[1].kill()
  killed = time.monotonic()
  assert processes[0].wait(600) not in (0, 4)
  assert time.monotonic() - killed < 60, 'not within the heartbeat'
  text = logs[0].read_text()
  assert 'cannot go on' in text or 'another task died' in text, text
  # What goes on from there has the losses of a run that was not killed.
  found = [stopped(small_arguments)[0], workdir]
  steps = [_newest(place) for place in found]
  for place, mine in zip(found, steps, strict=True):
    if mine < max(steps) + 2:
      argv = small_arguments(place, **ENDLESS)
      _go_on(argv, count=8, steps=max(steps) + 2 - mine)
  losses = [_losses(place) for place in found]
  common = losses[0].keys() & losses[1].keys()
  assert max(common) >= max(steps) + 2
  _compare(*({step: of[step] for step in common} for of in losses))
