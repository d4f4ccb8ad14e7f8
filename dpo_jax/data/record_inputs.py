"""What a batch takes from a record: pictures or latents, sizes and labels.

A pair gives two pictures, the winner first; a like gives one. `sides` are the
pictures of the record in the order that the batch has them in.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from dpo_jax.data import cached, loader, record_fields, scan
from dpo_jax.data import images as images_lib

Inputs = dict[str, np.ndarray | np.generic]


def read_label(
  record: record_fields.Record, kind: str, *, flipped: bool, winner: str = ''
) -> tuple[list[int], dict[str, np.float32]]:
  """The sides, and `label_confidence` of a pair or `liked` of a like.

  `flipped` turns the label round: a pair's sides are swapped, and it is held
  for as certain as before; liked becomes 1 - liked. winner: the scores of a
  pair that decide, certainly, in the place of its label. Raises ValueError for
  a label outside [0, 1].
  """
  name = scan.LABELS[kind]
  label = float(record[name])
  if winner:
    label = float(record[winner][0] > record[winner][1])
  if not 0 <= label <= 1:
    raise ValueError(f'its {name} is {label}')
  if kind == 'likes':
    return [0], {'liked': np.float32(1 - label if flipped else label)}
  sides = [0, 1] if (label >= 0.5) != flipped else [1, 0]
  return sides, {'label_confidence': np.float32(max(label, 1 - label))}


def read_scores(
  record: record_fields.Record,
  kind: str,
  names: Sequence[str],
  sides: Sequence[int],
) -> Inputs:
  """The scores of a pair in the order of its sides, or of a like."""
  if kind == 'likes':
    return {name: record[name] for name in names}
  return {name: record[name][sides] for name in names}


def read_pictures(
  record: record_fields.Record,
  kind: str,
  sides: Sequence[int],
  *,
  size: int,
  augmentation: images_lib.Augmentation,
  out: UInt8[np.ndarray, 'p size size 3'],
) -> Inputs:
  """`sizes` int32 [p, 4]; the pictures are decoded into `out`."""
  names = scan.SIDES[kind]
  decoded = [images_lib.decode(record[names[side]]) for side in sides]
  sizes = loader.augment(
    [images_lib.resize_shorter(picture, size) for picture in decoded],
    _originals(record, kind, sides),
    size,
    augmentation,
    out,
  )
  return {'sizes': sizes}


def read_cached(
  record: record_fields.Record,
  kind: str,
  sides: Sequence[int],
  *,
  size: int,
  augmentation: images_lib.Augmentation,
  captions: cached.Captions,
) -> Inputs:
  """`moments` float16 [p, h, w, 2c], `sizes` int32 [p, 4], text states."""
  states = captions.find(int(record['caption_id']), record['caption'])
  sizes = [
    images_lib.size_conditioning(
      original, images_lib.resized_shape(*original, size), size, augmentation
    )
    for original in _originals(record, kind, sides)
  ]
  moments = record['moments']
  if kind == 'likes':
    moments = moments[None]
  # A view: the copy into the batch is the only one.
  moments = moments[:, int(augmentation.flip)]
  return {
    'moments': moments if sides[0] == 0 else moments[::-1],
    'sizes': np.array(sizes, np.int32),
    **states,
  }


def _originals(record, kind, sides) -> list[tuple[int, int]]:
  """(height, width) of the pictures as they came."""
  sizes = record['size' if kind == 'likes' else 'sizes'].reshape(-1, 4)
  if sizes[:, :2].min() < 1:
    raise ValueError(f'its sizes are {sizes.tolist()}')
  return [tuple(sizes[side, :2].tolist()) for side in sides]
