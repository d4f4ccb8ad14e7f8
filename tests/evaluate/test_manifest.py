import json

import numpy as np
import pytest
from PIL import Image

from dpo_jax.evaluate import manifest

ENTRIES = [
  {'file': f'{i}_0.png', 'id': str(i), 'prompt': f'p{i}', 'seed': i}
  for i in range(3)
]
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
  pictures = manifest.Pictures(tmp_path / 'out', {'steps': 3})
  assert not any(pictures.is_done(entry) for entry in ENTRIES)
  pictures.add(ENTRIES, IMAGES)
  return tmp_path / 'out'


def _done(folder, settings=None):
  pictures = manifest.Pictures(folder, settings or {'steps': 3})
  return [pictures.is_done(entry) for entry in ENTRIES]


def test_pictures_are_written_and_found_again(folder):
  for entry, pixels in zip(ENTRIES, IMAGES, strict=True):
    with Image.open(folder / entry['file']) as image:
      np.testing.assert_array_equal(image, pixels)
  assert _done(folder) == [True] * 3
  assert not list(folder.glob('*.partial'))


def test_what_is_damaged_missing_or_of_another_prompt_is_made_again(folder):
  (folder / '0_0.png').unlink()
  with (folder / '1_0.png').open('ab') as file:
    file.write(b'x')
  assert _done(folder) == [False, False, True]
  pictures = manifest.Pictures(folder, {'steps': 3})
  assert not pictures.is_done(ENTRIES[2] | {'prompt': 'another'})
  assert not pictures.is_done(ENTRIES[2] | {'seed': 9})
  pictures.add(ENTRIES[:2], IMAGES[:2])
  assert _done(folder) == [True] * 3


def test_a_torn_last_line_is_survived(folder):
  path = folder / 'manifest.jsonl'
  path.write_bytes(path.read_bytes()[:-20])
  pictures = manifest.Pictures(folder, {'steps': 3})
  assert [pictures.is_done(entry) for entry in ENTRIES] == [True, True, False]
  pictures.add(ENTRIES[2:], IMAGES[2:])
  assert _done(folder) == [True] * 3


def test_close_leaves_one_line_a_picture_in_order(folder):
  pictures = manifest.Pictures(folder, {'steps': 3})
  pictures.add(ENTRIES[:1], IMAGES[:1])
  pictures.close([entry['file'] for entry in ENTRIES[::-1]])
  lines = (folder / 'manifest.jsonl').read_text().splitlines()
  assert [json.loads(line)['id'] for line in lines] == ['2', '1', '0']
  assert _done(folder) == [True] * 3


def test_other_settings_and_foreign_folders_are_refused(folder, tmp_path):
  with pytest.raises(ValueError, match='steps: 3 -> 4'):
    manifest.Pictures(folder, {'steps': 4})
  foreign = tmp_path / 'photos'
  foreign.mkdir()
  (foreign / 'cat.jpg').touch()
  with pytest.raises(ValueError, match='holds other files'):
    manifest.Pictures(foreign, {'steps': 3})
