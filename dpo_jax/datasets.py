"""What a run trains on: parquet files held in memory, or prepared folders."""

import dataclasses
import hashlib
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt64

from dpo_jax.data import (
  build_report,
  cached,
  loader,
  pairs,
  record_loader,
  records,
  side_files,
)
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.data.formats import rows as rows_lib

Sources = tuple[record_loader.Source, ...]
Examples = pairs.Pairs | pairs.CaptionedImages | Sources
# What a prepared folder may hold to train on.
_KINDS = ('pairs', 'likes')
# Counts of a build report that a run's report repeats, under these names.
_REPORTED = {
  'rows': 'rows',
  'ties': 'ties_dropped',
  'unlabelled': 'unlabelled_dropped',
  'identical': 'identical_dropped',
  'unreadable': 'unreadable_dropped',
  'over_token_limit': 'pairs_with_cut_captions',
}


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
  """Examples of a run, split into what is trained on and what is held out.

  Attributes:
    train, held: examples; a tuple of sources where they come from folders.
    counts: what became of the rows, for the report.
    fingerprint: SHA-256 that tells other data under the same name.
    find_prompts: number -> so many distinct held-out captions at most, in an
      order that does not hang on that of the rows.
    all_images, held_images: every single picture, and those not trained on;
      None for folders, whose pictures are not held in memory.
  """

  train: Examples
  held: Examples
  counts: dict[str, int]
  fingerprint: str
  find_prompts: Callable[[int], list[str]]
  all_images: pairs.CaptionedImages | None = None
  held_images: pairs.CaptionedImages | None = None

  @property
  def cache(self) -> cached.Captions | None:
    """The text states that batches come with, None for pictures."""
    return self.train[0].captions if isinstance(self.train, tuple) else None


def split_paths(text: str) -> list[str]:
  """The paths that are named, separated by commas.

  A comma in the name of something that is there belongs to the name.
  """
  if text and pathlib.Path(text).exists():
    return [text]
  return [path.strip() for path in text.split(',') if path.strip()]


def is_prepared(path: str) -> bool:
  """Whether dpo_jax.tools.prepare wrote this folder."""
  return any((pathlib.Path(path) / kind).is_dir() for kind in _KINDS)


def read_parquet(
  paths: Sequence[str], *, holdout: float, paired: bool, max_held: int = 0
) -> Data:
  """Reads files in Pick-a-Pic's schema into memory: pairs or single pictures.

  `holdout`: share of the captions that is held out; 0 holds all and trains on
  all. `max_held`: pairs that are held out at most, 0 is all; the others of
  these captions are not trained on either. Raises ValueError as data.pairs
  does.
  """
  images = pairs.read_images(paths)
  _, held_images = _split(images, holdout)
  examples = pairs.read_parquet(paths) if paired else images
  train, held = _split(examples, holdout)
  counts = {}
  if paired:
    counts = {
      'rows': examples.counts.rows,
      'pairs': examples.counts.kept,
      'ties_dropped': examples.counts.ties,
      'unlabelled_dropped': examples.counts.unlabelled,
      'identical_dropped': examples.counts.identical,
      'training_pairs': len(train),
      'held_out_pairs': len(held) if holdout else 0,
    }
    if 0 < max_held < len(held):
      held = held.select(np.sort(np.argsort(held.ids)[:max_held]))
  ids = dict(
    sorted(zip(held_images.captions, held_images.ids.tolist(), strict=True))
  )
  return Data(
    train=train,
    held=held,
    counts=counts,
    fingerprint=_hash_examples(examples),
    find_prompts=lambda count: sorted(ids, key=lambda c: ids[c])[:count],
    all_images=images,
    held_images=held_images,
  )


def _hash_examples(examples) -> str:
  """Of captions and pictures, and of which won: ids do not tell that."""
  digest = hashlib.sha256(examples.ids.tobytes())
  for name in ('winners', 'losers', 'images'):
    for data in getattr(examples, name, ()):
      digest.update(hashlib.sha256(data).digest())
  return digest.hexdigest()


def _split(examples, holdout: float):
  if not holdout:
    return examples, examples
  return pairs.split_by_caption(examples, holdout)


def open_prepared(
  paths: Sequence[str],
  *,
  weights: Sequence[float] = (),
  holdout: float = 0.0,
  eval_paths: Sequence[str] = (),
  use_cache: bool = True,
  max_held: int = 0,
) -> Data:
  """Opens prepared folders of pairs, to be mixed; reads no record.

  weights: of the folders in the mixture, by default their numbers of pairs.
  holdout, max_held: as for read_parquet. eval_paths: folders that are held
  out instead; no caption of theirs is trained on. Without `use_cache`
  pictures are decoded though latents are there.

  Raises ValueError, naming the folder, for what is no prepared folder of
  pairs, for weights that do not fit, and where nothing is left for a side.
  """
  if weights and len(weights) != len(paths):
    raise ValueError(
      f'data.weights={tuple(weights)}: {len(weights)} weights for '
      f'{len(paths)} folders; give one for each, or none'
    )
  opened = [_open(path, use_cache) for path in paths]
  hashes = [_split_hashes(source) for source in opened]
  if eval_paths:
    held = [_open(path, use_cache) for path in eval_paths]
    held_hashes = [_split_hashes(source) for source in held]
    taken = np.unique(np.concatenate(held_hashes))
    is_held = [np.isin(some, taken) for some in hashes]
  else:
    # As pairs.split_by_caption decides.
    is_held = [some < np.uint64(holdout * 2**64) for some in hashes]
    if not holdout:
      held, held_hashes = opened, hashes
    else:
      rows = [np.flatnonzero(some) for some in is_held]
      held = [s.select(r) for s, r in zip(opened, rows, strict=True)]
      held_hashes = [h[r] for h, r in zip(hashes, rows, strict=True)]
  train = [
    source.select(np.flatnonzero(~some)) if some.any() else source
    for source, some in zip(opened, is_held, strict=True)
  ]
  _check_sides(train, held, paths, holdout)
  left_out = sum(int(some.sum()) for some in is_held)
  counts = _report_counts(opened) | {
    'pairs': sum(map(len, opened)),
    'training_pairs': sum(map(len, train)),
    'held_out_pairs': sum(map(len, held)) if eval_paths else left_out,
  }
  if eval_paths:
    counts['pairs_with_held_out_captions_dropped'] = left_out
  train = [
    dataclasses.replace(source, weight=weight)
    for source, weight in zip(train, weights or map(len, train), strict=True)
  ]
  return Data(
    train=tuple(train),
    held=_limit(held, held_hashes, max_held),
    counts=counts,
    fingerprint=_fingerprint(opened),
    find_prompts=lambda count: _find_prompts(held, held_hashes, count),
  )


def _open(path: str, use_cache: bool) -> record_loader.Source:
  root = pathlib.Path(path)
  if not root.exists():
    unfinished = root.with_name(f'{root.name}.incomplete')
    more = (
      f'; {unfinished} is an unfinished build, which the same prepare command '
      'completes'
    )
    raise ValueError(
      f'{path}: no such folder{more if unfinished.exists() else ""}'
    )
  if not is_prepared(path):
    raise ValueError(
      f'{path}: is no prepared folder; either all of the paths are such, or '
      'all are parquet files'
    )
  if not (root / 'pairs').is_dir():
    raise ValueError(
      f'{path}: holds single liked pictures, no pairs; prepare pairs, or name '
      'another folder'
    )
  source = record_loader.open_source(root)
  return source if use_cache else source.uncached()


def _split_hashes(source: record_loader.Source) -> UInt64[np.ndarray, ' n']:
  return side_files.read_split_hashes(
    cached.folder_of(source.records),
    'pairs',
    source.records.split,
    len(source.records),
  )


def _check_sides(train, held, paths, holdout) -> None:
  for path, source in zip(paths, train, strict=True):
    if not len(source):
      raise ValueError(
        f'{path}: all of its captions are held out; hold out others, or leave '
        'out this folder'
      )
  if not sum(map(len, held)):
    raise ValueError(
      f'{", ".join(paths)}: data.holdout={holdout} holds out no caption; '
      'choose a larger share'
    )


def _limit(
  held: Sequence[record_loader.Source],
  hashes: Sequence[UInt64[np.ndarray, ' n']],
  most: int,
) -> Sources:
  """The pairs of the smallest hashes; empty sources are left out."""
  total = sum(map(len, held))
  if 0 < most < total:
    chosen = np.zeros(total, bool)
    chosen[np.argsort(np.concatenate(hashes), kind='stable')[:most]] = True
    parts = np.split(chosen, np.cumsum([len(source) for source in held])[:-1])
    held = [
      source.select(np.flatnonzero(part))
      for source, part in zip(held, parts, strict=True)
    ]
  return tuple(source for source in held if len(source))


def _find_prompts(held, hashes, count: int) -> list[str]:
  """Distinct captions in the order of their hashes, read from the records."""
  places = {}
  for source, some in zip(held, hashes, strict=True):
    distinct, first = np.unique(some, return_index=True)
    for number, row in zip(distinct.tolist(), first.tolist(), strict=True):
      places.setdefault(number, (source, row))
  found = []
  for number in sorted(places):
    if len(found) == count:
      break
    source, row = places[number]
    try:
      caption = source.record(row)['caption'].decode('utf-8', 'replace')
    except records.DamagedRecordError as error:
      print(f'a held-out prompt is left out: {error}', file=sys.stderr)
      continue
    if rows_lib.split_hash(caption) != number:
      root = cached.folder_of(source.records)
      name = side_files.split_hashes_name('pairs', source.records.split)
      raise ValueError(
        f'{root / name}: is of other records than those there; prepare the '
        'folder again'
      )
    found.append(caption)
  return found


def _report_counts(sources) -> dict[str, int]:
  """Sums over the build reports; only what all of them tell."""
  reports = []
  for source in sources:
    report = side_files.read(
      cached.folder_of(source.records), build_report.NAME
    )
    counts = (report or {}).get('counts')
    reports.append(counts if isinstance(counts, dict) else {})
  return {
    label: sum(report[name] for report in reports)
    for name, label in _REPORTED.items()
    if all(type(report.get(name)) is int for report in reports)
  }


def _fingerprint(sources) -> str:
  digest = hashlib.sha256()
  for source in sources:
    sums = cached.folder_of(source.records) / 'checksums.json'
    given = sums.read_bytes() if sums.is_file() else b''
    digest.update(hashlib.sha256(given).digest())
    digest.update(f'{source.records.split} {len(source.records)}\n'.encode())
  return digest.hexdigest()


def make_loader(
  examples: Examples, tokenizer: tokenizer_lib.Encoder, **options
) -> loader.BatchIterator:
  """Endless batches; `options` are those of the loaders in data."""
  if isinstance(examples, tuple):
    return record_loader.make_record_loader(examples, tokenizer, **options)
  make = loader.make_image_loader
  if isinstance(examples, pairs.Pairs):
    make = loader.make_pair_loader
  return make(examples, tokenizer, **options)


def make_held_batches(
  examples: Examples,
  tokenizer: tokenizer_lib.Encoder,
  *,
  batch_size: int,
  seed: int,
  resolution: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Callable[..., Iterator[tuple[loader.Batch, int]]]:
  """epoch -> each held-out example once, as (batch, number of valid rows).

  The batch is this process's rows, the number is of the whole batch.
  """
  # One source after the other: a mixture repeats some before it ends.
  parts = examples if isinstance(examples, tuple) else (examples,)

  def run(part, epoch):
    iterator = make_loader(
      (part,) if isinstance(examples, tuple) else part,
      tokenizer,
      batch_size=batch_size,
      seed=seed,
      resolution=resolution,
      random_crop=False,
      flip=False,
      process_index=process_index,
      process_count=process_count,
    )
    left = len(part)
    try:
      while left > 0:
        batch = next(iterator)
        # Rows of the next round come last and are cut off; the same noise
        # for the same example whatever the batch size is.
        batch['epoch'] = np.full_like(batch['epoch'], epoch)
        yield batch, min(left, batch_size)
        left -= batch_size
    finally:
      iterator.close()

  return lambda epoch=0: itertools.chain.from_iterable(
    run(part, epoch) for part in parts
  )
