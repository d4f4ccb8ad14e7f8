"""Two processes that share the pictures leave the columns of one."""

import os
import pathlib
import socket
import subprocess
import sys

import clip_folder
import numpy as np
import prepared_folder
import pytest

from dpo_jax.data import records, score_files
from dpo_jax.tools import label

pytestmark = pytest.mark.timeout(1800)

ROOT = pathlib.Path(__file__).parents[2]
PAIRS = 21


def _words(folder, weights):
  # Chunks of 16, 5: of the last batch the second process has no record.
  judges = f'pickscore={weights},aesthetic={weights}'
  return [f'--data={folder}', f'--scorers={judges}', '--batch=8', '--chunk=16']


def _run_two(folder, argv):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  settings = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    'PYTHONPATH': str(ROOT),
  }
  logs, processes = [], []
  for index in range(2):
    flags = [
      f'--coordinator=127.0.0.1:{port}',
      '--num_processes=2',
      f'--process_id={index}',
    ]
    logs.append(folder.parent / f'log{index}')
    with logs[-1].open('w') as stream:
      processes.append(
        subprocess.Popen(
          [sys.executable, '-m', 'dpo_jax.tools.label', *argv, *flags],
          cwd=ROOT,
          env=settings,
          stdout=stream,
          stderr=stream,
        )
      )
  codes = [process.wait(900) for process in processes]
  return codes, [log.read_text() for log in logs]


def _read(folder):
  given = records.open_folder(folder)
  return {
    name: score_files.read(given, 'pairs', name)[1]
    for name in ('score_pickscore', 'score_aesthetic', 'label')
  }


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  return clip_folder.write(tmp_path_factory.mktemp('clip') / 'c', head=True)


def _make(tmp_path, name):
  rows = [prepared_folder.make_record(i) for i in range(PAIRS)]
  # Equal pictures tie, on whichever process they are.
  for i in (3, 12, 20):
    rows[i]['image_1'] = rows[i]['image_0']
  return prepared_folder.write(tmp_path / name, rows, lengths=[12, 9])


def test_two_processes_score_as_one_and_go_on(tmp_path, weights, monkeypatch):
  alone, shared = (_make(tmp_path, name) for name in ('alone', 'shared'))
  label.main(_words(alone, weights))
  # One process was killed after the first chunk; two go on.
  add, added = score_files.Writer.add, []

  def stop(self, start, values):
    if self.name != score_files.LABEL:
      if added:
        raise KeyboardInterrupt
      # What is there is not made again.
      values = values + 1
      added.append(values)
    add(self, start, values)

  with monkeypatch.context() as patch:
    patch.setattr(score_files.Writer, 'add', stop)
    with pytest.raises(KeyboardInterrupt):
      label.main(_words(shared, weights))
  codes, logs = _run_two(shared, _words(shared, weights))
  assert codes == [0, 0], logs
  assert 'pickscore agrees with the labels' in logs[0]
  assert 'agrees' not in logs[1]
  wanted, found = _read(alone), _read(shared)
  np.testing.assert_array_equal(found['label'], wanted['label'])
  np.testing.assert_array_equal(found['score_pickscore'][:16], added[0])
  found['score_pickscore'][:16] -= 1
  for name in ('score_pickscore', 'score_aesthetic'):
    assert found[name].shape == (PAIRS, 2)
    # Scores of about 14 and 1, whose batches are split otherwise.
    np.testing.assert_allclose(found[name], wanted[name], atol=2e-5)
    equal = found[name][:, 0] == found[name][:, 1]
    assert np.flatnonzero(equal).tolist() == [3, 12, 20]
  parts = list((shared / 'scores').rglob('*.parts'))
  assert not parts


def test_an_error_is_said_by_both(tmp_path, weights):
  folder = _make(tmp_path, 'pairs')
  label.main([f'--data={folder}', f'--scorers=clip={weights}', '--batch=8'])
  other = clip_folder.write(tmp_path / 'other', seed=1)
  codes, logs = _run_two(
    folder, [f'--data={folder}', f'--scorers=clip={other}', '--batch=8']
  )
  assert codes == [2, 2], logs
  assert all('other weights' in log for log in logs)
