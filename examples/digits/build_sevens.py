"""Makes a parquet file of the 8x8 sevens of scikit-learn's digits.

Most of them are crossed: the data of docs/digits_rounds.md. The digits are a
file of the wheel scikit-learn 1.9.1, fetched and unpacked with

  pip download scikit-learn==1.9.1 --no-deps
  unzip scikit_learn-1.9.1-*.whl 'sklearn/datasets/data/digits.csv.gz'
  python examples/digits/build_sevens.py \
    --digits=sklearn/datasets/data/digits.csv.gz \
    --out=data/digits/sevens.parquet \
    --hand=examples/digits/crossed7.json --labels=data/digits/labels

A row holds one picture, on both sides and without a label, in the columns of
Pick-a-Pic that dpo_jax reads. Its caption ('seven 0042') only tells it apart.
--labels writes the hand labels as the likes page does: LABELS/all, and of each
of --folds parts LABELS/fold_0/train (all but it) and LABELS/fold_0/held.
Licences are in NOTICE.
"""

import argparse
import gzip
import io
import json
import pathlib

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

SIDE, LEVELS, DIGIT = 8, 16, 7


def read_sevens(path: str) -> np.ndarray:
  """Returns uint8 [n, 8, 8], white on black; ValueError for another file."""
  try:
    with gzip.open(path, 'rt') as file:
      values = np.loadtxt(file, delimiter=',', ndmin=2)
    pictures = values[values[:, -1] == DIGIT, :-1].reshape(-1, SIDE, SIDE)
  except (OSError, ValueError, EOFError) as error:
    raise ValueError(
      f"--digits={path}: not the file digits.csv.gz of scikit-learn's wheel"
    ) from error
  if not pictures.size or not 0 <= pictures.min() <= pictures.max() <= LEVELS:
    raise ValueError(f'{path}: must hold sevens, in numbers from 0 to {LEVELS}')
  return np.round(255 / LEVELS * pictures).astype(np.uint8)


def read_hand(path: str, count: int) -> np.ndarray:
  """Labels [count]: 1 not crossed, 0 crossed, -1 doubtful.

  Raises ValueError for a file that is not of as many sevens.
  """
  try:
    hand = json.loads(pathlib.Path(path).read_text())
    labels = np.ones(count, np.int64)
    labels[hand['crossed']] = 0
    labels[hand['ambiguous']] = -1
    if hand['n_sevens'] != count:
      raise ValueError(f'{hand["n_sevens"]} sevens')
  except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
    raise ValueError(
      f'--hand={path}: no labels of these {count} sevens ({error})'
    ) from error
  return labels


def to_png(picture: np.ndarray) -> bytes:
  """Returns the PNG bytes of a uint8 [h, w] picture."""
  buffer = io.BytesIO()
  Image.fromarray(picture).save(buffer, 'PNG', optimize=True)
  return buffer.getvalue()


def make_table(pictures: np.ndarray) -> pa.Table:
  """Returns one row a picture."""
  names = [f'seven {i:04}' for i in range(len(pictures))]
  columns = {
    'caption': names,
    'has_label': [False] * len(names),
    'label_0': [0.5] * len(names),
  }
  for side in (0, 1):
    columns |= {
      f'image_{side}_uid': [f'digits: {name}' for name in names],
      f'jpg_{side}': [to_png(picture) for picture in pictures],
      f'model_{side}': ['digits'] * len(names),
    }
  return pa.table(columns)


def write_likes(
  folder: pathlib.Path,
  pictures: np.ndarray,
  labels: np.ndarray,
  rows: np.ndarray,
) -> None:
  """Writes these rows as tools.judge --export does; doubtful ones are none."""
  (folder / 'pictures').mkdir(parents=True, exist_ok=True)
  lines = []
  for row in rows[labels[rows] >= 0].tolist():
    name = f'pictures/{row:06d}_0.png'
    (folder / name).write_bytes(to_png(pictures[row]))
    line = {'caption': f'seven {row:04}', 'image': name}
    lines.append(json.dumps(line | {'liked': bool(labels[row])}) + '\n')
  (folder / 'likes.jsonl').write_text(''.join(lines))


def split(labels: np.ndarray, folds: int) -> np.ndarray:
  """The part [n] of each row: each has its share of each label."""
  parts, rng = np.zeros(len(labels), np.int64), np.random.default_rng(0)
  for value in (1, 0, -1):
    rows = rng.permutation(np.flatnonzero(labels == value))
    parts[rows] = np.arange(len(rows)) % folds
  return parts


def main(argv: list[str] | None = None) -> None:
  """Builds what the flags describe."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--digits', required=True, help='digits.csv.gz')
  parser.add_argument('--out', required=True, help='parquet file to write')
  parser.add_argument('--hand', help='JSON of hand labels')
  parser.add_argument('--labels', help='folder to write the hand labels to')
  parser.add_argument('--folds', type=int, default=5)
  flags = parser.parse_args(argv)
  if bool(flags.hand) != bool(flags.labels):
    parser.error('--hand and --labels: give both or none')
  if flags.folds < 2:
    parser.error(f'--folds={flags.folds}: must be at least 2')
  try:
    pictures = read_sevens(flags.digits)
    labels = flags.hand and read_hand(flags.hand, len(pictures))
  except ValueError as error:
    parser.error(str(error))
  out = pathlib.Path(flags.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(make_table(pictures), out)
  print(f'{out}: {len(pictures)} pictures, {out.stat().st_size} bytes')
  if not flags.labels:
    return
  root, parts = pathlib.Path(flags.labels), split(labels, flags.folds)
  write_likes(root / 'all', pictures, labels, np.arange(len(labels)))
  for fold in range(flags.folds):
    for name, chosen in (('train', parts != fold), ('held', parts == fold)):
      place = root / f'fold_{fold}' / name
      write_likes(place, pictures, labels, np.flatnonzero(chosen))
  counts = [int((labels == value).sum()) for value in (0, 1, -1)]
  print(
    f'{root}: {counts[0]} crossed, {counts[1]} not, {counts[2]} doubtful left '
    f'out; {flags.folds} folds'
  )


if __name__ == '__main__':
  main()
