"""tools.prepare of what the hub has, and with a cache of latents."""

import hashlib
import json
import pathlib
import sys

import pickapic_file
import pytest
from prepare_command import contents, error_of, run

from dpo_jax.data import records

MOVES = ('rename', 'replace')


def test_no_network_says_what_to_do(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  hub = pytest.importorskip('huggingface_hub')

  def refuse(*args, **options):
    raise ConnectionError('no route\nto host')

  monkeypatch.setattr(hub.HfApi, 'dataset_info', refuse)
  text = error_of(
    capsys, '--source=org/pickapic', '--out=o', '--format=pickapic'
  )
  assert 'no such file or folder here' in text
  assert 'the hub gave nothing (ConnectionError: no route to host)' in text
  assert 'hf download org/pickapic --repo-type dataset' in text
  text = error_of(capsys, '--source=org/data', '--out=o', '--format=jsonl')
  assert 'only pickapic is read by a hub id' in text
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  text = error_of(
    capsys, '--source=org/pickapic', '--out=o', '--format=pickapic'
  )
  assert "pip install 'dpo_jax[hub]'" in text


def test_a_hub_id_is_fetched_by_split(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  hub = pytest.importorskip('huggingface_hub')
  snapshot = tmp_path / 'cache' / 'abc'
  (snapshot / 'data').mkdir(parents=True)
  names = [
    'data/test-00000-of-00001.parquet',
    'data/train-00000-of-00001.parquet',
    'README.md',
  ]
  for i, name in enumerate(names[:2]):
    pickapic_file.write(snapshot / name, [pickapic_file.make_row(i)])
  asked = {}

  class Info:
    sha = 'abc'

  def download(name, **options):
    asked.update(options, name=name)
    return str(snapshot)

  monkeypatch.setattr(hub.HfApi, 'dataset_info', lambda *a, **k: Info())
  monkeypatch.setattr(hub.HfApi, 'list_repo_files', lambda *a, **k: names)
  monkeypatch.setattr(hub, 'snapshot_download', download)
  run('org/pickapic', tmp_path / 'o', '--revision=v2')
  assert asked == {
    'name': 'org/pickapic',
    'repo_type': 'dataset',
    'revision': 'abc',
    'allow_patterns': ['data/train-00000-of-00001.parquet'],
  }
  got = records.open_folder(tmp_path / 'o')
  names = [record['source'] for record in got]
  assert names == [b'data/train-00000-of-00001.parquet:0']


def test_a_cache_is_added_before_the_folder_appears(
  tiny_folder, tmp_path, capsys
):
  rows = [pickapic_file.make_row(i) for i in range(3)]
  source = pickapic_file.write(tmp_path / 'a.parquet', rows)
  flags = [f'--model={tiny_folder}', '--size=16', '--keep_images=false']
  run(source, tmp_path / 'o', *flags, '--shards=2', '--batch=8')
  got = records.open_folder(tmp_path / 'o')
  assert got.fields['moments'].shape[:2] == (2, 2)
  assert all(record['image_0'] == b'' for record in got)
  captions = records.open_folder(tmp_path / 'o', kind='captions')
  # Of three captions and the empty one.
  assert len(captions) == 4
  sums = json.loads((tmp_path / 'o' / 'checksums.json').read_text())
  for name, entry in sums.items():
    data = (tmp_path / 'o' / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry['sha256']
  assert any(name.startswith('captions/') for name in sums)
  names = sorted(path.name for path in (tmp_path / 'o').iterdir())
  assert 'state' not in names
  assert 'cache.incomplete' not in names
  base = [f'--source={source}', f'--out={tmp_path / "p"}', '--format=pickapic']
  text = error_of(capsys, *base, f'--model={tiny_folder}', '--size=17')
  assert '17' in text
  text = error_of(capsys, *base, '--flips=false')
  assert '--flips=false: is for --model' in text
  assert not (tmp_path / 'p.incomplete').exists()


def test_a_cut_in_the_cache_stage_is_continued(
  tiny_folder, tmp_path, monkeypatch
):
  """Again and again, each time before another file takes its place."""
  rows = [pickapic_file.make_row(i) for i in range(3)]
  source = pickapic_file.write(tmp_path / 'a.parquet', rows)
  flags = [f'--model={tiny_folder}', '--size=16', '--shards=2', '--batch=8']
  run(source, tmp_path / 'right', *flags)
  original = {name: getattr(pathlib.Path, name) for name in MOVES}
  for last in ('pairs', 'captions', 'cache.json', 'o'):
    with monkeypatch.context() as patch:
      for name, move in original.items():

        def fail(path, target, *, move=move, last=last):
          if pathlib.Path(target).parts[-2:] in (
            ('o.incomplete', last),
            (tmp_path.name, last),
          ):
            raise OSError('power cut')
          return move(path, target)

        patch.setattr(pathlib.Path, name, fail)
      with pytest.raises(OSError, match='power cut'):
        run(source, tmp_path / 'o', *flags)
    assert not (tmp_path / 'o').exists()
  run(source, tmp_path / 'o', *flags)
  assert contents(tmp_path / 'o') == contents(tmp_path / 'right')
