"""Verification names exactly what is damaged (D1), and nothing else."""

import json
import os
import shutil

import numpy as np
import prepared_folder
import pytest

from dpo_jax.data import cached, checks, record_fields, side_files
from dpo_jax.tools import verify

LENGTHS = [3, 4, 3]
HASHES = 'pairs-train.split_hashes.npy'
SHARD = 'pairs/1.0.0/pairs-train.array_record-{:05d}-of-00003'


@pytest.fixture
def rows():
  return [prepared_folder.make_record(i) for i in range(10)]


@pytest.fixture
def folder(tmp_path, rows):
  return prepared_folder.write(tmp_path / 'data', rows, lengths=LENGTHS)


def _check(folder):
  return checks.Folder(folder).check()


def _reasons(folder):
  """(file, place, reason) of every problem that is a record's."""
  return [
    (problem.file, problem.record, problem.reason)
    for problem in _check(folder).problems
    if problem.record is not None
  ]


def _files(report):
  return {p.file: p.reason for p in report.problems if p.record is None}


def test_all_is_good(folder, capsys):
  report = _check(folder)
  assert report.problems == []
  assert (report.files, report.records, report.images) == (3, 10, 20)
  assert verify.run([f'--data={folder}']) == 0
  assert 'all is good' in capsys.readouterr().out
  # With no checksum at hand the records are checked all the same.
  (folder / 'checksums.json').unlink()
  assert _files(_check(folder)) == {'checksums.json': 'is missing'}


@pytest.mark.parametrize('victim', range(10))
@pytest.mark.parametrize('where', ['first', 'middle', 'last'])
def test_overwritten_bytes_name_the_record(folder, rows, victim, where):
  number, place = [(s, p) for s, n in enumerate(LENGTHS) for p in range(n)][
    victim
  ]
  path = prepared_folder.shards(folder)[number]
  data = bytearray(path.read_bytes())
  image = rows[victim]['image_1']
  start = bytes(data).index(image)
  at = {'first': 0, 'middle': len(image) // 2, 'last': len(image) - 3}[where]
  data[start + at : start + at + 3] = b'\x55\xaa\x55'
  path.write_bytes(data)
  report = _check(folder)
  name = SHARD.format(number)
  assert report.damaged == [(name, place)]
  assert [p.index for p in report.problems if p.record is not None] == [victim]
  # Nothing is left out silently: all were read, and the file is named too.
  assert report.records == 10 and report.images == 18
  assert 'SHA-256' in _files(report)[name]


def test_any_flipped_bit_is_found(folder):
  """The checksum covers what lies between the records, too."""
  rng = np.random.default_rng(0)
  path = prepared_folder.shards(folder)[1]
  whole = path.read_bytes()
  for place in rng.choice(len(whole), 25, replace=False):
    data = bytearray(whole)
    data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    report = _check(folder)
    assert SHARD.format(1) in _files(report)
    assert {file for file, _ in report.damaged} <= {SHARD.format(1)}


def test_hashes_that_decide_what_is_held_out(folder):
  path = folder / HASHES
  good = np.load(path)
  for bad, reason in [
    (good[[1, 0, *range(2, 10)]], '2 numbers are not those of the captions'),
    (good[1:], 'must be the split hashes of 10 pairs'),
    (good.astype(np.int64), 'must be the split hashes of 10 pairs'),
  ]:
    np.save(path, bad)
    assert reason in _files(_check(folder))[HASHES]
  path.write_bytes(b'no numbers')
  assert 'no index of pairs' in _files(_check(folder))[HASHES]
  path.unlink()
  assert 'is missing' in _files(_check(folder))[HASHES]


@pytest.mark.parametrize('share', [0, 0.3, 0.9, 0.999])
def test_truncated_shard(folder, share):
  path = prepared_folder.shards(folder)[1]
  whole = path.read_bytes()
  path.write_bytes(whole[: int(share * len(whole))])
  report = _check(folder)
  name = SHARD.format(1)
  assert report.damaged == [(name, place) for place in range(4)]
  assert f'bytes of {len(whole)}' in _files(report)[name]
  text = verify.describe(report)
  assert 'record 0 to 3 (number 3 of the split)' in text


def test_missing_linked_and_foreign_shards(folder, tmp_path):
  first, second, third = prepared_folder.shards(folder)
  first.unlink()
  moved = second.rename(tmp_path / 'elsewhere')
  second.symlink_to(moved)
  third.with_name('pairs-old.array_record-00000-of-00001').write_bytes(b'x')
  report = _check(folder)
  assert report.damaged == []
  assert _files(report) == {
    SHARD.format(0): 'the shard is missing',
    SHARD.format(1): 'the shard is no plain file',
    'pairs/1.0.0/pairs-old.array_record-00000-of-00001': (
      'is named by no metadata'
    ),
  }


def test_exchanged_shards(folder):
  first, _, third = prepared_folder.shards(folder)
  data = first.read_bytes(), third.read_bytes()
  first.write_bytes(data[1])
  third.write_bytes(data[0])
  report = _check(folder)
  # Shards and hashes tell of other captions now; no record is damaged.
  assert set(_files(report)) == {SHARD.format(0), SHARD.format(2), HASHES}
  assert report.damaged == []


@pytest.mark.parametrize(
  ('changes', 'reason'),
  [
    ({'label': 1.5}, 'label is 1.5, not in [0, 1]'),
    ({'label': -0.25}, 'label is -0.25, not in [0, 1]'),
    ({'label': float('nan')}, 'label holds a number that is not finite'),
    ({'caption': b'other'}, f'{cached.caption_id("caption 4")} is not the id'),
    ({'id': 3}, 'its id is that of number 2 of the split'),
    ({'image_0': b''}, 'image_0 is empty, and there are no latents'),
    (
      {'sizes': np.array([[16, 16, 0, 0], [16, 17, 0, 0]], np.int32)},
      'image_1 is 16 x 16 pixels (height, width), which 16 x 17 is not and '
      'does not scale to',
    ),
    (
      {'sizes': np.array([[8, 8, 0, 0], [16, 16, 0, 0]], np.int32)},
      'image_0 is 16 x 16 pixels (height, width), which 8 x 8 is not and '
      'does not scale to',
    ),
    (
      {'sizes': np.zeros((2, 4), np.int32) + 16, 'image_1': b'GIF89a'},
      'image_1: cannot decode image',
    ),
  ],
)
def test_what_a_readable_record_says(tmp_path, rows, changes, reason):
  rows[4] |= changes
  folder = prepared_folder.write(tmp_path / 'data', rows, lengths=LENGTHS)
  [(file, place, given)] = _reasons(folder)
  assert (file, place) == (SHARD.format(1), 1)
  assert given.startswith(reason)


def test_sizes_before_a_scaling_are_true(tmp_path, rows):
  rows[4]['image_0'] = prepared_folder.picture(0, 16)
  rows[4]['sizes'] = np.array([[512, 513, 0, 0], [16, 16, 0, 0]], np.int32)
  folder = prepared_folder.write(tmp_path / 'data', rows)
  assert _reasons(folder) == []


SHAPES = record_fields.CacheShapes(
  moments=(2, 2, 2, 8), input_ids=(1, 4), prompt_embeds=(4, 3)
)


DESCRIPTION = cached.Description(
  model={'name': 'tiny', 'revision': ''},
  weights={'vae': '0' * 64},
  size=16,
  flips=2,
  keep_images=True,
  compute_dtype='float32',
  versions={},
)


def _text(number, caption, **changes):
  return {
    'caption_id': number,
    'caption': caption,
    'input_ids': np.zeros((1, 4), np.int32),
    'prompt_embeds': np.zeros((4, 3), np.float16),
  } | changes


def _cached(folder, rows, change=lambda texts: None):
  """With a cache; `change` spoils the list of records of captions."""
  moments = np.zeros((2, 2, 2, 2, 8), np.float16)
  rows = [{'moments': moments} | row for row in rows]
  prepared_folder.write(folder, rows, cache=SHAPES)
  texts = [_text(row['caption_id'], row['caption']) for row in rows]
  texts.sort(key=lambda text: text['caption_id'])
  ids = np.array([text['caption_id'] for text in texts], np.uint64)
  change(texts)
  prepared_folder.write(folder, texts, kind='captions', cache=SHAPES)
  (folder / 'cache.json').write_text(json.dumps(DESCRIPTION.to_json()))
  side_files.write_index(folder / cached.INDEX, ids)
  return folder


def test_cached_latents_and_captions(tmp_path, rows):
  rows[2]['image_1'] = b''
  folder = _cached(tmp_path / 'data', rows)
  report = _check(folder)
  assert report.problems == []
  assert (report.records, report.images) == (20, 19)


def test_latents_that_are_not_finite(tmp_path, rows):
  broken = np.zeros((2, 2, 2, 2, 8), np.float16)
  broken[1, 1, 1, 1, 7] = np.inf
  rows[6]['moments'] = broken
  [(_, place, reason)] = _reasons(_cached(tmp_path / 'data', rows))
  assert place == 6 and reason == 'moments holds a number that is not finite'


def test_captions_that_are_spoilt(tmp_path, rows):
  def change(texts):
    texts[2]['prompt_embeds'] = np.full((4, 3), np.nan, np.float16)
    texts[4]['caption'] = b'of another'
    texts[6], texts[7] = texts[7], texts[6]
    texts[9] = texts[8]

  found = _reasons(_cached(tmp_path / 'data', rows, change))
  numbers = sorted(row['caption_id'] for row in rows)
  [lost] = [i for i, row in enumerate(rows) if row['caption_id'] == numbers[9]]
  assert [(place, reason) for _, place, reason in found] == [
    (2, 'prompt_embeds holds a number that is not finite'),
    (4, f'{numbers[4]} is not the id of its caption'),
    (7, f'caption {numbers[6]} is out of order'),
    (9, f'caption {numbers[8]} comes more than once'),
    (lost, f'its caption {numbers[9]} is not among the captions'),
  ]


def test_index_of_other_captions(tmp_path, rows):
  folder = _cached(tmp_path / 'data', rows)
  good = np.load(folder / cached.INDEX)
  for ids, reason in [
    (good + np.uint64(1), 'is not that of the captions'),
    (good[1:], 'must be the rising ids of 10 captions'),
  ]:
    side_files.write_index(folder / cached.INDEX, ids)
    assert reason in _files(_check(folder))[cached.INDEX]


def test_latents_without_captions(tmp_path, rows):
  folder = _cached(tmp_path / 'data', rows)
  shutil.rmtree(folder / 'captions')
  prepared_folder.write_checksums(folder)
  reason = 'are missing, though the records hold latents'
  assert _files(_check(folder)) == {'captions': reason}


@pytest.mark.parametrize(
  ('changes', 'reason'),
  [
    (None, 'is missing, though the records hold latents'),
    ({'flips': 1}, 'flips is 1, the records hold 2'),
    ({'size': 24}, 'size is 24, the records hold latents of 2 x 2'),
    ({'size': 17}, 'size is 17, the records hold latents of 2 x 2'),
    ({'size': 'big'}, 'not as dpo_jax.caching writes it'),
  ],
)
def test_cache_of_another_shape(tmp_path, rows, changes, reason):
  folder = _cached(tmp_path / 'data', rows)
  path = folder / 'cache.json'
  path.unlink()
  if changes:
    path.write_text(json.dumps(DESCRIPTION.to_json() | changes))
  assert reason in _files(_check(folder))['cache.json']


@pytest.mark.parametrize(
  ('text', 'reason'),
  [
    ('{"../../outside": {}}', "names '../../outside', which is no shard"),
    ('[' * 100_000, 'not JSON'),
    ('7', 'not a JSON object'),
    ('{', 'not JSON'),
  ],
)
def test_checksums_are_not_trusted(folder, text, reason):
  (folder / 'checksums.json').write_text(text)
  assert reason in _files(_check(folder))['checksums.json']


@pytest.mark.parametrize(
  'entry', [None, 7, {}, {'bytes': 'x', 'sha256': '0' * 64}, {'bytes': True}]
)
def test_entries_of_checksums_that_say_nothing(folder, entry):
  path = folder / 'checksums.json'
  sums = json.loads(path.read_text())
  sums[SHARD.format(2)] = entry
  path.write_text(json.dumps(sums))
  assert set(_files(_check(folder))) == {SHARD.format(2)}


def test_exit_codes_and_json(folder, capsys, tmp_path):
  path = prepared_folder.shards(folder)[2]
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 255
  os.truncate(path, 10)
  assert verify.run([f'--data={folder}', '--json']) == verify.DAMAGED == 1
  told = json.loads(capsys.readouterr().out)
  assert not told['good']
  assert told['damaged'] == [
    {'file': SHARD.format(2), 'record': place} for place in range(3)
  ]
  for argv, word in [
    ([f'--data={tmp_path / "none"}'], 'holds neither pairs nor likes'),
    ([], '--data'),
    ([f'--data={folder}', '--jsn'], 'did you mean --json?'),
  ]:
    assert verify.run(argv) == 2
    error = capsys.readouterr().err
    assert word in error and len(error.splitlines()) == 1
  info = folder / 'pairs' / '1.0.0' / 'features.json'
  info.write_text('{}')
  assert verify.run([f'--data={folder}']) == 2
  assert 'features.json' in capsys.readouterr().err
