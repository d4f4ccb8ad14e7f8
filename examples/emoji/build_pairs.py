"""Makes pairs.parquet: the same emoji drawn in two styles, as preferences.

The pictures come from two npm packages, fetched and unpacked with

  npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
  for f in emoji-datasource-*.tgz; do
    mkdir "${f%.tgz}" && tar -xzf "$f" -C "${f%.tgz}"
  done
  python examples/emoji/build_pairs.py --google=emoji-datasource-google-16.0.0 \
    --twitter=emoji-datasource-twitter-16.0.0 --out=examples/emoji/pairs.parquet

Every row compares Noto Emoji with Twemoji for one caption, in Pick-a-Pic's
columns. Twemoji is the preferred style; some rows are ties. Nothing is drawn
from a random generator: sides and ties come from a hash of seed and caption,
so the same packages and the same library versions give the same bytes.
"""

import argparse
import collections
import datetime
import hashlib
import io
import json
import pathlib
import re
import unicodedata
import uuid

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

STYLES = {'noto': 'google', 'twemoji': 'twitter'}
PREFERRED = 'twemoji'
TIE_SHARE = 0.08
SIZE = 32

# Small pictures of faces, hands and people differ in a few pixels only, so
# they are limited; the other groups are not.
GROUP_LIMITS = {'faces': 36, 'hands': 20, 'people': 28}
SKIPPED_CATEGORIES = ('Flags', 'Component', 'Symbols')
SKIPPED_SUBCATEGORIES = ('family', 'person-gesture', 'person-symbol')
SKIPPED_NAMES = re.compile(
  r'^(clock face|man |woman |men |women |man:|woman:|person:|mobile phone with)'
  r'|facing right|silhouette|middle finger|cancellation|wheelchair|feeding'
)
# Unicode names that nobody would type, and what the picture shows.
RENAMED = {
  'articulated lorry': 'truck',
  'aubergine': 'eggplant',
  'automobile': 'car',
  'black nib': 'pen nib',
  'black scissors': 'scissors',
  'black sun with rays': 'sun',
  'black telephone': 'telephone',
  'clinking beer mugs': 'two beer mugs',
  'dash symbol': 'puff of wind',
  'direct hit': 'dart in a target',
  'dizzy symbol': 'dizzy star',
  'ear of maize': 'corn',
  'electric light bulb': 'light bulb',
  'electric torch': 'flashlight',
  'extraterrestrial alien': 'alien',
  'face savouring delicious food': 'face licking its lips',
  'face throwing a kiss': 'face blowing a kiss',
  'face with look of triumph': 'huffing face',
  'face with party horn and party hat': 'party face',
  'father christmas': 'santa claus',
  'flag in hole': 'golf flag',
  'grinning face with one large and one small eye': 'crazy face',
  'heavy black heart': 'red heart',
  'high voltage sign': 'lightning bolt',
  'hocho': 'kitchen knife',
  'imp': 'angry devil face',
  'mahjong tile red dragon': 'mahjong tile',
  'mans shoe': 'dress shoe',
  'mother christmas': 'mrs claus',
  'moyai': 'stone statue head',
  'octagonal sign': 'stop sign',
  'person raising both hands in celebration': 'raised hands',
  'pistol': 'water gun',
  'playing card black joker': 'joker playing card',
  'police cars revolving light': 'police light',
  'public address loudspeaker': 'loudspeaker',
  'rescue worker\u2019s helmet': 'rescue helmet',
  'serious face with symbols covering mouth': 'swearing face',
  'shallow pan of food': 'pan of food',
  'shocked face with exploding head': 'exploding head',
  'smoking symbol': 'cigarette',
  'splashing sweat symbol': 'sweat drops',
  'white medium star': 'yellow star',
  'white smiling face': 'relaxed smiling face',
  'womans boots': 'high boots',
  'womans clothes': 'blouse',
  'womans hat': 'sun hat',
  'womans sandal': 'heeled sandal',
}

COLUMNS = pa.schema(
  [
    ('are_different', pa.bool_()),
    ('best_image_uid', pa.string()),
    ('caption', pa.string()),
    ('created_at', pa.timestamp('ns')),
    ('has_label', pa.bool_()),
    ('image_0_uid', pa.string()),
    ('image_0_url', pa.string()),
    ('image_1_uid', pa.string()),
    ('image_1_url', pa.string()),
    ('jpg_0', pa.binary()),
    ('jpg_1', pa.binary()),
    ('label_0', pa.float64()),
    ('label_1', pa.float64()),
    ('model_0', pa.string()),
    ('model_1', pa.string()),
    ('ranking_id', pa.int64()),
    ('user_id', pa.int64()),
    ('num_example_per_prompt', pa.int64()),
    ('__index_level_0__', pa.int64()),
  ]
)


def to_caption(entry: dict) -> str:
  """Returns a plain lower-case ASCII caption of an emoji.json entry."""
  name = entry['name'] or entry['short_name'].replace('_', ' ')
  name = RENAMED.get(name.lower(), name.lower())
  name = re.sub(r'^white (?=.*pointing)|^black (?=\w+ suit$)', '', name)
  name = re.sub(r' (symbol|sign)$', '', name)
  ascii_name = unicodedata.normalize('NFKD', name).encode('ascii', 'ignore')
  return ' '.join(ascii_name.decode().split())


def to_group(entry: dict) -> str:
  """Returns the limited group that the picture belongs to, or 'things'."""
  subcategory = entry['subcategory']
  if subcategory.startswith(('face-', 'cat-face')):
    return 'faces'
  if subcategory.startswith('hand'):
    return 'hands'
  return 'people' if subcategory.startswith('person') else 'things'


def load_picture(path: pathlib.Path) -> np.ndarray:
  """Returns uint8 [32, 32, 3]: the picture on white, Lanczos-resized."""
  with Image.open(path) as image:
    rgba = image.convert('RGBA')
  white = Image.new('RGBA', rgba.size, (255, 255, 255, 255))
  flat = Image.alpha_composite(white, rgba).convert('RGB')
  return np.asarray(flat.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def read_candidates(folders: dict[str, pathlib.Path]) -> list[dict]:
  """Returns usable entries with caption, group and a picture per style."""
  entries = json.loads((folders['noto'] / 'emoji.json').read_text('utf-8'))
  candidates, captions = [], set()
  seen = {style: set() for style in STYLES}
  for entry in sorted(entries, key=lambda e: e['sort_order']):
    name = (entry['name'] or entry['short_name']).lower()
    caption = to_caption(entry)
    skipped = (
      entry['category'] in SKIPPED_CATEGORIES
      or entry['subcategory'] in SKIPPED_SUBCATEGORIES
      or SKIPPED_NAMES.search(name)
      or caption in captions
      or not all(entry[f'has_img_{vendor}'] for vendor in STYLES.values())
    )
    if skipped:
      continue
    pictures = {
      style: load_picture(
        folders[style] / 'img' / vendor / '64' / entry['image']
      )
      for style, vendor in STYLES.items()
    }
    # The same picture under two names cannot be told apart by its caption.
    keys = {style: picture.tobytes() for style, picture in pictures.items()}
    if any(keys[style] in seen[style] for style in STYLES):
      continue
    for style in STYLES:
      seen[style].add(keys[style])
    captions.add(caption)
    candidates.append(
      {'caption': caption, 'group': to_group(entry), 'pictures': pictures}
    )
  return candidates


def select(candidates: list[dict], count: int) -> list[dict]:
  """Returns `count` candidates whose pictures are far apart in both styles.

  Farthest-first: the next one kept has the largest distance to those kept,
  where a distance is the smaller of the two styles' squared pixel distances
  (integers, so that every machine chooses the same). Keeps the input order.
  Raises ValueError when there are too few candidates.
  """
  stacks = [
    np.stack([c['pictures'][style].ravel() for c in candidates]).astype(
      np.int32
    )
    for style in STYLES
  ]
  room = collections.Counter(GROUP_LIMITS)
  nearest = np.full(len(candidates), np.iinfo(np.int64).max)
  chosen = []
  while len(chosen) < count:
    best = int(np.argmax(nearest))
    if nearest[best] < 0:
      raise ValueError(
        f'--captions={count}: only {len(chosen)} usable emoji found; ask for '
        'fewer captions'
      )
    group = candidates[best]['group']
    if group not in GROUP_LIMITS or room[group] > 0:
      room[group] -= 1
      chosen.append(best)
      for stack in stacks:
        distance = np.square(stack - stack[best]).sum(1, dtype=np.int64)
        nearest = np.minimum(nearest, distance)
    nearest[[best, *chosen]] = -1
  return [candidates[i] for i in sorted(chosen)]


def hash_caption(seed: int, purpose: str, caption: str) -> int:
  """Returns a 64-bit number from seed, purpose and caption."""
  text = f'{seed}/{purpose}/{caption}'.encode()
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'big')


def to_png(picture: np.ndarray) -> bytes:
  """Returns the PNG bytes of a uint8 [h, w, 3] picture."""
  buffer = io.BytesIO()
  Image.fromarray(picture).save(buffer, 'PNG', optimize=True)
  return buffer.getvalue()


def make_table(chosen: list[dict], seed: int) -> pa.Table:
  """Returns one row per caption in Pick-a-Pic's columns."""
  order = sorted(chosen, key=lambda c: hash_caption(seed, 'tie', c['caption']))
  ties = {c['caption'] for c in order[: round(TIE_SHARE * len(order))]}
  rows = []
  for i, candidate in enumerate(chosen):
    caption = candidate['caption']
    sides = list(STYLES)
    if hash_caption(seed, 'side', caption) % 2:
      sides.reverse()
    uids = [
      str(uuid.uuid5(uuid.NAMESPACE_URL, f'emoji:{style}/{caption}'))
      for style in sides
    ]
    tie = caption in ties
    winner = sides.index(PREFERRED)
    rows.append(
      {
        'are_different': True,
        'best_image_uid': '' if tie else uids[winner],
        'caption': caption,
        'created_at': datetime.datetime(2024, 1, 1),
        'has_label': True,
        'image_0_uid': uids[0],
        'image_0_url': '',
        'image_1_uid': uids[1],
        'image_1_url': '',
        'jpg_0': to_png(candidate['pictures'][sides[0]]),
        'jpg_1': to_png(candidate['pictures'][sides[1]]),
        'label_0': 0.5 if tie else float(winner == 0),
        'label_1': 0.5 if tie else float(winner == 1),
        'model_0': sides[0],
        'model_1': sides[1],
        'ranking_id': i,
        'user_id': 0,
        'num_example_per_prompt': 1,
        '__index_level_0__': i,
      }
    )
  return pa.Table.from_pylist(rows, schema=COLUMNS)


def find_package(folder: str, flag: str) -> pathlib.Path:
  """Returns the folder that holds emoji.json; raises ValueError if none."""
  for path in (pathlib.Path(folder), pathlib.Path(folder) / 'package'):
    if (path / 'emoji.json').is_file():
      return path
  raise ValueError(
    f'--{flag}={folder}: no emoji.json there; unpack the npm package '
    f'emoji-datasource-{flag} and name its folder'
  )


def main(argv: list[str] | None = None) -> None:
  """Builds the parquet file that the flags describe."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--google', required=True, help='unpacked npm package')
  parser.add_argument('--twitter', required=True, help='unpacked npm package')
  parser.add_argument('--out', required=True, help='parquet file to write')
  parser.add_argument('--captions', type=int, default=640)
  parser.add_argument('--seed', type=int, default=0)
  flags = parser.parse_args(argv)
  try:
    folders = {
      'noto': find_package(flags.google, 'google'),
      'twemoji': find_package(flags.twitter, 'twitter'),
    }
    chosen = select(read_candidates(folders), flags.captions)
  except ValueError as error:
    parser.error(str(error))
  table = make_table(chosen, flags.seed)
  # PNG bytes do not compress; several row groups as in the large data sets.
  parquet.write_table(table, flags.out, row_group_size=160, compression='none')
  ties = sum(label == 0.5 for label in table['label_0'].to_pylist())
  size = pathlib.Path(flags.out).stat().st_size
  print(f'{flags.out}: {len(table)} captions, {ties} ties, {size} bytes')


if __name__ == '__main__':
  main()
