"""python -m dpo_jax.tools.prepare: folders, JSON Lines and ranked lists."""

import json

import pickapic_file
import pytest

from dpo_jax.data import records
from dpo_jax.tools import prepare


def run(source, out, *flags, layout='pickapic'):
  prepare.main(
    [f'--source={source}', f'--out={out}', f'--format={layout}', *flags]
  )


@pytest.fixture
def pictures(tmp_path):
  """A folder with 0.png ... 3.png."""
  folder = tmp_path / 'pictures'
  folder.mkdir()
  for i in range(4):
    data = pickapic_file.encode(pickapic_file.picture(i, 8, 6), 'PNG')
    (folder / f'{i}.png').write_bytes(data)
  return folder


def report_of(out):
  counts = json.loads((out / 'build_report.json').read_text())['counts']
  return {name: count for name, count in counts.items() if count}


def test_a_folder_of_pairs(pictures, tmp_path):
  rows = [
    {'caption': 'a', 'winner': '0.png', 'loser': '1.png'},
    {'caption': 'b', 'winner': '2.png', 'loser': 'gone.png'},
    {'caption': 'c', 'winner': '3.png', 'loser': '3.png'},
  ]
  text = ''.join(f'{json.dumps(row)}\n' for row in rows)
  (pictures / 'pairs.jsonl').write_text(text)
  run(pictures, tmp_path / 'o', layout='folder')
  assert report_of(tmp_path / 'o') == {
    'rows': 3,
    'examples': 3,
    'kept': 1,
    'unreadable': 1,
    'identical': 1,
    'images': 4,
    'images_unreadable': 1,
  }
  (record,) = records.open_folder(tmp_path / 'o')
  assert record['image_0'] == (pictures / '0.png').read_bytes()
  assert record['image_1'] == (pictures / '1.png').read_bytes()
  assert record['label'] == 1
  assert record['source'] == b'pairs.jsonl:0'


def test_likes(pictures, tmp_path):
  rows = [
    {'caption': 'a', 'image': '0.png', 'liked': True},
    {'caption': 'a', 'image': '0.png', 'liked': False, 'generator': 'g'},
    {'caption': 'a', 'image': '1.png', 'liked': None},
  ]
  path = pictures / 'likes.jsonl'
  path.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
  run(path, tmp_path / 'o', layout='jsonl')
  assert report_of(tmp_path / 'o') == {
    'rows': 3,
    'examples': 3,
    'kept': 2,
    'unlabelled': 1,
    'duplicates': 1,
    'images': 2,
  }
  got = records.open_folder(tmp_path / 'o', kind='likes')
  assert [float(record['liked']) for record in got] == [1, 0]
  assert got[1]['generator'] == b'g'
  assert got[1]['size'].tolist() == [8, 6, 0, 0]
  assert not (tmp_path / 'o' / 'pairs').exists()


def test_ranked_lists(pictures, tmp_path):
  names = [f'{i}.png' for i in range(3)]
  rows = [
    {'prompt': 'a', 'image_path': names, 'rank': [1, 2, 2]},
    {'prompt': 'b', 'image_path': names[:2], 'human_preference': [0, 1]},
  ]
  (pictures / 'train.json').write_text(json.dumps(rows))
  run(pictures / 'train.json', tmp_path / 'o', '--shards=2', layout='hpd')
  assert report_of(tmp_path / 'o') == {
    'rows': 2,
    'examples': 4,
    'kept': 3,
    'ties': 1,
    'images': 5,
  }
  got = records.open_folder(tmp_path / 'o')
  assert [float(record['label']) for record in got] == [1, 1, 0]
  assert [shard.length for shard in got.shards] == [2, 1]
  assert got[1]['image_1'] == (pictures / '2.png').read_bytes()
