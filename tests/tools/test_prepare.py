"""python -m dpo_jax.tools.prepare: a faithful Pick-a-Pic file, and errors."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pickapic_file
import pytest
from prepare_command import contents, error_of, run

from dpo_jax.data import images, records, side_files
from dpo_jax.data.formats import rows as rows_lib
from dpo_jax.tools import prepare

TOKENIZER = (
  pathlib.Path(__file__).parents[2]
  / 'examples'
  / 'emoji'
  / 'architecture'
  / 'tokenizer'
)


@pytest.fixture(scope='module')
def faithful(tmp_path_factory):
  """(rows, source, prepared folder) of the faithful file in 4 shards."""
  folder = tmp_path_factory.mktemp('faithful')
  rows = pickapic_file.rows()
  source = pickapic_file.write(folder / 'pickapic.parquet', rows)
  run(source, folder / 'out', '--shards=4', f'--tokenizer={TOKENIZER}')
  return rows, source, folder / 'out'


def test_every_count_of_the_faithful_file(faithful):
  _, _, out = faithful
  report = json.loads((out / 'build_report.json').read_text())
  assert report['counts'] == pickapic_file.COUNTS
  assert report['unreadable_images'] == pickapic_file.REASONS
  text = (out / 'build_report.txt').read_text()
  assert '          32  rows read\n' in text
  assert '               2  too many pixels\n' in text
  assert sorted(p.name for p in out.iterdir()) == [
    'build_report.json',
    'build_report.txt',
    'checksums.json',
    'pairs',
    'pairs-train.split_hashes.npy',
  ]
  hashes = side_files.read_split_hashes(out, 'pairs', 'train', 20)
  for number, record in zip(hashes, records.open_folder(out), strict=True):
    assert number == rows_lib.split_hash(record['caption'].decode())


def test_every_record_is_its_row(faithful):
  rows, _, out = faithful
  got = list(records.open_folder(out))
  assert len(got) == pickapic_file.COUNTS['kept']
  seen = {}
  for record in got:
    name, number = record['source'].decode().rsplit(':', 1)
    assert name == 'pickapic.parquet'
    row = seen[int(number)] = rows[int(number)]
    # The bytes stay as they came.
    assert record['image_0'] == row['jpg_0']
    assert record['image_1'] == row['jpg_1']
    assert record['label'] == row['label_0']
    assert record['generator_0'] == (row['model_0'] or '').encode()
    assert record['generator_1'] == row['model_1'].encode()
    for side in (0, 1):
      shape = images.decode(record[f'image_{side}']).shape[:2]
      assert record['sizes'][side].tolist() == [*shape, 0, 0]
  assert list(seen) == sorted(seen)
  by_row = {int(r['source'].decode().rsplit(':')[-1]): r for r in got}
  for number, sizes in pickapic_file.SIZES.items():
    assert by_row[number]['sizes'][:, :2].tolist() == [list(s) for s in sizes]
  for number in (22, 23, 24, 26, 31):
    assert by_row[number]['caption'] == rows[number]['caption'].encode()
  repaired = by_row[28]['caption'].decode()
  assert repaired.startswith('lone \ufffd')
  assert repaired.endswith(' surrogate')
  for number in (0, 14, 15):
    assert by_row[number]['caption_id'] == by_row[0]['caption_id']
  assert len({int(record['id']) for record in got}) == len(got)


def test_checksums_are_those_of_the_shards(faithful):
  _, _, out = faithful
  sums = json.loads((out / 'checksums.json').read_text())
  shards = records.open_folder(out).shards
  assert len(shards) == 4
  assert list(sums) == [f'pairs/1.0.0/{shard.name}' for shard in shards]
  for name, entry in sums.items():
    data = (out / name).read_bytes()
    assert entry == {
      'bytes': len(data),
      'sha256': hashlib.sha256(data).hexdigest(),
    }


def test_the_same_command_makes_the_same_bytes(faithful, tmp_path):
  _, source, out = faithful
  flags = ['--shards=4', f'--tokenizer={TOKENIZER}', '--threads=1']
  run(source, tmp_path / 'again', *flags)
  assert contents(tmp_path / 'again') == contents(out)


def test_shards_hold_the_same_records_in_any_number(faithful, tmp_path):
  _, source, out = faithful
  run(source, tmp_path / 'one')
  one, four = records.open_folder(tmp_path / 'one'), records.open_folder(out)
  assert [r['id'] for r in one] == [r['id'] for r in four]
  report = json.loads((tmp_path / 'one' / 'build_report.json').read_text())
  # Without a tokenizer nobody knows.
  assert 'over_token_limit' not in report['counts']
  text = (tmp_path / 'one' / 'build_report.txt').read_text()
  assert 'Long captions were not counted' in text


def test_size_scales_what_is_larger(faithful, tmp_path):
  rows, source, _ = faithful
  run(source, tmp_path / 'out', '--size=300', '--split=small')
  got = {
    int(r['source'].decode().rsplit(':')[-1]): r
    for r in records.open_folder(tmp_path / 'out', split='small')
  }
  assert images.decode(got[1]['image_0']).shape == (450, 300, 3)
  assert got[1]['image_0'][:2] == b'\xff\xd8'
  # The size before stays known.
  assert got[1]['sizes'].tolist() == [[768, 512, 0, 0], [512, 768, 0, 0]]
  assert images.decode(got[27]['image_0']).shape == (300, 511, 3)
  assert got[7]['image_0'] == rows[7]['jpg_0']
  whole = images.resize_shorter(images.decode(rows[1]['jpg_0']), 300)
  error = np.abs(whole.astype(int) - images.decode(got[1]['image_0']))
  assert error.mean() < 2


def test_limit_takes_the_first_rows(faithful, tmp_path):
  _, source, _ = faithful
  run(source, tmp_path / 'out', '--limit=3', '--shards=2')
  report = json.loads((tmp_path / 'out' / 'build_report.json').read_text())
  assert report['counts']['rows'] == 3
  assert report['counts']['kept'] == 2


def test_folders_and_globs_and_splits(tmp_path):
  data = tmp_path / 'src' / 'data'
  data.mkdir(parents=True)
  for i, name in enumerate(
    ['train-00000-of-00002', 'train-00001-of-00002', 'test-00000-of-00001']
  ):
    row = pickapic_file.make_row(i)
    pickapic_file.write(data / f'{name}-abc.parquet', [row])
  run(tmp_path / 'src', tmp_path / 'a')
  got = records.open_folder(tmp_path / 'a')
  assert [r['source'] for r in got] == [
    b'data/train-00000-of-00002-abc.parquet:0',
    b'data/train-00001-of-00002-abc.parquet:0',
  ]
  run(tmp_path / 'src', tmp_path / 'b', '--split=test')
  got = records.open_folder(tmp_path / 'b', split='test')
  assert [r['source'] for r in got] == [
    b'data/test-00000-of-00001-abc.parquet:0'
  ]
  run(str(data / '*-00000-*'), tmp_path / 'c', '--split=train')
  got = records.open_folder(tmp_path / 'c')
  assert [r['source'] for r in got] == [b'train-00000-of-00002-abc.parquet:0']
  with pytest.raises(ValueError, match='of the splits test, train; give one'):
    run(tmp_path / 'src', tmp_path / 'd', '--split=val')


def test_errors_are_one_line_and_exit_code_2(faithful, tmp_path, capsys):
  _, source, out = faithful
  base = [f'--source={source}', '--format=pickapic']
  new = f'--out={tmp_path / "new"}'
  text = error_of(capsys, *base, f'--out={out}')
  assert 'is there already; name another folder or remove it' in text
  text = error_of(capsys, *base, f'--out={source}/x')
  assert 'is no folder' in text
  text = error_of(capsys, *base, new, '--split=../x')
  assert '--split=../x: must be small letters' in text
  text = error_of(capsys, *base, new, '--shards=99')
  assert '--shards=99: there are only 32 rows' in text
  text = error_of(capsys, *base, new, '--revision=main')
  assert 'is no hub id' in text
  text = error_of(capsys, *base, new, '--sizes=3')
  assert 'did you mean --size?' in text
  text = error_of(capsys, '--source=a b/*.parquet', *base[1:], new)
  assert 'no parquet file there' in text
  text = error_of(capsys, *base, new, '--tokenizer=/nowhere')
  assert 'no CLIP tokenizer there' in text
  assert not (tmp_path / 'new.incomplete').exists()


def test_bad_labels_are_found_before_a_shard_is_written(tmp_path, capsys):
  rows = [pickapic_file.make_row(i) for i in range(8)]
  rows[6] |= {'label_0': None}
  source = pickapic_file.write(tmp_path / 'a.parquet', rows)
  text = error_of(
    capsys, f'--source={source}', f'--out={tmp_path / "o"}', '--format=pickapic'
  )
  assert 'a.parquet, row 6: label_0 is null; must be 1' in text
  assert not list(tmp_path.glob('o*'))


def test_nothing_to_keep_is_an_error(tmp_path, capsys):
  source = pickapic_file.write(
    tmp_path / 'a.parquet', [pickapic_file.make_row(0, 0.5)]
  )
  text = error_of(
    capsys, f'--source={source}', f'--out={tmp_path / "o"}', '--format=pickapic'
  )
  assert 'nothing is left to train on: 1 pairs (1 ties)' in text
  assert not (tmp_path / 'o').exists()


def test_a_resume_with_other_settings_is_refused(faithful, tmp_path, capsys):
  _, source, out = faithful
  base = [f'--source={source}', '--format=pickapic']
  incomplete = tmp_path / 'o.incomplete'
  flags = [*base, f'--out={tmp_path / "o"}', '--shards=4']
  settings = json.loads((out / 'build_report.json').read_text())['settings']
  stat = os.stat(source)
  settings['files'][0]['modified_ns'] = stat.st_mtime_ns
  settings['token_limit'] = None
  (incomplete / 'state').mkdir(parents=True)
  path = incomplete / 'state' / 'settings.json'
  for key, value in (('shards', 5), ('size', 64), ('split', 'test')):
    path.write_text(json.dumps(settings | {key: value}))
    text = error_of(capsys, *flags)
    assert f'was begun with another {key}' in text
    assert 'continue with the same command' in text
  changed = [settings['files'][0] | {'modified_ns': 1}]
  path.write_text(json.dumps(settings | {'files': changed}))
  assert 'was begun with another files' in error_of(capsys, *flags)
  path.write_text(json.dumps(settings))
  prepare.main(flags)
  assert len(records.open_folder(tmp_path / 'o')) == 20


def test_a_foreign_folder_of_that_name_is_left_alone(faithful, tmp_path):
  _, source, _ = faithful
  foreign = tmp_path / 'o.incomplete'
  foreign.mkdir()
  (foreign / 'thesis.txt').write_text('x')
  with pytest.raises(ValueError, match='no build that could be continued'):
    run(source, tmp_path / 'o')
  assert contents(foreign) == {'thesis.txt': b'x'}


def test_the_module_runs_without_tensorflow(tmp_path):
  pickapic_file.write(tmp_path / 'a.parquet', [pickapic_file.make_row(0)])
  program = (
    'import sys; from dpo_jax.tools import prepare; prepare.main(sys.argv[1:])'
    "; assert not {'tensorflow', 'torch'} & set(sys.modules)"
  )
  subprocess.run(
    [
      sys.executable,
      '-c',
      program,
      f'--source={tmp_path / "a.parquet"}',
      f'--out={tmp_path / "o"}',
      '--format=pickapic',
    ],
    check=True,
    env=os.environ | {'PYTHONPATH': os.getcwd()},
  )
  assert (tmp_path / 'o' / 'checksums.json').exists()
