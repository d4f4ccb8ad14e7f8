"""The shipped emoji pairs and tokenizer, and the scripts that make them."""

import io
import json
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import transformers
from PIL import Image
from pyarrow import parquet

from dpo_jax.data import images as images_lib
from dpo_jax.data import pairs as pairs_lib

EMOJI = pathlib.Path(__file__).parents[2] / 'examples' / 'emoji'
TOKENIZER = EMOJI / 'architecture' / 'tokenizer'
# Pick-a-Pic's columns, written down from the data set, not from the script.
COLUMNS = [
  ('are_different', 'bool'),
  ('best_image_uid', 'string'),
  ('caption', 'string'),
  ('created_at', 'timestamp[ns]'),
  ('has_label', 'bool'),
  ('image_0_uid', 'string'),
  ('image_0_url', 'string'),
  ('image_1_uid', 'string'),
  ('image_1_url', 'string'),
  ('jpg_0', 'binary'),
  ('jpg_1', 'binary'),
  ('label_0', 'double'),
  ('label_1', 'double'),
  ('model_0', 'string'),
  ('model_1', 'string'),
  ('ranking_id', 'int64'),
  ('user_id', 'int64'),
  ('num_example_per_prompt', 'int64'),
  ('__index_level_0__', 'int64'),
]


@pytest.fixture(scope='module')
def rows():
  return parquet.read_table(EMOJI / 'pairs.parquet').to_pylist()


def test_schema_and_size():
  path = EMOJI / 'pairs.parquet'
  schema = parquet.read_schema(path)
  assert [(f.name, str(f.type)) for f in schema] == COLUMNS
  assert path.stat().st_size <= 5_000_000
  assert parquet.ParquetFile(path).num_row_groups > 1


def test_captions_are_unique_and_plain(rows):
  captions = [row['caption'] for row in rows]
  assert len(set(captions)) == len(captions) >= 400
  for caption in captions:
    assert caption == caption.lower().strip()
    assert caption.isascii()
    assert len(caption) >= 2


def check_labels(rows):
  """Twemoji wins wherever there is a winner."""
  for row in rows:
    assert {row['model_0'], row['model_1']} == {'noto', 'twemoji'}
    assert row['label_0'] + row['label_1'] == 1
    if row['label_0'] == 0.5:
      assert row['best_image_uid'] == ''
      continue
    best = 0 if row['label_0'] == 1 else 1
    assert row[f'model_{best}'] == 'twemoji'
    assert row['best_image_uid'] == row[f'image_{best}_uid']


def test_labels_and_styles(rows):
  check_labels(rows)
  ties = [row for row in rows if row['label_0'] == 0.5]
  assert 0.05 < len(ties) / len(rows) < 0.15
  first = [row['model_0'] == 'twemoji' for row in rows]
  assert 0.4 < np.mean(first) < 0.6


def test_pictures_are_distinct_32_pixels(rows):
  seen = set()
  for row in rows:
    for side in (0, 1):
      pixels = images_lib.decode(row[f'jpg_{side}'])
      assert pixels.shape == (32, 32, 3)
      seen.add((row[f'model_{side}'], pixels.tobytes()))
  assert len(seen) == 2 * len(rows)


def test_package_reads_them(rows):
  pairs = pairs_lib.read_parquet(EMOJI / 'pairs.parquet')
  assert pairs.counts.kept + pairs.counts.ties == len(rows)
  assert set(pairs.winner_styles) == {'twemoji'}
  assert set(pairs.loser_styles) == {'noto'}
  train, held = pairs_lib.split_by_caption(pairs, 0.2)
  assert len(train) > 400
  assert len(held) > 60


def test_notice_names_both_licences():
  notice = (EMOJI / 'NOTICE').read_text()
  for words in (
    'https://www.apache.org/licenses/LICENSE-2.0',
    'https://creativecommons.org/licenses/by/4.0/',
    'Google',
    'Twitter',
    'resized to 32x32',
  ):
    assert words in notice


# A package of a few drawn emoji: name, category, subcategory and a colour.
ENTRIES = [
  ('RED APPLE', 'Food & Drink', 'food-fruit', 'red'),
  ('BLACK SCISSORS', 'Objects', 'office', 'black'),
  ('PI\u00d1ATA', 'Activities', 'game', 'orange'),
  ('HIGH VOLTAGE SIGN', 'Travel & Places', 'sky & weather', 'yellow'),
  ('SKIN', 'Component', 'skin-tone', 'brown'),
  ('FLAG', 'Flags', 'flag', 'green'),
  ('RED FRUIT', 'Food & Drink', 'food-fruit', 'red'),
  ('CLOCK FACE ONE OCLOCK', 'Travel & Places', 'time', 'blue'),
  ('MAN RUNNING', 'People & Body', 'person-activity', 'purple'),
  ('ROBOT FACE', 'Smileys & Emotion', 'face-costume', 'gray'),
]


def make_package(folder, vendor, scale):
  pictures = folder / 'package' / 'img' / vendor / '64'
  pictures.mkdir(parents=True)
  entries = []
  for i, (name, category, subcategory, colour) in enumerate(ENTRIES):
    image = Image.new('RGBA', (64, 64), (0, 0, 0, 0))
    image.paste(Image.new('RGBA', (scale, scale), colour), (8, 8))
    image.save(pictures / f'{i}.png')
    entries.append(
      {
        'name': name,
        'short_name': f's{i}',
        'category': category,
        'subcategory': subcategory,
        'sort_order': i,
        'image': f'{i}.png',
        'has_img_google': True,
        'has_img_twitter': True,
      }
    )
  (folder / 'package' / 'emoji.json').write_text(json.dumps(entries))


def build(folder, out, captions):
  """Runs the script as a user would."""
  return subprocess.run(
    [
      sys.executable,
      EMOJI / 'build_pairs.py',
      f'--google={folder / "google"}',
      f'--twitter={folder / "twitter"}',
      f'--out={out}',
      f'--captions={captions}',
      '--seed=1',
    ],
    capture_output=True,
    text=True,
  )


def test_rebuild_from_a_tiny_package(tmp_path):
  make_package(tmp_path / 'google', 'google', 40)
  make_package(tmp_path / 'twitter', 'twitter', 24)
  outs = [tmp_path / name for name in ('a.parquet', 'b.parquet')]
  for out in outs:
    done = build(tmp_path, out, 5)
    assert done.returncode == 0, done.stderr
  assert outs[0].read_bytes() == outs[1].read_bytes()
  table = parquet.read_table(outs[0])
  assert [(f.name, str(f.type)) for f in table.schema] == COLUMNS
  assert set(table['caption'].to_pylist()) == {
    'red apple',
    'scissors',
    'pinata',
    'lightning bolt',
    'robot face',
  }
  rows = table.to_pylist()
  check_labels(rows)
  assert {row['model_0'] for row in rows} == {'noto', 'twemoji'}
  row = rows[0]
  side = [row['model_0'], row['model_1']].index('twemoji')
  pixels = np.asarray(Image.open(io.BytesIO(row[f'jpg_{side}'])))
  # Transparent became white, and the square covers 24 of 64 pixels.
  assert pixels[0, 0].tolist() == [255, 255, 255]
  assert pixels[10, 10].tolist() == [255, 0, 0]
  assert pixels[20, 20].tolist() == [255, 255, 255]


def test_rebuild_explains_what_is_missing(tmp_path):
  make_package(tmp_path / 'google', 'google', 40)
  done = build(tmp_path, tmp_path / 'out.parquet', 5)
  assert done.returncode == 2
  assert 'no emoji.json there' in done.stderr
  make_package(tmp_path / 'twitter', 'twitter', 24)
  done = build(tmp_path, tmp_path / 'out.parquet', 6)
  assert done.returncode == 2
  assert 'only 5 usable emoji found' in done.stderr
  assert 'Traceback' not in done.stderr


def test_faces_are_limited():
  select = runpy.run_path(str(EMOJI / 'build_pairs.py'))['select']
  random = np.random.default_rng(0)
  candidates = [
    {
      'group': 'faces' if i < 60 else 'things',
      'pictures': {
        style: random.integers(0, 256, (2, 2, 3), np.uint8)
        for style in ('noto', 'twemoji')
      },
    }
    for i in range(100)
  ]
  chosen = select(candidates, 76)
  assert sum(c['group'] == 'faces' for c in chosen) == 36
  with pytest.raises(ValueError, match='only 76 usable emoji'):
    select(candidates, 77)


def test_farthest_first():
  select = runpy.run_path(str(EMOJI / 'build_pairs.py'))['select']
  # In one style 1 looks like 0, in the other 3 looks like 2.
  values = [(0, 0), (2, 90), (200, 200), (100, 199)]
  candidates = [
    {
      'caption': caption,
      'group': 'things',
      'pictures': {
        style: np.full((1, 1, 3), value, np.uint8)
        for style, value in zip(('noto', 'twemoji'), pair, strict=True)
      },
    }
    for caption, pair in zip('abcd', values, strict=True)
  ]
  for count, want in [(2, ['a', 'c']), (3, ['a', 'b', 'c'])]:
    assert [c['caption'] for c in select(candidates, count)] == want


def test_tokenizer_is_clips_kind():
  tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
  size = len(tokenizer)
  assert size == len(json.loads((TOKENIZER / 'vocab.json').read_text()))
  assert tokenizer.bos_token_id == size - 2
  assert tokenizer.eos_token_id == tokenizer.pad_token_id == size - 1
  assert tokenizer.model_max_length == 16


def test_tokenizer_fits_the_captions(rows):
  tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
  captions = [row['caption'] for row in rows]
  ids = tokenizer(captions)['input_ids']
  assert max(map(len, ids)) <= 16
  assert len({tuple(row) for row in ids}) == len(captions)
  for caption, row in zip(captions, ids, strict=True):
    letters = tokenizer.decode(row, skip_special_tokens=True)
    assert letters.replace(' ', '') == caption.replace(' ', '')


def test_tokenizer_holds_every_byte():
  tokenizer = transformers.CLIPTokenizer.from_pretrained(
    TOKENIZER, split_special_tokens=True
  )
  text = ''.join(map(chr, [*range(0x3000), 0x1F600, 0xFFFD]))
  ids = tokenizer(text, verbose=False)['input_ids']
  # The end of text stands for what is not in the vocabulary.
  assert ids.count(tokenizer.eos_token_id) == 1


def test_tokenizer_rebuild(tmp_path):
  schema = pa.schema([('caption', pa.string())])
  words = ['red apple', 'green apple', 'red car'] * 3
  table = pa.table({'caption': [*words, 'one apple', 'car']}, schema=schema)
  parquet.write_table(table, tmp_path / 'pairs.parquet')
  main = runpy.run_path(str(EMOJI / 'build_tokenizer.py'))['main']
  for name in ('a', 'b'):
    main(
      [
        f'--pairs={tmp_path / "pairs.parquet"}',
        f'--out={tmp_path / name}',
        '--entries=520',
      ]
    )
  for file in (tmp_path / 'a').iterdir():
    assert file.read_bytes() == (tmp_path / 'b' / file.name).read_bytes()
  tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / 'a')
  assert len(tokenizer) <= 520
  ids = tokenizer('Apple')['input_ids']
  assert ids[0] == len(tokenizer) - 2
  assert tokenizer.decode(ids[1:-1]) == 'apple'


def test_shipped_tokenizer_comes_from_the_shipped_pairs(tmp_path):
  main = runpy.run_path(str(EMOJI / 'build_tokenizer.py'))['main']
  main([f'--pairs={EMOJI / "pairs.parquet"}', f'--out={tmp_path}'])
  for file in tmp_path.iterdir():
    shipped = TOKENIZER / file.name
    assert file.read_text() == shipped.read_text()
