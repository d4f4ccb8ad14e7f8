"""Reading pairs: labels, ties, counts, errors, splits."""

import math

import numpy as np
import pyarrow as pa
import pytest

from dpo_jax.data import pairs


def test_label_decides_and_ties_are_dropped(write, row):
  rows = [row(0, 1.0), row(1, 0.0), row(2, 0.5), row(3, 0.0)]
  got = pairs.read_parquet(write(rows))
  assert got.captions == ['caption 0', 'caption 1', 'caption 3']
  assert got.winners == [rows[0]['jpg_0'], rows[1]['jpg_1'], rows[3]['jpg_1']]
  assert got.losers == [rows[0]['jpg_1'], rows[1]['jpg_0'], rows[3]['jpg_0']]
  assert got.winner_styles == ['x', 'y', 'y']
  assert got.loser_styles == ['y', 'x', 'x']
  assert got.ids.dtype == np.uint32


def test_counts_add_up(write, row):
  same = row(5)['jpg_0']
  rows = [
    row(0),
    row(0, 0.0),
    row(1, 0.5),
    row(2, math.nan),
    row(3, has_label=False),
    row(4, None, has_label=False),
    row(5, jpg_1=same),
  ]
  counts = pairs.read_parquet(write(rows)).counts
  assert counts == pairs.PairCounts(
    rows=7, kept=2, ties=1, unlabelled=3, identical=1, repeated=1
  )


def test_id_is_stable_and_blind_to_the_label(write, row):
  first = pairs.read_parquet(write([row(0), row(1)], 'a.parquet'))
  second = pairs.read_parquet(write([row(1, 0.0), row(0)], 'b.parquet'))
  assert first.ids.tolist() == second.ids.tolist()[::-1]
  # A golden, computed apart from the code: blake2b, 4 bytes, of the texts
  # 'pair', caption, uid, uid joined by NUL. Another hash would silently change
  # every augmentation.
  assert first.ids.tolist() == [2137799690, 2184415602]


def test_id_without_uids_comes_from_the_bytes(write, row):
  bare = {'image_0_uid': None, 'image_1_uid': ''}
  rows = [row(0, **bare), row(1, caption='caption 0', **bare)]
  ids = pairs.read_parquet(write(rows)).ids
  assert ids[0] != ids[1]


def test_files_folders_and_globs(write, row, tmp_path):
  write([row(0)], 'a.parquet')
  write([row(1)], 'b.parquet')
  names = ['caption 0', 'caption 1']
  assert pairs.read_parquet(tmp_path).captions == names
  assert pairs.read_parquet(str(tmp_path / '*.parquet')).captions == names
  twice = [tmp_path / 'b.parquet', tmp_path]
  assert pairs.read_parquet(twice).captions == names[::-1]


@pytest.mark.parametrize('label', [0.7, -1.0, 2.0, math.inf, None])
def test_impossible_label_names_file_and_row(write, row, label):
  path = write([row(i) for i in range(5)] + [row(5, label)])
  with pytest.raises(ValueError, match=r'pairs\.parquet, row 5: label_0 is'):
    pairs.read_parquet(path)


@pytest.mark.parametrize('name', ['caption', 'jpg_0', 'jpg_1'])
def test_empty_cell_names_file_and_row(write, row, name):
  path = write([row(0), row(1, **{name: None})])
  with pytest.raises(ValueError, match=rf'parquet, row 1: {name} is empty'):
    pairs.read_parquet(path)


def test_missing_columns_are_all_named(write, row):
  schema = pa.schema([('caption', pa.string()), ('jpg_0', pa.binary())])
  path = write([row(0)], schema=schema)
  with pytest.raises(ValueError, match='missing columns jpg_1, label_0;'):
    pairs.read_parquet(path)


def test_wrong_types_are_all_named(write, row):
  schema = pa.schema(
    [
      ('caption', pa.string()),
      ('jpg_0', pa.binary()),
      ('jpg_1', pa.binary()),
      ('label_0', pa.string()),
      ('model_0', pa.int64()),
    ]
  )
  path = write([row(0, label_0='1', model_0=3, label_1=None)], schema=schema)
  with pytest.raises(ValueError) as error:
    pairs.read_parquet(path)
  assert 'column label_0 is string, not double' in str(error.value)
  assert 'column model_0 is int64, not string' in str(error.value)
  assert '\n' not in str(error.value)


def test_optional_columns_and_large_types(write, row):
  schema = pa.schema(
    [
      ('caption', pa.large_string()),
      ('jpg_0', pa.large_binary()),
      ('jpg_1', pa.large_binary()),
      ('label_0', pa.float32()),
    ]
  )
  got = pairs.read_parquet(write([row(0), row(1, 0.0)], schema=schema))
  assert got.winner_styles == ['', '']
  assert got.counts.kept == 2


@pytest.mark.parametrize('damage', ['truncated', 'text', 'empty', 'page'])
def test_damaged_file_is_one_line(write, row, damage):
  path = write([row(i) for i in range(4)])
  data = path.read_bytes()
  page = data[:4] + b'\xff' * 200 + data[204:]
  path.write_bytes(
    {
      'truncated': data[: len(data) // 2],
      'text': b'hello',
      'empty': b'',
      'page': page,
    }[damage]
  )
  with pytest.raises(ValueError, match='not a readable parquet file') as error:
    pairs.read_parquet(path)
  assert '\n' not in str(error.value)
  assert str(path) in str(error.value)


def test_path_without_files(tmp_path):
  for path in (tmp_path, tmp_path / 'no.parquet', str(tmp_path / '*.parquet')):
    with pytest.raises(ValueError, match='no parquet file there'):
      pairs.read_parquet(path)
  with pytest.raises(ValueError, match='no parquet file named'):
    pairs.read_parquet([])


def test_only_ties_is_an_error(write, row):
  with pytest.raises(ValueError, match=r'no pair with a winner among 1 rows'):
    pairs.read_parquet(write([row(0, 0.5)]))


def test_images_of_all_rows_once(write, row):
  rows = [
    row(0),
    row(1, 0.5),
    row(2, math.nan),
    row(3, caption='caption 0', image_0_uid='a0', model_1='z'),
  ]
  got = pairs.read_images(write(rows))
  # The image a0 comes twice with one caption and is taken once.
  assert len(got) == 7
  assert got.style_names == ('x', 'y', 'z')
  assert got.styles.tolist() == [0, 1, 0, 1, 0, 1, 2]
  assert got.images[0] == rows[0]['jpg_0']
  assert got.captions[-1] == 'caption 0'
  assert len(set(got.ids.tolist())) == 7


def test_split_has_no_caption_on_both_sides(write, row):
  rows = [
    row(i, caption=f'caption {i % 40}', image_0_uid=f'u{i}') for i in range(120)
  ]
  everything = pairs.read_parquet(write(rows))
  train, held = pairs.split_by_caption(everything, 0.3)
  assert not set(train.captions) & set(held.captions)
  assert len(train) + len(held) == 120
  assert 0.1 < len(held) / 120 < 0.5
  assert sorted([*train.ids, *held.ids]) == sorted(everything.ids)
  # The side belongs to the caption, not to the other rows.
  fewer, _ = pairs.split_by_caption(everything.select(range(60)), 0.3)
  assert set(fewer.captions) <= set(train.captions)


def test_split_of_images_goes_with_split_of_pairs(write, row):
  path = write([row(i) for i in range(30)])
  _, held_pairs = pairs.split_by_caption(pairs.read_parquet(path), 0.3)
  _, held_images = pairs.split_by_caption(pairs.read_images(path), 0.3)
  assert set(held_pairs.captions) == set(held_images.captions)
  assert held_images.style_names == ('x', 'y')


def test_split_refuses_nonsense(write, row):
  everything = pairs.read_parquet(write([row(0), row(1)]))
  for share in (-0.1, 1.0, math.nan):
    with pytest.raises(ValueError, match='at least 0 and below 1'):
      pairs.split_by_caption(everything, share)
  with pytest.raises(ValueError, match='no held-out caption among 2'):
    pairs.split_by_caption(everything, 1e-9)
  train, held = pairs.split_by_caption(everything, 0.0)
  assert len(train) == 2
  assert len(held) == 0


def test_surrogates_and_controls_in_captions_hash():
  # Arrow refuses surrogates; captions built in Python may hold them.
  empty = np.zeros(2, np.uint32)
  images = pairs.CaptionedImages(
    ['\ud800', 'a\0b'], [b'', b''], empty.astype(np.int32), empty, ('',)
  )
  assert len(pairs.split_by_caption(images, 0.0)[0]) == 2
