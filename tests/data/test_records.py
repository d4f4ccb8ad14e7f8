"""Prepared folders: round trip, tensorflow-datasets, damage, distrust."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from dpo_jax.data import record_fields, records

SHAPES = record_fields.CacheShapes(
  moments=(2, 4, 4, 8),
  input_ids=(2, 7),
  prompt_embeds=(7, 6),
  pooled_embeds=(5,),
)


def _same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


def test_round_trip_over_shards_one_of_them_empty(prepared, record):
  rows = [record(i) for i in range(5)]
  # Both ends of 64 bits, text with NUL at its end, an empty picture.
  rows[0] |= {
    'id': 2**64 - 1,
    'caption': b'a\0',
    'image_0': b'\0',
    'label': 0.25,
  }
  rows[1] |= {'id': 0, 'image_1': b''}
  got = records.open_folder(prepared(rows, lengths=[2, 0, 3]))
  assert len(got) == 5
  assert [shard.length for shard in got.shards] == [2, 0, 3]
  for row, read in zip(rows, got, strict=True):
    _same(row, read)
  assert got[0]['id'].dtype == np.uint64
  assert got[0]['label'].dtype == np.float32
  assert got[0]['sizes'].dtype == np.int32
  assert type(got[0]['caption']) is bytes


def test_pairs_likes_and_captions_with_cache(prepared, record):
  moments = np.arange(512).reshape(2, 2, 4, 4, 8).astype(np.float16)
  scores = {'score_pickscore': np.array([1, -2], np.float32)}
  pair = record(0, image_0=b'', moments=moments, **scores)
  folder = prepared([pair], cache=SHAPES, scores=['score_pickscore'])
  like = {
    'id': 1,
    'caption': b'c',
    'caption_id': 2,
    'source': b'a:0',
    'image': b'',
    'size': np.arange(4, dtype=np.int32),
    'generator': b'',
    'liked': 1.0,
    'moments': moments[0],
  }
  prepared([like], kind='likes', cache=SHAPES)
  caption = {
    'caption_id': 2,
    'caption': b'c',
    'input_ids': np.arange(14, dtype=np.int32).reshape(2, 7),
    'prompt_embeds': np.ones((7, 6), np.float16),
    'pooled_embeds': np.zeros(5, np.float16),
  }
  prepared([caption], kind='captions', cache=SHAPES)
  _same(records.open_folder(folder)[0], pair)
  _same(records.open_folder(folder, kind='likes')[0], like)
  _same(records.open_folder(folder, kind='captions')[0], caption)


def test_tensorflow_datasets_reads_the_same_without_tensorflow(
  prepared, record
):
  rows = [
    record(i, moments=np.full((2, 2, 4, 4, 8), i, np.float16), id=2**64 - 1 - i)
    for i in range(5)
  ]
  folder = prepared(rows, lengths=[2, 0, 3], cache=SHAPES, split='val')
  program = """
import pathlib, sys
import numpy as np
import tensorflow_datasets as tfds
from dpo_jax.data import records
root = pathlib.Path(sys.argv[1])
builder = tfds.builder_from_directory(root / 'pairs' / '1.0.0')
theirs = builder.as_data_source('val')
ours = records.open_folder(root, split='val')
assert len(theirs) == len(ours) == 5
for a, b in zip(theirs, ours, strict=True):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])
assert 'tensorflow' not in sys.modules
"""
  environment = os.environ | {'PYTHONPATH': os.getcwd()}
  subprocess.run(
    [sys.executable, '-c', program, str(folder)], check=True, env=environment
  )


def test_our_bytes_are_those_of_tensorflow_datasets(record):
  row = record(0, moments=np.ones((2, 2, 4, 4, 8), np.float16))
  features = records.features('pairs', cache=SHAPES)
  fields = record_fields.fields('pairs', cache=SHAPES)
  theirs = features.serialize_example(row)
  _same(record_fields.decode(theirs, fields), row)
  _same(features.deserialize_example_np(record_fields.encode(row, fields)), row)


def test_a_copy_for_another_process_reads(prepared, record):
  got = records.open_folder(prepared([record(i) for i in range(3)]))
  _same(got[1], record(1))
  _same(pickle.loads(pickle.dumps(got))[2], record(2))
  with pytest.raises(IndexError, match='record 3 of 3'):
    got[3]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'sizes': np.zeros((2, 3), np.int32)}, r'sizes: shape \(2, 3\)'),
    ({'sizes': np.zeros((2, 4))}, 'sizes: float64, must be int32'),
    ({'caption': 'text'}, 'caption: must be bytes, is str'),
    ({'more': 1}, 'beyond its features: more'),
  ],
)
def test_a_record_that_does_not_fit_is_refused(record, changes, message):
  fields = record_fields.fields('pairs')
  with pytest.raises(ValueError, match=message):
    record_fields.encode(record(0, **changes), fields)
  lacking = record(0)
  del lacking['label']
  with pytest.raises(ValueError, match=r'lacks.*: label'):
    record_fields.encode(lacking, fields)


def test_a_failed_shard_leaves_nothing(tmp_path, record):
  path = tmp_path / 'shard'
  with pytest.raises(ValueError, match='caption'):
    with records.ShardWriter(path, records.features('pairs')) as writer:
      writer.write(record(0))
      writer.write(record(1, caption=None))
  assert not list(tmp_path.iterdir())


def _shard(folder, i=0):
  return sorted((folder / 'pairs' / '1.0.0').glob('*array_record*'))[i]


def test_flipped_bytes_are_damage_of_that_record_only(prepared, record):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (90, 90, 3))
  rows = [record(i, image_0=bytes(rng.bytes(30_000))) for i in range(12)]
  assert pixels.size
  folder = prepared(rows, lengths=[6, 6])
  data = bytearray(_shard(folder, 1).read_bytes())
  # In the middle of record 8's picture.
  at = data.find(rows[8]['image_0'][:16]) + 9000
  data[at] ^= 0x10
  _shard(folder, 1).write_bytes(data)
  got = records.open_folder(folder)
  for i, row in enumerate(rows):
    if i != 8:
      _same(got[i], row)
  with pytest.raises(records.DamagedRecordError) as caught:
    got[8]
  error = caught.value
  assert (error.index, error.position) == (8, 2)
  assert error.shard == _shard(folder, 1).name
  assert pickle.loads(pickle.dumps(error)).args == error.args
  assert '\n' not in str(error)


def test_200_flipped_bits_are_never_read_as_something_else(prepared, record):
  rng = np.random.default_rng(1)
  rows = [record(i, image_0=bytes(rng.bytes(3000))) for i in range(9)]
  folder = prepared(rows)
  path = _shard(folder)
  right = path.read_bytes()
  wrong = found = 0
  for _ in range(200):
    data = bytearray(right)
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    got = records.open_folder(folder)
    for i, row in enumerate(rows):
      try:
        read = got[i]
      except records.DamagedRecordError:
        found += 1
        continue
      wrong += any(not np.array_equal(read[k], row[k]) for k in row)
  assert wrong == 0
  assert found > 20


@pytest.mark.parametrize('kept', [0, 10, 70_000])
def test_a_truncated_shard_is_damage(prepared, record, kept):
  folder = prepared([record(i) for i in range(4)], lengths=[2, 2])
  _shard(folder).write_bytes(_shard(folder).read_bytes()[:kept])
  got = records.open_folder(folder)
  with pytest.raises(records.DamagedRecordError):
    got[0]
  _same(got[2], record(2))


def test_a_shard_of_another_length_is_damage(prepared, record):
  folder = prepared([record(i) for i in range(5)], lengths=[2, 3])
  _shard(folder, 0).write_bytes(_shard(folder, 1).read_bytes())
  with pytest.raises(records.DamagedRecordError, match='3 records, not 2'):
    records.open_folder(folder)[0]


def test_a_record_of_another_form_is_damage(prepared, record, tmp_path):
  folder = prepared([record(0)])
  other = {'label': record_fields.Field('float32')}
  with records.ShardWriter(_shard(folder), other) as writer:
    writer.write({'label': 1.0})
  with pytest.raises(records.DamagedRecordError, match='missing or unknown'):
    records.open_folder(folder)[0]


def test_missing_parts_are_named(prepared, record, tmp_path):
  folder = prepared([record(0)])
  with pytest.raises(ValueError, match="no split 'test' of pairs; there are"):
    records.open_folder(folder, split='test')
  with pytest.raises(ValueError, match="no data set 'likes' there"):
    records.open_folder(folder, kind='likes')
  with pytest.raises(ValueError, match='prepare wrote'):
    records.open_folder(tmp_path / 'absent')
  shard = _shard(folder)
  moved = shard.rename(tmp_path / 'elsewhere')
  with pytest.raises(ValueError, match=r'array_record-00000.*: no such shard'):
    records.open_folder(folder)
  shard.symlink_to(moved)
  with pytest.raises(ValueError, match='no such shard'):
    records.open_folder(folder)


def _change(value, *path):
  """A mutation that sets the entry at `path`."""

  def run(given):
    for key in path[:-1]:
      given = given[key]
    given[path[-1]] = value

  return run


CLASS = ('featuresDict', 'features', 'caption', 'pythonClassName')
FEATURES = [
  _change('antigravity', *CLASS),
  _change('antigravity', *CLASS[:2], 'label', CLASS[3]),
  _change('os.path', *CLASS),
  _change('tensorflow_datasets.core.features.image_feature.Image', *CLASS),
  _change('evil.module.Thing', 'pythonClassName'),
  _change({'pythonClassName': 'x'}, 'featuresDict', 'features', 'more'),
  _change({'encoder': 'x'}, 'featuresDict', 'features', 'caption', 'text'),
  _change('float64', 'featuresDict', 'features', 'label', 'tensor', 'dtype'),
  _change('zlib', 'featuresDict', 'features', 'label', 'tensor', 'encoding'),
  _change(
    {'dimensions': [1 << 20, 1 << 20]},
    *('featuresDict', 'features', 'moments', 'tensor', 'shape'),
  ),
  _change(
    {'dimensions': ['2', '-1']},
    *('featuresDict', 'features', 'sizes', 'tensor', 'shape'),
  ),
  _change([], 'featuresDict', 'features'),
  _change(3, 'featuresDict'),
  _change('x', 'another'),
  lambda given: given['featuresDict']['features'].pop('label'),
]
INFO = [
  _change('evil', 'moduleName'),
  _change('../pairs', 'name'),
  _change('tfrecord', 'fileFormat'),
  _change('9.9.9', 'version'),
  _change('{DATASET}', 'splits', 0, 'filepathTemplate'),
  _change('/etc/{SPLIT}', 'splits', 0, 'filepathTemplate'),
  _change('../../{SHARD_X_OF_Y}', 'splits', 0, 'filepathTemplate'),
  _change('../x', 'splits', 0, 'name'),
  _change(['1', '-1'], 'splits', 0, 'shardLengths'),
  _change(['9' * 18], 'splits', 0, 'shardLengths'),
  _change([True], 'splits', 0, 'shardLengths'),
  _change([], 'splits', 0, 'shardLengths'),
  _change([], 'splits'),
  _change('x', 'configName'),
  lambda given: given['splits'].append(given['splits'][0]),
]


@pytest.mark.parametrize(
  ('name', 'change'),
  [('features.json', change) for change in FEATURES]
  + [('dataset_info.json', change) for change in INFO],
)
def test_foreign_metadata_are_refused_before_anything_is_imported(
  prepared, record, name, change
):
  moments = np.zeros((2, 2, 4, 4, 8), np.float16)
  folder = prepared([record(0, moments=moments)], cache=SHAPES)
  path = folder / 'pairs' / '1.0.0' / name
  given = json.loads(path.read_text())
  change(given)
  path.write_text(json.dumps(given))
  before = set(sys.modules)
  with pytest.raises(ValueError) as caught:
    records.open_folder(folder)
  assert name in str(caught.value)
  assert '\n' not in str(caught.value)
  assert set(sys.modules) == before
  assert 'antigravity' not in sys.modules


@pytest.mark.parametrize(
  'text', ['', '{', '[1', '[' * 100_000, '\ud800', 'null', '3']
)
@pytest.mark.parametrize('name', ['features.json', 'dataset_info.json'])
def test_metadata_that_are_no_json_are_refused(prepared, record, name, text):
  folder = prepared([record(0)])
  path = folder / 'pairs' / '1.0.0' / name
  path.write_bytes(text.encode('utf-8', 'surrogatepass'))
  with pytest.raises(ValueError, match=name):
    records.open_folder(folder)
