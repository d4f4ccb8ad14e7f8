"""One pass over records, and what the columns say, by hand counts."""

import numpy as np
import pytest
from PIL import Image

from dpo_jax.data import records, scan, statistics


def _noise(png, seed, kind='PNG', side=24):
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
  image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
  return png(np.asarray(image), kind)


@pytest.fixture
def rows(record, png):
  """Nine records, each with one thing to find."""
  a, b, c, d = (_noise(png, seed) for seed in range(4))
  again = _noise(png, 0, 'BMP')

  def make(i, caption, first, second, label, makers=('x', 'y')):
    return record(
      i,
      caption=caption.encode(),
      image_0=first,
      image_1=second,
      label=label,
      sizes=np.array([[24, 24, 0, 0]] * 2, np.int32),
      generator_0=makers[0].encode(),
      generator_1=makers[1].encode(),
    )

  return [
    make(0, 'A cat', a, b, 1.0),
    make(1, 'a  CAT ', c, d, 0.0),
    # The same pair again: alike, swapped alike, and contradicted.
    make(2, 'A cat', a, b, 1.0),
    make(3, 'A cat', b, a, 0.0),
    make(4, 'A cat', b, a, 0.75),
    # The same file, and the same picture in another file.
    make(5, 'dog', c, c, 1.0),
    make(6, 'dog', a, again, 0.5, ('x', 'z')),
    make(7, 'dog', d, b'no picture', 0.25, ('z', 'z')),
    make(8, 'fox', _noise(png, 8), _noise(png, 9), 1.0, ('y', 'x')),
  ]


@pytest.fixture
def columns(prepared, rows):
  folder = prepared(rows, lengths=[4, 5])
  return scan.scan(records.open_folder(folder))


def test_counts(columns):
  assert statistics.count_all(columns) == {
    'records': 9,
    'unreadable': 0,
    'captions': 4,
    'captions_normalised': 3,
    'images_shown': 18,
    # a, b, c, d, a's BMP, no picture, and two of the fox.
    'images': 8,
    'images_kept': 18,
    'images_undecodable': 1,
  }
  assert statistics.count_labels(columns) == {
    'first': 5,
    'second': 3,
    'even': 1,
    'soft': 2,
  }
  assert [one.index for one in columns.failures] == [7]
  assert columns.failures[0].reason.startswith('image_1: cannot decode')


def test_repeats_and_conflicts(columns):
  found = statistics.find_repeats(columns)
  assert found.same_on_both_sides.tolist() == [5]
  assert found.shown_again == 10
  # a and c under three captions in all, d under two; b under one.
  assert found.several_captions == 3
  assert found.repeated == 3
  assert found.conflicting == [[0, 2, 3, 4]]


def test_pairs_that_agree_do_not_conflict(prepared, rows):
  folder = prepared(rows[:4])
  columns = scan.scan(records.open_folder(folder))
  assert statistics.find_repeats(columns).conflicting == []
  assert statistics.find_repeats(columns).repeated == 2


def test_a_file_against_itself_has_no_label_to_contradict(columns):
  columns.images[5:7] = columns.images[5]
  assert columns.captions[5] == columns.captions[6]
  columns.labels[5:7] = 0.0, 1.0
  found = statistics.find_repeats(columns)
  assert found.same_on_both_sides.tolist() == [5, 6]
  assert found.conflicting == [[0, 2, 3, 4]]


def test_near_duplicates(columns):
  found = statistics.find_alike(columns)
  assert (found.clusters, found.images, found.largest) == (1, 2, 2)
  assert found.several_captions == 1
  assert found.pairs.tolist() == [6]
  assert found.examples == [((0, 0), (6, 1))]
  assert found.complete


def test_near_duplicates_of_none(columns):
  columns.hashed[:] = False
  found = statistics.find_alike(columns)
  assert (found.clusters, found.largest, found.examples) == (0, 0, [])


def test_leaks_are_found_whatever_case_and_spaces(columns):
  found = statistics.find_leaks(columns, ['a cat', 'A CAT', '\uff26ox', 'owl'])
  assert found == {
    'prompts': 3,
    'found': 2,
    'records': 6,
    'examples': [
      {'prompt': 'A CAT', 'records': 5},
      {'prompt': '\uff26ox', 'records': 1},
    ],
  }


def test_generators(columns):
  assert statistics.count_generators(columns) == [
    # x against y: won 0, 2, 5 and, by a soft label, 4; lost 1, 3, 8.
    {'name': 'x', 'wins': 4, 'losses': 3, 'ties': 1, 'own': 0},
    {'name': 'y', 'wins': 3, 'losses': 4, 'ties': 0, 'own': 0},
    {'name': 'z', 'wins': 0, 'losses': 0, 'ties': 1, 'own': 1},
  ]


def test_sizes(columns):
  columns.sizes[3, 1] = (24, 36)
  assert statistics.count_sizes(columns) == {
    'sizes': [
      {'height': 24, 'width': 24, 'images': 17},
      {'height': 24, 'width': 36, 'images': 1},
    ],
    'distinct': 2,
    'unequal': 1,
    'shortest_side': 24,
    'longest_side': 36,
  }


def test_samples_do_not_depend_on_order(columns, prepared, rows):
  chosen = statistics.pick(columns, 4)
  folder = prepared(rows[::-1], name='backwards')
  backwards = scan.scan(records.open_folder(folder))
  assert [8 - i for i in statistics.pick(backwards, 4)] == chosen
  assert chosen != sorted(chosen)
  assert sorted(statistics.pick(columns, 100)) == list(range(9))


def test_captions_once_each_and_progress(prepared, rows, monkeypatch):
  monkeypatch.setattr(scan, 'CHUNK', 2)
  captions, done = [], []
  scan.scan(
    records.open_folder(prepared(rows)),
    on_captions=captions.extend,
    on_progress=done.append,
  )
  assert captions == ['A cat', 'a  CAT ', 'dog', 'fox']
  assert done == [2, 4, 6, 8, 9]


def test_a_damaged_record_is_left_out(prepared, rows):
  folder = prepared(rows)
  [path] = (folder / 'pairs' / '1.0.0').glob('*.array_record*')
  data = bytearray(path.read_bytes())
  place = bytes(data).index(rows[8]['image_0']) + 40
  data[place] ^= 1
  path.write_bytes(data)
  columns = scan.scan(records.open_folder(folder))
  assert columns.read.tolist() == [True] * 8 + [False]
  counts = statistics.count_all(columns)
  assert (counts['unreadable'], counts['captions']) == (1, 3)
  assert columns.failed == 2
  assert sorted(one.index for one in columns.failures) == [7, 8]
  assert 8 not in statistics.pick(columns, 9)


def test_latents_stand_for_pictures_that_are_not_kept(prepared, record):
  shapes = {'cache': records.record_fields.CacheShapes((1, 2, 2, 8))}
  moments = np.random.default_rng(0).normal(size=(3, 1, 2, 2, 8))
  a, b, c = moments.astype(np.float16)
  bare = {'caption': b'one', 'image_0': b'', 'image_1': b''}
  made = [
    record(0, moments=np.stack([a, b]), label=1.0, **bare),
    record(1, moments=np.stack([b, a]), label=1.0, **bare),
    record(2, moments=np.stack([c, c]), label=1.0, **bare),
  ]
  columns = scan.scan(records.open_folder(prepared(made, **shapes)))
  assert not columns.hashed.any() and not columns.failed
  found = statistics.find_repeats(columns)
  assert found.conflicting == [[0, 1]]
  assert found.same_on_both_sides.tolist() == [2]


def test_likes(prepared, png):
  made = [
    {
      'id': i,
      'caption': b'c',
      'caption_id': 1,
      'source': b's',
      'image': _noise(png, min(i, 1)),
      'size': np.array([24, 24, 0, 0], np.int32),
      'generator': b'x',
      'liked': float(i < 2),
    }
    for i in range(3)
  ]
  folder = prepared(made, kind='likes')
  columns = scan.scan(records.open_folder(folder, kind='likes'), kind='likes')
  # The second and third are one picture, liked and not liked.
  assert statistics.find_repeats(columns).conflicting == [[1, 2]]
  assert statistics.count_generators(columns) == [
    {'name': 'x', 'wins': 2, 'losses': 1, 'ties': 0, 'own': 0}
  ]
  assert statistics.count_sizes(columns)['unequal'] == 0
