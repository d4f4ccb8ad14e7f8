"""Runs whose folder is in a bucket, one in memory."""

import json
import os
import sys

import pytest
from etils import epath
from fsspec.implementations import memory

from dpo_jax import folders
from dpo_jax.tools import export
from dpo_jax.train import lock, manifest, metrics, workdir

RUN = 'gs://bucket/run'


class _Bucket(memory.MemoryFileSystem):
  """What gcsfs would be, in memory."""

  protocol = ('gcs', 'gs')
  cachable = False
  broken = False

  @classmethod
  def _strip_protocol(cls, path):
    if cls.broken:
      raise RuntimeError('no\ncredentials')
    return '/' + str(path).removeprefix('gs://').strip('/')

  def glob(self, path, **options):
    return [name.lstrip('/') for name in super().glob(path, **options)]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A new bucket, and a working folder in which nothing may appear."""
  registry = sys.modules['fsspec.registry']._registry
  monkeypatch.setitem(registry, 'gcs', _Bucket)
  monkeypatch.setattr(_Bucket, 'store', {})
  monkeypatch.setattr(_Bucket, 'pseudo_dirs', [''])
  monkeypatch.setattr(lock, 'BEAT', 0.05)
  monkeypatch.setattr(lock, 'STALE', 0.6)
  monkeypatch.setattr(lock, 'SETTLE', 0.0)
  monkeypatch.chdir(tmp_path)
  yield epath.Path(RUN)
  assert not list(tmp_path.iterdir())


def _names():
  return sorted(name.removeprefix('/bucket/run/') for name in _Bucket.store)


def test_other_addresses_are_refused():
  with pytest.raises(ValueError, match='--workdir=s3://b/run: must be a'):
    workdir.Workdir('s3://b/run', config={})


def test_a_bucket_out_of_reach_is_one_line(bucket, monkeypatch):
  monkeypatch.setattr(_Bucket, 'broken', True)
  with pytest.raises(ValueError, match=r'RuntimeError: no credentials') as e:
    workdir.Workdir(RUN, config={}).__enter__()
  assert f'--workdir={RUN}' in str(e.value) and 'dpo_jax[gcs]' in str(e.value)
  assert '\n' not in str(e.value)


def test_config_and_pins_are_kept_and_compared(bucket):
  record = {'seed': 0, 'export': {'dtype': 'float32'}}
  with workdir.Workdir(RUN, config=record) as place:
    place.pin('data', {'sha256': 'a'})
    place.keep_config()
    assert _names() == ['config.json', 'data.json', 'lock']
  assert _names() == ['config.json', 'data.json']
  assert export.read_run(RUN) == record
  with workdir.Workdir(RUN, config=record) as place:
    with pytest.raises(ValueError, match='began with another data'):
      place.pin('data', {'sha256': 'b'})
  with pytest.raises(ValueError, match='seed: 0 -> 1'):
    workdir.Workdir(RUN, config=record | {'seed': 1}).__enter__()
  assert 'lock' not in _names()


def test_a_second_run_is_refused_while_the_first_lives(bucket, capsys):
  with workdir.Workdir(RUN, config={}) as first:
    with pytest.raises(ValueError, match=r'pid \d+ on .* is running here'):
      workdir.Workdir(RUN, config={}).__enter__()
    first.check()
  said = capsys.readouterr().err
  assert f'left by pid {os.getpid()} on' in said and 'waiting up to' in said


@pytest.mark.parametrize('text', ['{"pid": 7, "host": "far"}', '{"pid'])
def test_a_lock_without_a_beat_is_taken_over(bucket, text):
  folders.write_text(bucket / 'lock', text)
  with workdir.Workdir(RUN, config={}):
    record = json.loads((bucket / 'lock').read_text())
    assert record['pid'] == os.getpid()
  assert not _names()


def test_of_two_at_once_one_goes_on(bucket, monkeypatch):
  """The other writes between this one's writing and its second look."""
  monkeypatch.setattr(
    lock.time,
    'sleep',
    lambda seconds: folders.write_text(
      bucket / 'lock', '{"pid": 7, "host": "far"}'
    ),
  )
  with pytest.raises(ValueError, match='pid 7 on far is running here'):
    workdir.Workdir(RUN, config={}).__enter__()


def test_a_run_whose_lock_was_taken_stops(bucket):
  with workdir.Workdir(RUN, config={}) as place:
    theirs = '{"pid": 7, "host": "far"}'
    folders.write_text(bucket / 'lock', theirs)
    place._lock._thread.join(10)
    with pytest.raises(lock.LostError, match='pid 7 on far has taken'):
      place.check()
  # What is another's stays.
  assert (bucket / 'lock').read_text() == theirs


def test_a_beat_that_fails_is_said_and_made_up_for(bucket, capsys, monkeypatch):
  with workdir.Workdir(RUN, config={}) as place:
    monkeypatch.setattr(_Bucket, 'broken', True)
    while 'no beat (no credentials)' not in capsys.readouterr().err:
      assert place._lock._thread.is_alive()
    monkeypatch.setattr(_Bucket, 'broken', False)
    before = (bucket / 'lock').read_text()
    while (bucket / 'lock').read_text() == before:
      assert place._lock._thread.is_alive()
    place.check()


def test_each_log_line_is_there_at_once(bucket, capsys):
  path = bucket / 'metrics.jsonl'

  def steps():
    return [json.loads(line)['step'] for line in path.read_text().splitlines()]

  writer = metrics.Writer(RUN, step=0)
  assert f'{RUN}/tensorboard: copied there' in capsys.readouterr().err
  for step in (5, 10, 15):
    writer.write(step, {'loss': 0.5})
    assert steps()[-1] == step
  # The first was killed; its later lines go.
  writer = metrics.Writer(RUN, step=10)
  assert steps() == [5, 10]
  writer.write(15, {'loss': 0.25})
  assert not (bucket / 'tensorboard').exists()
  writer.close()
  assert steps() == [5, 10, 15]
  (events,) = (bucket / 'tensorboard').iterdir()
  assert events.name.startswith('events') and events.stat().length > 100


def test_what_is_made_on_the_disk_is_copied_when_it_is_whole(bucket):
  (bucket / 'metrics.jsonl').write_text('{}\n')
  with pytest.raises(KeyError):
    with folders.on_disk(bucket) as local:
      (local / 'half').write_text('x')
      raise KeyError
  with folders.on_disk(bucket, take=['metrics.jsonl']) as local:
    assert (local / 'metrics.jsonl').read_text() == '{}\n'
    (local / 'metrics.jsonl').write_text('only lent')
    (local / 'export' / 'unet').mkdir(parents=True)
    (local / 'export' / 'unet' / 'x.safetensors').write_bytes(b'\0\1')
  assert not local.exists()
  assert _names() == ['export/unet/x.safetensors', 'metrics.jsonl']
  assert (bucket / 'metrics.jsonl').read_text() == '{}\n'
  assert (bucket / 'export/unet/x.safetensors').read_bytes() == b'\0\1'


def test_manifests_are_written_and_compared(bucket):
  (bucket / '3' / 'state').mkdir(parents=True)
  (bucket / '3' / 'state' / 'd').write_bytes(b'123')
  manifest.write(bucket / '3', 3)
  assert manifest.find_damage(bucket / '3', 3) == ''
  (bucket / '3' / 'state' / 'd').write_bytes(b'124')
  assert 'state/d has another SHA-256' in manifest.find_damage(bucket / '3', 3)
