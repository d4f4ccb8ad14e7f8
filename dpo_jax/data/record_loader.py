"""Batches from prepared folders, of pairs or likes: pictures, or latents."""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int64

from dpo_jax import keys
from dpo_jax.data import (
  cached,
  label_noise,
  loader,
  mixing,
  record_fields,
  record_inputs,
  records,
  scan,
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
  them pictures and tokens. `rows` are the records to take, None is all. The
  share `label_noise` of them has a wrong label on purpose. `scores` are columns
  beside the records, a row for each record; the larger of the scores in
  `winner`, one of them, tells who wins where that is not ''.
  """

  records: records.Records
  weight: float = 1.0
  cache: cached.Description | None = None
  captions: cached.Captions | None = None
  rows: Int64[np.ndarray, ' n'] | None = None
  label_noise: float = 0.0
  scores: Mapping[str, Float32[np.ndarray, 'n *sides']] = dataclasses.field(
    default_factory=dict
  )
  winner: str = ''

  def __len__(self) -> int:
    """The number of examples."""
    return len(self.records if self.rows is None else self.rows)

  @property
  def kind(self) -> str:
    """What the records are: 'pairs' or 'likes'."""
    return 'likes' if 'liked' in self.records.fields else 'pairs'

  def select(self, rows: Sequence[int]) -> 'Source':
    """The source with the examples at `rows` only."""
    rows = np.asarray(rows, np.int64)
    rows = rows if self.rows is None else self.rows[rows]
    return dataclasses.replace(self, rows=rows)

  def record(self, row: int) -> record_fields.Record:
    """The record of an example, its scores beside it included."""
    index = row if self.rows is None else int(self.rows[row])
    beside = {name: column[index] for name, column in self.scores.items()}
    return self.records[index] | beside

  def uncached(self) -> 'Source':
    """The same pictures, decoded; ValueError where they were not kept."""
    if self.cache is not None and not self.cache.keep_images:
      raise ValueError(
        f'{self.records.folder}: the pictures were not kept, only latents; '
        'train from these, or prepare with --keep_images=true'
      )
    return dataclasses.replace(self, cache=None, captions=None)


def open_source(
  path: str | os.PathLike,
  *,
  kind: str = 'pairs',
  split: str = '',
  weight: float = 1.0,
) -> Source:
  """The pairs or likes of a prepared folder, with the cache if it has one.

  Without `split` the folder's only one. Raises ValueError for a folder that is
  no prepared one, or has none of this kind.
  """
  root = pathlib.Path(path)
  opened = records.open_folder(root, kind=kind, split=split)
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
  """Returns batches of pairs, the winner first on the pair axis, or of likes.

  A batch of pairs holds `sizes` int32 [b, 2, 4] (original height and width,
  crop top and left), `id` uint32 [b, 2] (keys.split_ids), `epoch` uint32 [b],
  `label_confidence` float32 [b] (probability that the winner is preferred),
  `substituted` float32 [b] (1 where a damaged record was replaced), the
  sources' `score_...` columns float32 [b, 2]; and `images` uint8
  [b, 2, H, W, 3] and `input_ids` int32 [b, ...], or from a cache `moments`
  float16 [b, 2, h, w, 2c], `prompt_embeds` float16 [b, s, d] and for SDXL
  `pooled_embeds` float16 [b, e]. b = batch_size / process_count rows are this
  process's slice of the global batch.

  Of likes the second axis of `images`, `moments` and `sizes` has length 1,
  scores are [b], and `liked` float32 [b] in [0, 1] (1 is liked) comes in the
  place of `label_confidence`.

  Several sources are mixed by weight; of each, every example comes once an
  epoch of its own. The example that replaces a damaged one hangs on the seed,
  its place and the epoch alone.

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
      sides = len(scan.SIDES[examples.kind])
      shape = (len(places), sides, resolution, resolution, 3)
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
    self.kind = sources[0].kind
    self._sources, self._seed, self._size = sources, seed, size
    self._random_crop, self._flip = random_crop, flip
    self._scores = sorted(_scores(sources[0]))
    for source in sources:
      self._check(source)

  def _check(self, source: Source) -> None:
    name, first = source.records.folder, self._sources[0]
    wrong = ''
    if source.kind != self.kind:
      wrong = (
        f'holds {source.kind}, but {first.records.folder} holds {self.kind}; '
        'data sets that are mixed are of one kind'
      )
    elif (source.cache is not None) != self.cached:
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
    record, kind = source.record(row), self.kind
    number = int(record['id'])
    sides, labels = record_inputs.read_label(
      record,
      kind,
      flipped=label_noise.is_flipped(number, source.label_noise),
      winner=source.winner,
    )
    augmentation = images_lib.Augmentation()
    if self._random_crop or self._flip:
      augmentation = images_lib.draw_augmentation(
        self._seed,
        number,
        epoch,
        random_crop=self._random_crop,
        flip=self._flip,
      )
    read = functools.partial(record_inputs.read_pictures, out=out)
    if self.cached:
      read = functools.partial(
        record_inputs.read_cached, captions=source.captions
      )
    return {
      **read(record, kind, sides, size=self._size, augmentation=augmentation),
      **labels,
      **record_inputs.read_scores(record, kind, self._scores, sides),
      'caption': record['caption'].decode('utf-8', 'replace'),
      'id': np.uint64(number),
      'epoch': np.uint32(epoch),
    }


def _scores(source: Source) -> set[str]:
  inside = {n for n in source.records.fields if n.startswith('score_')}
  return inside | set(source.scores)
