"""Labels of single pictures, benign or malign, and which network learns which.

Yoon et al., 2023, arXiv 2307.02770, section 3.2: K networks, each of which
learns from all of the N malign pictures and from N benign ones of its own.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Self

import numpy as np
from jaxtyping import Bool

from dpo_jax.data.formats import jsonl
from dpo_jax.data.formats import rows as rows_lib

# What tools.judge --export writes.
FILE = 'likes.jsonl'
# One network; one on the labels of all; all.
VARIANTS = ('single', 'union', 'ensemble')


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
  """Labelled pictures, in memory as they are encoded.

  Attributes:
    captions: '' where there is none.
    images: encoded bytes.
    names: a hash of each picture's bytes.
    liked: 1 benign, 0 malign, float32 [n].
  """

  captions: list[str]
  images: list[bytes]
  names: list[str]
  liked: np.ndarray

  def __len__(self) -> int:
    return len(self.images)

  def select(self, rows: Sequence[int]) -> Self:
    """The labels of these rows, in this order."""
    rows = np.asarray(rows, np.int64)
    return type(self)(
      *([column[i] for i in rows] for column in self._columns()),
      liked=self.liked[rows],
    )

  def _columns(self):
    return self.captions, self.images, self.names

  def count(self) -> dict[str, int]:
    """How many there are of each."""
    benign = int(self.liked.sum())
    return {'benign': benign, 'malign': len(self) - benign}

  def digest(self) -> str:
    """SHA-256 of the pictures and their labels."""
    text = ''.join(
      f'{name} {liked:.0f}\n'
      for name, liked in zip(self.names, self.liked, strict=True)
    )
    return hashlib.sha256(text.encode()).hexdigest()


def read(paths: Sequence[str]) -> tuple[Labels, dict[str, int]]:
  """(labels in order of their hashes, what became of the rows).

  paths: folders that tools.judge --export wrote, or .jsonl files with lines
  {"caption", "image", "liked"}. Equal pictures count once, and what is not
  labelled is left out.

  Raises ValueError naming the file, and the row or the picture, for what is
  no such file, a picture that is not there, and two labels of one picture.
  """
  found, counts = {}, {'rows': 0, 'unlabelled_dropped': 0, 'equal_dropped': 0}
  for name in paths:
    path = pathlib.Path(name)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
      raise ValueError(
        f'{file}: no such file; labels are the folder that python -m '
        f'dpo_jax.tools.judge --export writes, or its {FILE}'
      )
    source = jsonl.open_source([str(file)], file.parent)
    rows = source.files[0].rows
    if rows and source.kind != 'likes':
      raise ValueError(
        f'{file}: holds pairs; a reward learns from likes: {{"caption", '
        '"image", "liked"}'
      )
    for row in source.read(0, rows):
      counts['rows'] += 1
      if row.liked is None:
        counts['unlabelled_dropped'] += 1
        continue
      data = _read_picture(file, row)
      key = rows_lib.hash_image(data)
      if key in found:
        counts['equal_dropped'] += 1
        if found[key][2] != row.liked:
          raise ValueError(
            f'{file}, {row.source}: the picture of {found[key][3]} has the '
            'other label; leave one of them out'
          )
        continue
      found[key] = (row.caption or '', data, row.liked, f'{name} {row.source}')
  if not found:
    raise ValueError(f'{", ".join(paths)}: no labels')
  names = sorted(found)
  labels = Labels(
    captions=[found[name][0] for name in names],
    images=[found[name][1] for name in names],
    names=names,
    liked=np.array([found[name][2] for name in names], np.float32),
  )
  return labels, counts


def _read_picture(file, row) -> bytes:
  (image,) = row.images
  if image is None:
    raise ValueError(f'{file}, {row.source}: image is empty')
  try:
    return image if isinstance(image, bytes) else image.read_bytes()
  except OSError as error:
    raise ValueError(
      f'{file}, {row.source}: cannot read {image}: {error.strerror}'
    ) from error


def split(labels: Labels, holdout: float) -> tuple[Labels, Labels]:
  """(to train on, held out): of each class this share, by the hash.

  One of each class at least is on either side. With `holdout` 0 both are all.
  Raises ValueError where a class has too few.
  """
  if not holdout:
    return labels, labels
  held = np.zeros(len(labels), bool)
  for liked, word in ((1, 'benign'), (0, 'malign')):
    rows = np.flatnonzero(labels.liked == liked)
    if len(rows) < 2:
      raise ValueError(
        f'data.holdout={holdout}: there are {len(rows)} {word} labels; label '
        'more, or set it to 0'
      )
    count = min(len(rows) - 1, max(1, round(holdout * len(rows))))
    held[rows[:count]] = True
  return (
    labels.select(np.flatnonzero(~held)),
    labels.select(np.flatnonzero(held)),
  )


def leave_out(labels: Labels, held: Labels) -> tuple[Labels, int]:
  """(the labels of pictures that are not among `held`, how many were)."""
  taken = set(held.names)
  kept = [i for i, name in enumerate(labels.names) if name not in taken]
  return labels.select(kept), len(labels) - len(kept)


def draw(
  liked: np.ndarray, *, networks: int, per_class: int, seed: int
) -> Bool[np.ndarray, 'n k']:
  """Which of the labels [n] are each network's: N malign and N benign.

  The malign ones are the same for all. The benign ones are dealt from one
  shuffled row, round and round: no two networks have one in common where
  there are K * N of them, and else each is dealt as often as the others.
  Where there are more malign labels than benign ones it is the other way
  round (not in the paper): the malign are dealt and the benign the same.
  per_class: N; 0 is the largest there can be. Network k's do not hang on how
  many there are after it.

  Raises ValueError where there are fewer than N of a class.
  """
  sides = {
    'malign': np.flatnonzero(liked < 0.5),
    'benign': np.flatnonzero(liked > 0.5),
  }
  count = per_class or min(map(len, sides.values()))
  for word, rows in sides.items():
    if len(rows) < max(1, count):
      raise ValueError(
        f'reward.per_class={per_class}: there are {len(rows)} {word} labels to '
        f'train on; label more, or ask for {len(rows) or 1} at most'
      )
  rng = np.random.default_rng([seed, 0x1ABE15])
  same, dealt = (rng.permutation(sides[w]) for w in ('malign', 'benign'))
  if len(same) > len(dealt):
    same, dealt = dealt, same
  members = np.zeros((len(liked), networks), bool)
  members[same[:count]] = True
  for k in range(networks):
    own = (k * count + np.arange(count)) % len(dealt)
    members[dealt[own], k] = True
  return members


def choose(
  liked: np.ndarray, variant: str, *, networks: int, per_class: int, seed: int
) -> Bool[np.ndarray, 'n k']:
  """`draw` as a variant uses it: of `union` one network learns all of them."""
  if variant not in VARIANTS:
    raise ValueError(
      f'reward.variant={variant!r}: must be one of {", ".join(VARIANTS)}'
    )
  count = 1 if variant == 'single' else networks
  members = draw(liked, networks=count, per_class=per_class, seed=seed)
  return members.any(1, keepdims=True) if variant == 'union' else members
