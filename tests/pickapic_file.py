"""A faithful small Pick-a-Pic file: every column, every kind of trouble."""

import io
import math

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

# The columns of versions 1 and 2, in their order.
SCHEMA = pa.schema(
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
# What prepare is to count of `rows()`.
COUNTS = {
  'rows': 32,
  'examples': 32,
  'kept': 20,
  'ties': 1,
  'unlabelled': 3,
  'without_caption': 1,
  'identical': 1,
  'unreadable': 6,
  'duplicates': 2,
  # Two of each row but ties, unlabelled, without caption, and identical.
  'images': 52,
  'images_unreadable': 7,
  'captions_repaired': 1,
  # Rows 22, 23, 26, 28 have 71, 100002, 41 and 19 tokens, as transformers
  # counts with the tokenizer of the example, whose limit is 16.
  'over_token_limit': 4,
}
REASONS = {
  'no bytes': 2,
  'not a picture': 1,
  'too many pixels': 2,
  'too narrow': 1,
  'truncated': 1,
}
# Rows that are kept, with the (height, width) of both images as displayed.
SIZES = {
  0: [(512, 512), (512, 512)],
  1: [(768, 512), (512, 768)],
  6: [(24, 32), (32, 32)],
  7: [(40, 20), (32, 32)],
  16: [(32, 32), (9, 7)],
  19: [(32, 32), (1, 1)],
  27: [(301, 513), (32, 32)],
}


def encode(image, kind='JPEG', **options):
  """Returns the bytes of a picture."""
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def picture(seed, height=32, width=32, mode='RGB'):
  """Returns a picture of smooth noise."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
  image = Image.fromarray(small).resize((width, height), Image.BICUBIC)
  return image.convert(mode)


def make_row(i, label=1.0, **changes):
  """Returns row i with two pictures of its own."""
  row = {
    'are_different': True,
    'best_image_uid': {1.0: f'a{i}', 0.0: f'b{i}'}.get(label, 'tie'),
    'caption': f'a picture of thing {i}',
    'created_at': 1_680_000_000_000_000_000 + i,
    'has_label': True,
    'image_0_uid': f'a{i}',
    'image_0_url': f'https://example.org/a{i}.jpeg',
    'image_1_uid': f'b{i}',
    'image_1_url': f'https://example.org/b{i}.jpeg',
    'jpg_0': encode(picture(2 * i), quality=90),
    'jpg_1': encode(picture(2 * i + 1), quality=90),
    'label_0': label,
    'label_1': None if label is None else 1 - label,
    'model_0': 'dreamlike',
    'model_1': 'sdxl' if i % 2 else 'sd21',
    'ranking_id': i,
    'user_id': i % 5,
    'num_example_per_prompt': 3,
    '__index_level_0__': 1000 + i,
  }
  assert list(row) == SCHEMA.names
  return row | changes


def bomb():
  """Returns a PNG that says 15000 x 15000 pixels in a few bytes."""
  image = Image.new('1', (15000, 15000))
  return encode(image, 'PNG')


def rows():
  """Returns the rows, of which COUNTS tells what they are."""
  large = [encode(picture(90, 512, 512)), encode(picture(91, 512, 512))]
  exif = Image.Exif()
  exif[0x0112] = 6
  grey16 = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60
  same = encode(picture(80))
  frames = [picture(70), picture(71)]
  first = make_row(0, 1.0, jpg_0=large[0], jpg_1=large[1])
  animated = encode(
    frames[0], 'GIF', save_all=True, append_images=frames[1:], duration=9
  )
  return [
    first,
    make_row(
      1,
      0.0,
      jpg_0=encode(picture(92, 768, 512)),
      jpg_1=encode(picture(93, 512, 768)),
    ),
    make_row(2, 0.5),
    make_row(3, math.nan),
    make_row(4, 1.0, has_label=False),
    make_row(5, None, has_label=False),
    make_row(6, jpg_0=encode(picture(12, 24, 32, 'CMYK'))),
    make_row(7, jpg_0=encode(picture(14, 20, 40), exif=exif)),
    make_row(8, jpg_0=encode(picture(16, 64, 64))[:-300]),
    make_row(9, jpg_1=b'this is text, whatever its name says'),
    make_row(10, jpg_0=b'', jpg_1=None),
    # Of two bombs one is enough to lose the pair.
    make_row(11, jpg_0=bomb()),
    make_row(12, jpg_1=encode(Image.new('1', (4097, 4097)), 'PNG')),
    make_row(13, jpg_0=same, jpg_1=same),
    # Rated again, another way round and with another outcome.
    first | {'ranking_id': 14, 'label_0': 0.0, 'label_1': 1.0},
    first
    | {
      f'{name}_{j}': first[f'{name}_{1 - j}']
      for name in ('jpg', 'model')
      for j in (0, 1)
    }
    | {'image_0_uid': 'b0', 'image_1_uid': 'a0'},
    make_row(16, jpg_1=encode(picture(32, 9, 7, 'P'), 'PNG')),
    make_row(17, jpg_1=encode(Image.fromarray(grey16), 'PNG')),
    make_row(18, jpg_1=encode(picture(36, mode='RGBA'), 'PNG')),
    make_row(19, jpg_1=encode(Image.new('RGB', (1, 1)))),
    # One that decodes, and could not be scaled to be trained on.
    make_row(20, jpg_1=encode(Image.new('RGB', (4000, 1)), 'PNG')),
    make_row(21, jpg_1=animated),
    make_row(22, caption='<|endoftext|> <|startoftext|> a cat ' * 3),
    make_row(23, caption='x' * 100_000),
    make_row(24, caption='nul \0 and \u202e bidi'),
    make_row(25, caption=None),
    make_row(26, caption='<script>alert(1)</script> {{7*7}} ../../x \x1b[31m'),
    make_row(27, jpg_0=encode(picture(54, 301, 513))),
    make_row(28, caption=b'lone \xed\xa0\x80 surrogate'),
    make_row(29, 0.0, image_0_uid=None, image_1_uid=''),
    make_row(30, 0.0, model_0=None),
    make_row(31, caption=''),
  ]


def write(path, given, *, row_group_size=5, schema=SCHEMA):
  """Writes rows as parquet; captions may be bytes that are no UTF-8."""
  columns = []
  for field in schema:
    values = [row[field.name] for row in given]
    if field.name == 'caption':
      values = [v.encode() if isinstance(v, str) else v for v in values]
      columns.append(pa.array(values, pa.binary()).view(pa.string()))
    else:
      columns.append(pa.array(values, field.type, from_pandas=False))
  table = pa.Table.from_arrays(columns, schema=schema)
  parquet.write_table(table, path, row_group_size=row_group_size)
  return path
