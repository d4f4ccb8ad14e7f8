"""The digits' table: shares, distances, what an arm's folder has to hold."""

import types

import numpy as np
import pytest
from PIL import Image

from benchmarks import digits_rounds as bench
from dpo_jax.evaluate import stats
from dpo_jax.judging import items as items_lib
from dpo_jax.judging import votes as votes_lib


def judges():
  """Bright pictures are crossed, and all are sevens."""
  return bench.Judges(
    types.SimpleNamespace(predict=lambda x: np.full(len(x), 7)),
    types.SimpleNamespace(predict=lambda x: x.mean(1) > 0.5),
    stats.share([True]),
    stats.share([True]),
    np.full((1, 64), 0.2),
  )


def test_a_row():
  pictures = np.full((4, 8, 8), 51, np.uint8)
  pictures[0], pictures[1] = 255, 81
  malign = np.array([True, False, False, False])
  cells = bench.row('arm', bench.Arm(pictures, malign), judges()).split('|')
  name, count, labeller, other, sevens, nearest, spread = (
    cell.strip() for cell in cells[1:-1]
  )
  assert (name, count) == ('arm', '4')
  assert labeller == other and labeller.startswith('25.0 [')
  assert sevens.startswith('100.0 [')
  # 0, 0, 30 and 204 grey values from the only real one.
  assert nearest == '15'
  # Of 255, 81, 51, 51: the standard deviation.
  assert spread == f'{np.std([255, 81, 51, 51]):.0f}'


def test_every_picture_has_a_vote(tmp_path, capsys):
  for number in range(3):
    folder = tmp_path / 'pictures'
    folder.mkdir(exist_ok=True)
    Image.new('RGB', (8, 8), (number,) * 3).save(folder / f'{number}.png')
  items = items_lib.open_pictures(str(folder))

  def vote(*keys):
    file = votes_lib.open_for(
      tmp_path / 'measured.jsonl', items, mode=items_lib.LIKES
    )
    question = items_lib.LIKES_QUESTION
    rows = [
      {'item': key, 'question': question, 'choice': 'malign'} for key in keys
    ]
    file.add(f'number-{keys[0][0]}', 'judge', rows)
    file.close()

  vote('0.png', '1.png')
  with pytest.raises(ValueError, match='2 votes on 3 pictures'):
    bench.read_arm(tmp_path)
  words = ['--digits=d', '--hand=h', f'none={tmp_path}']
  assert bench.main(words) == 2
  assert 'error: none=' in capsys.readouterr().err
  vote('2.png')
  arm = bench.read_arm(tmp_path)
  assert arm.pictures[:, 0, 0].tolist() == [0, 1, 2] and arm.malign.all()


def test_a_sheet_frames_what_is_malign(tmp_path):
  pictures = np.zeros((2, 8, 8), np.uint8)
  arm = bench.Arm(pictures, np.array([True, False]))
  bench.save_rows(tmp_path / 'a' / 'sheet.png', {'none': arm})
  with Image.open(tmp_path / 'a' / 'sheet.png') as image:
    pixels = np.asarray(image)
  cell = 8 * bench.ENLARGED + 2 * bench.EDGE
  assert pixels[0, bench.ROOM].tolist() == [0xDC, 0x28, 0x28]
  assert pixels[0, bench.ROOM + cell + 2].tolist() == [0x40] * 3
