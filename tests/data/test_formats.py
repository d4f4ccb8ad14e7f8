"""The source formats: what rows they give, and what they refuse."""

import json
import math
import os

import pickapic_file
import pyarrow as pa
import pytest

from dpo_jax.data.formats import paths, pickapic, rows, sources


@pytest.fixture
def pictures(tmp_path):
  """A folder with pictures/0.png ... 9.png."""
  (tmp_path / 'pictures').mkdir()
  for i in range(10):
    data = pickapic_file.encode(pickapic_file.picture(i, 8, 8), 'PNG')
    (tmp_path / 'pictures' / f'{i}.png').write_bytes(data)
  return tmp_path


def lines(path, given):
  path.write_text(''.join(json.dumps(row) + '\n' for row in given))
  return path


def read(source):
  total = sum(file.rows for file in source.files)
  return list(source.read(0, total))


def pair(i, j, **changes):
  return {
    'caption': f'caption {i}',
    'winner': f'pictures/{i}.png',
    'loser': f'pictures/{j}.png',
  } | changes


def like(i, liked, **changes):
  return {
    'caption': f'caption {i}',
    'image': f'pictures/{i}.png',
    'liked': liked,
  } | changes


# Parquet.


def test_any_span_of_parquet_rows_is_the_same_rows(tmp_path):
  given = [pickapic_file.make_row(i, caption=f'{i}') for i in range(23)]
  pickapic_file.write(tmp_path / 'a.parquet', given[:12], row_group_size=5)
  pickapic_file.write(tmp_path / 'b.parquet', given[12:], row_group_size=11)
  source = sources.open_source(str(tmp_path), 'pickapic')
  assert [file.rows for file in source.files] == [12, 11]
  whole = read(source)
  assert [row.caption for row in whole] == [str(i) for i in range(23)]
  assert whole[13].source == 'b.parquet:1'
  for begin, end in [
    (0, 1),
    (4, 6),
    (5, 10),
    (11, 13),
    (12, 23),
    (22, 23),
    (3, 21),
    (7, 7),
  ]:
    assert list(source.read(begin, end)) == whole[begin:end]


def test_pictures_are_read_in_small_batches(tmp_path, monkeypatch):
  given = [pickapic_file.make_row(i) for i in range(20)]
  path = pickapic_file.write(tmp_path / 'a.parquet', given, row_group_size=20)
  sizes = []
  original = pickapic._rows

  def spy(batches, *spans):
    def noted():
      for batch in batches:
        sizes.append(batch.num_rows)
        yield batch

    return original(noted(), *spans)

  monkeypatch.setattr(pickapic, '_rows', spy)
  next(pickapic.iterate(str(path)))
  assert sizes == [8]


@pytest.mark.parametrize('label', [0.7, -1.0, math.inf, None])
def test_parquet_labels_are_checked_first(tmp_path, label):
  given = [pickapic_file.make_row(i) for i in range(9)]
  given[7] |= {'label_0': label}
  pickapic_file.write(tmp_path / 'a.parquet', given)
  with pytest.raises(ValueError, match=r'a\.parquet, row 7: label_0 is'):
    sources.open_source(str(tmp_path), 'pickapic')


@pytest.mark.parametrize('damage', ['footer', 'text', 'empty', 'page'])
def test_damaged_parquet_names_the_file(tmp_path, damage):
  given = [pickapic_file.make_row(i) for i in range(4)]
  path = pickapic_file.write(tmp_path / 'a.parquet', given)
  data = path.read_bytes()
  path.write_bytes(
    {
      'footer': data[:-100],
      'text': b'hello',
      'empty': b'',
      'page': data[:4] + b'\xff' * 3000 + data[3004:],
    }[damage]
  )
  with pytest.raises(ValueError, match='not a readable parquet') as error:
    read(sources.open_source(str(tmp_path), 'pickapic'))
  assert str(path) in str(error.value)
  assert '\n' not in str(error.value)


def test_wrong_parquet_schema_names_every_column(tmp_path):
  fields = [
    field
    if field.name not in ('jpg_0', 'label_0')
    else pa.field(field.name, pa.string())
    for field in pickapic_file.SCHEMA
    if field.name != 'caption'
  ]
  row = pickapic_file.make_row(0, label_0='1', jpg_0='text')
  schema = pa.schema(fields)
  pickapic_file.write(tmp_path / 'a.parquet', [row], schema=schema)
  with pytest.raises(ValueError) as error:
    sources.open_source(str(tmp_path), 'pickapic')
  for part in (
    'missing columns caption',
    'jpg_0 is string, not binary',
    'label_0 is string, not double',
  ):
    assert part in str(error.value)


# JSON Lines.


def test_pairs_of_json_lines(pictures):
  given = [
    pair(0, 1),
    pair(2, 3, winner_generator='a', loser_generator='b', extra=[1]),
    pair(4, 5, caption=None),
    pair(6, 7, caption='x\ud800y', loser=None),
    pair(8, 9, winner='pictures/missing.png'),
  ]
  lines(pictures / 'pairs.jsonl', given)
  for layout, where in (
    ('folder', pictures),
    ('jsonl', pictures),
    ('jsonl', pictures / 'pairs.jsonl'),
  ):
    source = sources.open_source(str(where), layout)
    assert source.kind == 'pairs'
    got = read(source)
    assert [row.caption for row in got] == [
      'caption 0',
      'caption 2',
      None,
      'x?y',
      'caption 8',
    ]
    assert [row.repaired for row in got] == [False] * 3 + [True, False]
    assert got[0].images == (
      pictures / 'pictures/0.png',
      pictures / 'pictures/1.png',
    )
    assert got[0].comparisons == ((0, 1, 1.0),)
    assert got[1].generators == ('a', 'b')
    assert got[3].images[1] is None
    assert got[4].source == 'pairs.jsonl:4'
    assert list(source.read(3, 5)) == got[3:]


def test_likes_of_json_lines(pictures):
  given = [
    like(0, True),
    like(1, False),
    like(2, 1),
    like(3, 0.0),
    like(4, None),
    like(5, True, generator='g'),
  ]
  path = lines(pictures / 'likes.jsonl', given)
  source = sources.open_source(str(path), 'jsonl')
  assert source.kind == 'likes'
  got = read(source)
  assert [row.liked for row in got] == [1, 0, 1, 0, None, 1]
  assert [row.unlabelled for row in got] == [0, 0, 0, 0, 1, 0]
  assert got[5].generators == ('g',)
  assert all(row.comparisons == () for row in got)
  with pytest.raises(ValueError, match='its rows are likes, not pairs; give'):
    sources.open_source(str(pictures), 'folder')


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    (like(1, True), 'one of likes among pairs; put them into files'),
    (pair(0, 1) | like(2, True), 'a pair has caption, winner and loser'),
    ({'caption': 'x', 'winner': 'pictures/0.png'}, 'has the keys'),
    ({'caption': 'x'}, 'has the keys'),
    (pair(0, 1, caption=3), 'caption is 3; must be a text'),
    (pair(0, 1, winner=['x']), r"winner is \['x'\]; must be a text"),
    (pair(0, 1, winner_generator=1), 'winner_generator is 1'),
    (pair(0, 1, winner='../x.png'), 'leads out of the folder'),
    (pair(0, 1, winner='/etc/passwd'), 'leads out of the folder'),
    (pair(0, 1, winner='pictures/../../x'), 'leads out of the folder'),
    (pair(0, 1, winner='out/x.png'), 'leads out of the folder'),
    (pair(0, 1, winner='.'), 'leads out of the folder'),
    (pair(0, 1, winner='a\0b'), 'is no path'),
    (3, 'is no JSON object'),
    ([pair(0, 1)], 'cannot be read as JSON|is no JSON object'),
  ],
)
def test_a_wrong_line_names_file_and_row(pictures, row, message):
  outside = pictures.parent / f'{pictures.name}_outside'
  outside.mkdir()
  (pictures / 'out').symlink_to(outside)
  path = lines(pictures / 'a.jsonl', [pair(0, 1), row])
  with pytest.raises(ValueError, match=message) as error:
    sources.open_source(str(path), 'jsonl')
  assert 'a.jsonl, row 1' in str(error.value)
  assert '\n' not in str(error.value)


def test_a_wrong_like_names_file_and_row(pictures):
  for liked in ('true', 2, [1]):
    path = lines(pictures / 'a.jsonl', [like(0, True), like(1, liked)])
    with pytest.raises(ValueError, match=r'row 1: liked is .*; must be true'):
      sources.open_source(str(path), 'jsonl')


def test_folders_without_rows(tmp_path):
  with pytest.raises(ValueError, match=r'no folder with a \.jsonl of'):
    sources.open_source(str(tmp_path), 'folder')
  for layout in ('jsonl', 'hpd', 'pickapic'):
    with pytest.raises(ValueError, match='file there; name a file'):
      sources.open_source(str(tmp_path), layout)


# Ranked lists.


def test_ranked_lists_give_all_strict_pairs(pictures):
  names = [f'pictures/{i}.png' for i in range(4)]
  given = [
    {'prompt': 'a', 'image_path': names, 'rank': [2, 1, 3, 2]},
    {'prompt': 'b', 'image_path': names[:2], 'human_preference': [0, 1]},
    {
      'prompt': 'c',
      'image_path': names[:3],
      'raw_annotations': [[1, 2, 3], [2, 1, 3], [1, 2, 3]],
    },
    {'prompt': 'd', 'image_path': names[:2], 'rank': None},
    {'prompt': 'e', 'image_path': names[:2], 'human_preference': [1, 1]},
  ]
  (pictures / 'test.json').write_text(json.dumps(given))
  source = sources.open_source(str(pictures / 'test.json'), 'hpd')
  got = read(source)
  # Picture 1 is the best, 0 and 3 are equal.
  assert got[0].comparisons == (
    (0, 1, 0.0),
    (0, 2, 1.0),
    (1, 2, 1.0),
    (1, 3, 1.0),
    (2, 3, 0.0),
  )
  assert got[0].ties == 1
  assert got[1].comparisons == ((0, 1, 0.0),)
  assert got[2].comparisons == ((0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0))
  assert (got[3].comparisons, got[3].unlabelled) == ((), 1)
  assert (got[4].comparisons, got[4].ties) == ((), 1)
  assert got[0].images == tuple(pictures / name for name in names)
  assert list(source.read(2, 4)) == got[2:4]


def test_ranked_lists_find_pictures_in_the_folder_of_their_name(pictures):
  os.rename(pictures / 'pictures', pictures / 'test')
  row = {'prompt': 'a', 'image_path': ['0.png', '1.png'], 'rank': [1, 2]}
  (pictures / 'test.json').write_text(json.dumps([row]))
  got = read(sources.open_source(str(pictures), 'hpd'))
  assert got[0].images == (pictures / 'test/0.png', pictures / 'test/1.png')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'prompt': 3}, 'prompt is 3; must be a text'),
    ({'image_path': 'x'}, 'must be a list of 2 to 64'),
    ({'image_path': ['a']}, 'must be a list of 2 to 64'),
    ({'image_path': ['a', 3]}, 'must be a list of 2 to 64'),
    ({'image_path': ['a', '../b']}, 'leads out of the folder'),
    ({'rank': [1]}, 'must be 2 numbers'),
    ({'rank': [1, math.nan]}, 'must be 2 numbers'),
    ({'rank': [1, True]}, 'must be 2 numbers'),
    ({'rank': 1}, 'must be 2 numbers'),
    ({'rank': None, 'raw_annotations': 3}, 'must be lists'),
    ({'rank': None, 'raw_annotations': [[1, 2], [1]]}, 'must be 2 numbers'),
  ],
)
def test_a_wrong_ranked_list_names_file_and_row(pictures, changes, message):
  row = {'prompt': 'a', 'image_path': ['a', 'b'], 'rank': [1, 2]}
  (pictures / 'a.json').write_text(json.dumps([row, row | changes]))
  with pytest.raises(ValueError, match=message) as error:
    sources.open_source(str(pictures / 'a.json'), 'hpd')
  assert 'a.json, row 1: ' in str(error.value)
  del row['rank']
  (pictures / 'a.json').write_text(json.dumps([row]))
  with pytest.raises(ValueError, match='row 0: has none of rank, human_pref'):
    sources.open_source(str(pictures / 'a.json'), 'hpd')


# Paths and texts.


def test_roots_of_sources(tmp_path):
  (tmp_path / 'a').mkdir()
  file = tmp_path / 'a' / 'x.json'
  file.write_text('[]')
  assert paths.find_root(str(tmp_path)) == tmp_path
  assert paths.find_root(str(file)) == tmp_path / 'a'
  assert paths.find_root(str(tmp_path / '*' / 'x.*')) == tmp_path


def test_split_of_files_by_name():
  mixed = ['d/train-00000-of-00002.parquet', 'd/val_a-00000-of-00001-x.parquet']
  assert paths.choose_split(mixed, 'train') == mixed[:1]
  assert paths.choose_split(mixed, 'val_a') == mixed[1:]
  with pytest.raises(ValueError, match='of the splits train, val_a'):
    paths.choose_split(mixed, 'val')
  # One split only, or files named otherwise: all of them.
  assert paths.choose_split(mixed[:1], 'x') == mixed[:1]
  plain = ['a.parquet', *mixed]
  assert paths.choose_split(plain, 'x') == plain


def test_texts_become_valid_unicode():
  assert rows.to_text(None) == (None, False)
  assert rows.to_text('a\0\u20ac') == ('a\0\u20ac', False)
  assert rows.to_text(b'a\xe2\x82\xac') == ('a\u20ac', False)
  assert rows.to_text('a\ud800') == ('a?', True)
  assert rows.to_text(b'a\xff') == ('a\ufffd', True)


def test_hash_is_golden():
  # What `printf 'pair\0a' | b2sum -l 64` prints.
  assert rows.hash_texts(8, 'pair', 'a') == 0xBABBD8153D7BA374
