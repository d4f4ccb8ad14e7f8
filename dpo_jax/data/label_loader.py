"""Batches of labelled pictures, or of (benign, malign) pairs of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax.data import images as images_lib
from dpo_jax.data import label_copies, labels, loader, threads
from dpo_jax.data.formats import rows as rows_lib


@dataclasses.dataclass(frozen=True, eq=False)
class LabelExamples:
  """What a reward learns from, or is measured on.

  Attributes:
    labels: the pictures.
    members: [n K], 1 where label n is network k's.
    rows: [m 2] (label, copy), or [m 3] (benign label, malign label, copy).
    copies: of each picture.
    seed: the copies follow from it.
  """

  labels: labels.Labels
  members: np.ndarray
  rows: np.ndarray
  copies: label_copies.Copies
  seed: int

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def paired(self) -> bool:
    """Whether an example is a pair."""
    return self.rows.shape[1] == 3


def make_examples(
  chosen: labels.Labels,
  members: np.ndarray,
  *,
  copies: label_copies.Copies,
  paired: bool,
  seed: int,
  most: int = 0,
) -> LabelExamples:
  """Examples of the labels that are of a network, `copies` of each.

  paired: all pairs of a benign and a malign label that a network has both of.
  most: only so many, by a random choice of `seed`; 0 is all.
  """
  members = np.asarray(members, np.float32)
  if paired:
    shared = (members @ members.T) > 0
    benign = chosen.liked > 0.5
    rows = np.argwhere(shared & benign[:, None] & ~benign[None])
  else:
    rows = np.flatnonzero(members.any(1))[:, None]
  if 0 < most < len(rows):
    rng = np.random.default_rng([seed, 0x3057])
    rows = rows[np.sort(rng.permutation(len(rows))[:most])]
  numbers = np.tile(np.arange(copies.count), len(rows))[:, None]
  rows = np.hstack([np.repeat(rows, copies.count, axis=0), numbers])
  return LabelExamples(chosen, members, rows, copies, seed)


def make_label_loader(
  examples: LabelExamples,
  tokenizer: Any,
  *,
  batch_size: int,
  seed: int,
  resolution: int,
  random_crop: bool,
  flip: bool,
  process_index: int = 0,
  process_count: int = 1,
) -> loader.BatchIterator:
  """Endless batches, as loader.make_image_loader; captions are not read.

  A batch holds `images` uint8 [b H W 3], `liked` float32 [b], `members`
  float32 [b K], `id` and `epoch` uint32 [b], `row` int32 [b], the example's
  place; of pairs `images` [b 2 H W 3],
  benign first, and no `liked`. Crops and flips are drawn in each epoch, on top
  of the copies; both of a pair have the same. Raises ValueError as there.
  """
  del tokenizer
  count = len(examples)
  rows_of = loader.local_rows(count, batch_size, process_index, process_count)
  store = loader.PictureStore((examples.labels.images,), resolution)
  workers = threads.Threads()

  def load_one(row: int, epoch: int) -> np.ndarray:
    *places, copy = examples.rows[row].tolist()
    augmentation = images_lib.draw_augmentation(
      seed,
      _id(examples, row),
      epoch,
      random_crop=random_crop,
      flip=flip,
    )
    return np.stack(
      [
        label_copies.change(
          images_lib.crop_flip(
            _load(store, examples.labels, place), resolution, augmentation
          ),
          examples.copies,
          seed=examples.seed,
          name=examples.labels.names[place],
          copy=copy,
        )
        for place in places
      ]
    )

  def load(batch: np.ndarray) -> loader.Batch:
    rows, epochs = batch[rows_of].T
    images = np.stack(workers.starmap(load_one, zip(rows, epochs, strict=True)))
    places = examples.rows[rows, :-1]
    found = {
      'images': images,
      # Of a pair those that have both.
      'members': examples.members[places].min(1),
      'id': np.array([_id(examples, row) for row in rows], np.uint32),
      'epoch': epochs.astype(np.uint32),
      'row': rows.astype(np.int32),
    }
    if examples.paired:
      return found
    liked = examples.labels.liked[places[:, 0]]
    return found | {'images': images[:, 0], 'liked': liked}

  batches = loader.endless_order(count, seed).batch(
    batch_size, drop_remainder=True
  )
  return loader.BatchIterator(
    batches.map(load), examples=count, workers=workers
  )


def _load(store, chosen, place) -> np.ndarray:
  try:
    return store.load(place)[0][0]
  except ValueError as error:
    raise ValueError(
      f'label {place}, caption {chosen.captions[place]!r}: {error}'
    ) from error


def _id(examples: LabelExamples, row: int) -> int:
  """32 bits that stay with the copy of a picture, whatever else is labelled."""
  *places, copy = examples.rows[row].tolist()
  names = [examples.labels.names[place] for place in places]
  return rows_lib.hash_texts(4, 'label', *names, str(copy))


def load_pictures(
  chosen: labels.Labels, rows: Sequence[int], resolution: int
) -> np.ndarray:
  """uint8 [n H W 3], resized and centre-cropped, as evaluation sees them."""
  store = loader.PictureStore((chosen.images,), resolution)
  plain = images_lib.Augmentation()
  return np.stack(
    [
      images_lib.crop_flip(_load(store, chosen, row), resolution, plain)
      for row in rows
    ]
  )
