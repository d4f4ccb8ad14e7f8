"""Batches of pairs from prepared folders: pictures, or cached latents."""

import dataclasses
import hashlib
import itertools
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from dpo_jax import keys
from dpo_jax.data import (
  cached,
  loader,
  mixing,
  record_fields,
  records,
  threads,
)
from dpo_jax.data import images as images_lib
from dpo_jax.data import tokenizer as tokenizer_lib

# Records tried in the place of a damaged one, the first included.
ATTEMPTS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """A data set to take batches from, with its weight in a mixture.

  With `cache` and `captions` batches hold latents and text states, without
  them pictures and tokens. `rows` are the records to take, None is all.
  """

  records: records.Records
  weight: float = 1.0
  cache: cached.Description | None = None
  captions: cached.Captions | None = None
  rows: Int64[np.ndarray, ' n'] | None = None

  def __len__(self) -> int:
    """The number of pairs."""
    return len(self.records if self.rows is None else self.rows)

  def select(self, rows: Sequence[int]) -> 'Source':
    """The source with the pairs at `rows` only."""
    rows = np.asarray(rows, np.int64)
    rows = rows if self.rows is None else self.rows[rows]
    return dataclasses.replace(self, rows=rows)

  def record(self, row: int) -> record_fields.Record:
    """The record of a pair."""
    return self.records[row if self.rows is None else int(self.rows[row])]

  def uncached(self) -> 'Source':
    """The same pictures, decoded; ValueError where they were not kept."""
    if self.cache is not None and not self.cache.keep_images:
      raise ValueError(
        f'{self.records.folder}: the pictures were not kept, only latents; '
        'train from these, or prepare with --keep_images=true'
      )
    return dataclasses.replace(self, cache=None, captions=None)


def open_source(
  path: str | os.PathLike, *, split: str = '', weight: float = 1.0
) -> Source:
  """The pairs of a prepared folder, with the cache if it has one.

  Without `split` the folder's only one. Raises ValueError for a folder that is
  no prepared one.
  """
  root = pathlib.Path(path)
  opened = records.open_folder(root, split=split)
  split = opened.split
  description = cached.read_description(root)
  shape = cached.moments_shape(opened)
  if (description is None) != (shape is None):
    raise ValueError(
      f'{root}: '
      + (
        f'{cached.NAME} but no latents in the records'
        if shape is None
        else f'latents in the records but no {cached.NAME}'
      )
      + '; prepare the folder again'
    )
  if description is None:
    return Source(opened, weight)
  if shape[0] != description.flips:
    raise ValueError(
      f'{root}: {cached.NAME} tells of {description.flips} flips, the records '
      f'hold {shape[0]}; prepare the folder again'
    )
  captions = cached.open_captions(root, split=split)
  return Source(opened, weight, description, captions)


def make_record_loader(
  sources: Source | Sequence[Source],
  tokenizer: tokenizer_lib.Encoder | None,
  *,
  batch_size: int,
  seed: int,
  resolution: int,
  random_crop: bool,
  flip: bool,
  process_index: int = 0,
  process_count: int = 1,
) -> loader.BatchIterator:
  """Returns batches of pairs, the winner first on the pair axis.

  A batch holds `sizes` int32 [b, 2, 4] (original height and width, crop top
  and left), `id` uint32 [b, 2] (keys.split_ids), `epoch` uint32 [b],
  `label_confidence` float32 [b] (probability that the winner is preferred),
  `substituted` float32 [b] (1 where a damaged record was replaced), the
  sources' `score_...` columns float32 [b, 2]; and `images` uint8
  [b, 2, H, W, 3] and `input_ids` int32 [b, ...], or from a cache `moments`
  float16 [b, 2, h, w, 2c], `prompt_embeds` float16 [b, s, d] and for SDXL
  `pooled_embeds` float16 [b, e]. b = batch_size / process_count rows are this
  process's slice of the global batch.

  Several sources are mixed by weight; of each, every pair comes once an epoch
  of its own. The example that replaces a damaged one hangs on the seed, its
  place and the epoch alone.

  Raises ValueError for sizes that do not fit, for sources that do not fit
  together or the settings, and, from next(), where ATTEMPTS records in a row
  are damaged.
  """
  sources = [sources] if isinstance(sources, Source) else list(sources)
  counts = [len(source) for source in sources]
  rows = loader.local_rows(
    sum(counts), batch_size, process_index, process_count
  )
  examples = _Examples(
    sources, seed=seed, size=resolution, random_crop=random_crop, flip=flip
  )
  if tokenizer is None and not examples.cached:
    raise ValueError('no tokenizer: pictures need one, a cache does not')

  workers = threads.Threads()

  def load(batch: np.ndarray) -> loader.Batch:
    places = batch[rows].tolist()
    images = [None] * len(places)
    if not examples.cached:
      shape = (len(places), 2, resolution, resolution, 3)
      images = np.empty(shape, np.uint8)
    # What is cached is read faster by one thread than shared out.
    starmap = itertools.starmap if examples.cached else workers.starmap
    made = list(
      starmap(
        examples.make,
        ((*place, out) for place, out in zip(places, images, strict=True)),
      )
    )
    captions = [example.pop('caption') for example in made]
    stacked = {
      name: np.stack([example[name] for example in made]) for name in made[0]
    }
    if not examples.cached:
      stacked['images'] = images
      stacked['input_ids'] = tokenizer.encode(captions)[0]
    return stacked | {'id': keys.split_ids(stacked['id'])}

  order = mixing.endless_order(
    counts, [source.weight for source in sources], seed=seed
  )
  # Nothing remains of an endless sequence; else Grain overflows at size 1.
  batches = order.batch(batch_size, drop_remainder=True).map(load)
  return loader.BatchIterator(batches, examples=sum(counts), workers=workers)


class _Examples:
  """Makes an example of a record, and another where that is damaged."""

  def __init__(
    self,
    sources: Sequence[Source],
    *,
    seed: int,
    size: int,
    random_crop: bool,
    flip: bool,
  ):
    """Raises ValueError for sources that do not fit."""
    self.cached = sources[0].cache is not None
    self._sources, self._seed, self._size = sources, seed, size
    self._random_crop, self._flip = random_crop, flip
    self._scores = sorted(_scores(sources[0]))
    for source in sources:
      self._check(source)

  def _check(self, source: Source) -> None:
    name, first = source.records.folder, self._sources[0]
    wrong = ''
    if (source.cache is not None) != self.cached:
      wrong = 'of data sets that are mixed either all have a cache, or none'
    elif _scores(source) != _scores(first):
      wrong = (
        f'scores {sorted(_scores(source))}, but {first.records.folder} has '
        f'{self._scores}; data sets that are mixed have the same'
      )
    elif self.cached:
      wrong = self._cache_problem(source.cache, first.cache)
    if wrong:
      raise ValueError(f'{name}: {wrong}')

  def _cache_problem(self, cache, first) -> str:
    if cache.weights != first.weights:
      return 'its cache is of another model than that of the first data set'
    if cache.size != self._size:
      return (
        f'its latents are of pictures of {cache.size} pixels, not '
        f'data.resolution={self._size}; set that, or prepare with '
        f'--size={self._size}'
      )
    if self._random_crop:
      return (
        "its latents are of the pictures' middles; set "
        'data.random_crop=False, or train without the cache'
      )
    if self._flip and cache.flips == 1:
      return (
        'its latents are of the pictures as they are; set data.flip=False, or '
        'prepare with --flips=2'
      )
    return ''

  def make(
    self, number: int, row: int, epoch: int, out: np.ndarray | None
  ) -> dict[str, np.ndarray]:
    """The example at a row of a source, or the one that stands in for it.

    Its pictures are written into `out`, if there are any.
    """
    source, chosen, first = self._sources[number], row, None
    for attempt in range(ATTEMPTS):
      if attempt:
        chosen = self._substitute(number, row, epoch, attempt)
      try:
        example = self._read(source, chosen, epoch, out)
      except ValueError as error:
        first = first or error
      else:
        return example | {'substituted': np.float32(attempt > 0)}
    raise ValueError(
      f'{source.records.folder}: {ATTEMPTS} records in a row are damaged, the '
      f'first: {first}; python -m dpo_jax.tools.verify names all'
    ) from first

  def _substitute(self, number: int, row: int, epoch: int, attempt: int) -> int:
    """The row to take instead, from a hash."""
    text = f'substitute/{self._seed}/{number}/{row}/{epoch}/{attempt}'
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'big') % len(self._sources[number])

  def _read(
    self, source: Source, row: int, epoch: int, out: np.ndarray | None
  ) -> dict[str, np.ndarray]:
    """The example at a row; ValueError where it is damaged."""
    record = source.record(row)
    label, number = float(record['label']), int(record['id'])
    if not 0 <= label <= 1:
      raise ValueError(f'record {row}: its label is {label}')
    sides = [0, 1] if label >= 0.5 else [1, 0]
    augmentation = images_lib.Augmentation()
    if self._random_crop or self._flip:
      augmentation = images_lib.draw_augmentation(
        self._seed,
        number,
        epoch,
        random_crop=self._random_crop,
        flip=self._flip,
      )
    make = _cached_inputs if self.cached else _pictures
    return make(source, record, sides, self._size, augmentation, out) | {
      'caption': record['caption'].decode('utf-8', 'replace'),
      'id': np.uint64(number),
      'epoch': np.uint32(epoch),
      'label_confidence': np.float32(max(label, 1 - label)),
      **{name: record[name][sides] for name in self._scores},
    }


def _scores(source: Source) -> set[str]:
  return {name for name in source.records.fields if name.startswith('score_')}


def _pictures(source, record, sides, size, augmentation, out):
  """`sizes`, and the encoded pictures decoded into `out`."""
  del source
  decoded = [images_lib.decode(record[f'image_{side}']) for side in sides]
  sizes = loader.augment(
    [images_lib.resize_shorter(picture, size) for picture in decoded],
    _originals(record, sides),
    size,
    augmentation,
    out,
  )
  return {'sizes': sizes}


def _cached_inputs(source, record, sides, size, augmentation, out):
  """`moments`, `sizes` and text states from the cache."""
  del out
  states = source.captions.find(int(record['caption_id']), record['caption'])
  sizes = [
    images_lib.size_conditioning(
      original, images_lib.resized_shape(*original, size), size, augmentation
    )
    for original in _originals(record, sides)
  ]
  # A view: the copy into the batch is the only one.
  moments = record['moments'][:, int(augmentation.flip)]
  return {
    'moments': moments if sides[0] == 0 else moments[::-1],
    'sizes': np.array(sizes, np.int32),
    **states,
  }


def _originals(record, sides) -> list[tuple[int, int]]:
  """(height, width) of the pictures as they came."""
  sizes = record['sizes'].tolist()
  if min(*sizes[0][:2], *sizes[1][:2]) < 1:
    raise ValueError(f'its sizes are {sizes}')
  return [tuple(sizes[side][:2]) for side in sides]
