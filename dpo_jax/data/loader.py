"""Batches in a fixed random order, with one integer as their whole state.

Batch k is a function of (examples, seed, k) alone: the order is Grain's
index shuffle, new in every epoch, and crops and flips hang on (seed, example
id, epoch). So a run continues from the number of batches it has used, on any
number of processes.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import grain
import numpy as np

from dpo_jax.data import images as images_lib
from dpo_jax.data import pairs as pairs_lib
from dpo_jax.data import threads
from dpo_jax.data import tokenizer as tokenizer_lib

Batch = dict[str, np.ndarray]
# Resized pictures uint8 [h, w, 3] of an example, and (height, width) before.
_Pictures = tuple[list[np.ndarray], list[tuple[int, int]]]

# Decoded and resized pictures are kept while they fit, in bytes.
CACHE_BYTES = 256 << 20
# Batches made ahead, and the threads that wait for their examples.
PREFETCH_BATCHES, PREFETCH_THREADS = 2, 2


class BatchIterator(Iterator[Batch]):
  """Endless iterator over batches; its state counts those handed out."""

  def __init__(
    self,
    dataset: grain.MapDataset,
    *,
    examples: int,
    workers: threads.Threads,
  ):
    """`examples`: the number in an epoch; `workers` end with the iterator."""
    self._workers = workers
    options = grain.ReadOptions(
      num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES
    )
    self._batches = iter(dataset.to_iter_dataset(options))
    self._state = 0
    self.examples = examples

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> Batch:
    batch = next(self._batches)
    self._state += 1
    return batch

  def get_state(self) -> int:
    """Returns the number of batches handed out since the very first."""
    return self._state

  def set_state(self, state: int) -> None:
    """Makes the next batch the one after the first `state` batches.

    Raises ValueError for anything but a number of batches.
    """
    if not isinstance(state, int) or isinstance(state, bool) or state < 0:
      raise ValueError(
        f'data state {state!r}: must be a number of batches, 0 or more'
      )
    grain.experimental.set_next_index(self._batches, state)
    self._state = state

  def close(self) -> None:
    """Stops the threads; the iterator cannot be used afterwards."""
    self._batches.close()
    self._workers.close()


def make_pair_loader(
  pairs: pairs_lib.Pairs,
  tokenizer: tokenizer_lib.Encoder,
  *,
  batch_size: int,
  seed: int,
  resolution: int,
  random_crop: bool,
  flip: bool,
  process_index: int = 0,
  process_count: int = 1,
) -> BatchIterator:
  """Returns batches of pairs, the winner first on the pair axis.

  A batch holds `images` uint8 [b, 2, H, W, 3], `sizes` int32 [b, 2, 4]
  (original height and width, crop top and left), `input_ids` int32 [b, ...]
  as the tokenizer gives them, `id` and `epoch` uint32 [b], where
  b = batch_size / process_count rows are this process's slice of the global
  batch. Every pair comes once an epoch; a batch may cross epochs. Raises
  ValueError for sizes that do not fit and, from next(), for an image that
  cannot be decoded.
  """
  return _make_loader(
    pairs,
    tokenizer,
    columns=(pairs.winners, pairs.losers),
    finish=lambda batch, rows: batch,
    batch_size=batch_size,
    seed=seed,
    resolution=resolution,
    random_crop=random_crop,
    flip=flip,
    process_index=process_index,
    process_count=process_count,
  )


def make_image_loader(
  images: pairs_lib.CaptionedImages,
  tokenizer: tokenizer_lib.Encoder,
  *,
  batch_size: int,
  seed: int,
  resolution: int,
  random_crop: bool,
  flip: bool,
  process_index: int = 0,
  process_count: int = 1,
) -> BatchIterator:
  """Returns batches of single captioned images.

  As `make_pair_loader`, with `images` uint8 [b, H, W, 3], `sizes` int32 [b, 4]
  and `label` int32 [b], the index of the image's style.
  """

  def finish(batch: Batch, rows: np.ndarray) -> Batch:
    single = {name: batch[name][:, 0] for name in ('images', 'sizes')}
    return batch | single | {'label': images.styles[rows]}

  return _make_loader(
    images,
    tokenizer,
    columns=(images.images,),
    finish=finish,
    batch_size=batch_size,
    seed=seed,
    resolution=resolution,
    random_crop=random_crop,
    flip=flip,
    process_index=process_index,
    process_count=process_count,
  )


def _make_loader(
  examples: pairs_lib.Pairs | pairs_lib.CaptionedImages,
  tokenizer: tokenizer_lib.Encoder,
  *,
  columns: Sequence[Sequence[bytes]],
  finish: Callable[[Batch, np.ndarray], Batch],
  batch_size: int,
  seed: int,
  resolution: int,
  random_crop: bool,
  flip: bool,
  process_index: int,
  process_count: int,
) -> BatchIterator:
  """Returns batches whose `images` have an axis over `columns`.

  `finish(batch, rows)` makes the final batch.
  """
  count = len(examples)
  rows_of = local_rows(count, batch_size, process_index, process_count)
  store = PictureStore(columns, resolution)
  workers = threads.Threads()

  def load_example(row: int, epoch: int, out: np.ndarray) -> np.ndarray:
    example_id = int(examples.ids[row])
    try:
      pictures, originals = store.load(row)
    except ValueError as error:
      raise ValueError(
        f'example {example_id}, caption {examples.captions[row]!r}: {error}'
      ) from error
    augmentation = images_lib.draw_augmentation(
      seed, example_id, epoch, random_crop=random_crop, flip=flip
    )
    return augment(pictures, originals, resolution, augmentation, out)

  def load(batch: np.ndarray) -> Batch:
    rows, epochs = batch[rows_of].T
    captions = [examples.captions[row] for row in rows]
    shape = (len(rows), len(columns), resolution, resolution, 3)
    images = np.empty(shape, np.uint8)
    places = zip(rows, epochs, images, strict=True)
    loaded = {
      'sizes': np.stack(workers.starmap(load_example, places)),
      'images': images,
      'input_ids': tokenizer.encode(captions)[0],
      'id': examples.ids[rows],
      'epoch': epochs.astype(np.uint32),
    }
    return finish(loaded, rows)

  # Nothing remains of an endless sequence; else Grain overflows at size 1.
  batches = endless_order(count, seed).batch(batch_size, drop_remainder=True)
  return BatchIterator(batches.map(load), examples=count, workers=workers)


def endless_order(
  count: int, seed: int, *, stream: int = 0
) -> grain.MapDataset:
  """Elements [row, epoch]: every row once an epoch, in an order of its own.

  `stream` tells apart the orders of several data sets under one seed.
  """
  return (
    grain.MapDataset.range(count)
    .shuffle(seed=_shuffle_seed(seed, stream))
    .repeat()
    # Grain's own index here is the position in the endless sequence.
    .map_with_index(lambda i, row: np.array([row, i // count]))
  )


def augment(
  pictures: Sequence[np.ndarray],
  originals: Sequence[tuple[int, int]],
  resolution: int,
  augmentation: images_lib.Augmentation,
  out: np.ndarray,
) -> np.ndarray:
  """Writes uint8 [p, H, W, 3] into `out`; returns the sizes int32 [p, 4].

  `pictures` are resized, `originals` are their (height, width) before. `out`
  is a part of the batch, so that the pictures are copied once.
  """
  sizes = [
    images_lib.size_conditioning(
      original, picture.shape[:2], resolution, augmentation
    )
    for original, picture in zip(originals, pictures, strict=True)
  ]
  for place, picture in zip(out, pictures, strict=True):
    place[:] = images_lib.crop_flip(picture, resolution, augmentation)
  return np.array(sizes, np.int32)


def local_rows(
  count: int, batch_size: int, process_index: int, process_count: int
) -> slice:
  """The rows of the global batch that are this process's.

  Raises ValueError for numbers that make no batches; `count` examples.
  """
  if not count:
    raise ValueError('no examples to load')
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f'batch size {batch_size}: must be a positive multiple of the '
      f'{process_count} processes'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process index {process_index}: must be below {process_count}'
    )
  local = batch_size // process_count
  return slice(process_index * local, (process_index + 1) * local)


def _shuffle_seed(seed: int, stream: int) -> int:
  """Returns a 32-bit seed; Grain adds the epoch to it.

  Hashed, for else epoch 1 of seed 0 would be epoch 0 of seed 1.
  """
  text = f'order/{seed}/{stream}' if stream else f'order/{seed}'
  digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
  return int.from_bytes(digest, 'big')


class PictureStore:
  """Decodes and resizes pictures; keeps them while they fit in the cache."""

  def __init__(self, columns: Sequence[Sequence[bytes]], resolution: int):
    """`columns`: one list of encoded images for each place in an example."""
    self._columns = columns
    self._resolution = resolution
    self._cache: dict[int, _Pictures] = {}
    self._room = CACHE_BYTES
    self._lock = threading.Lock()
    # A cache for a part of a shuffled data set would hit as rarely as it is
    # small, and cost its memory.
    square = 3 * resolution**2
    self._caching = len(columns) * len(columns[0]) * square <= CACHE_BYTES

  def load(self, row: int) -> _Pictures:
    """Returns the pictures, the shorter side resized, and original sizes."""
    if row in self._cache:
      return self._cache[row]
    decoded = [images_lib.decode(column[row]) for column in self._columns]
    pictures = [
      images_lib.resize_shorter(picture, self._resolution)
      for picture in decoded
    ]
    loaded = pictures, [picture.shape[:2] for picture in decoded]
    if self._caching:
      with self._lock:
        size = sum(picture.nbytes for picture in pictures)
        if row not in self._cache and size <= self._room:
          self._cache[row] = loaded
          self._room -= size
    return loaded
