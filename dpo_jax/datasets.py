"""What a run trains on: parquet files held in memory, or prepared folders."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.data import (
  cached,
  label_loader,
  labelling,
  loader,
  pairs,
  prepared,
  record_loader,
)
from dpo_jax.data import label_noise as noise_lib
from dpo_jax.data import tokenizer as tokenizer_lib

Sources = tuple[record_loader.Source, ...]
Examples = (
  pairs.Pairs | pairs.CaptionedImages | Sources | label_loader.LabelExamples
)


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
  return bool(prepared.find_kinds(path))


def read_parquet(
  paths: Sequence[str],
  *,
  holdout: float,
  paired: bool,
  max_held: int = 0,
  label_noise: float = 0.0,
) -> Data:
  """Reads files in Pick-a-Pic's schema into memory: pairs or single pictures.

  `holdout`: share of the captions that is held out; 0 holds all and trains on
  all. `max_held`: pairs that are held out at most, 0 is all; the others of
  these captions are not trained on either. `label_noise`: share of the
  training pairs that have winner and loser swapped, by a hash of their ids;
  what is held out never has. Raises ValueError as data.pairs does, and for
  noise where there is nothing but single pictures.
  """
  _check_noise(label_noise, paired)
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
    if label_noise:
      train, flipped = noise_lib.flip_pairs(train, label_noise)
      counts['labels_flipped'] = flipped
    if 0 < max_held < len(held):
      held = held.select(np.sort(np.argsort(held.ids)[:max_held]))
  ids = dict(
    sorted(zip(held_images.captions, held_images.ids.tolist(), strict=True))
  )
  return Data(
    train=train,
    held=held,
    counts=counts,
    fingerprint=_add_noise(_hash_examples(examples), label_noise),
    find_prompts=lambda count: sorted(ids, key=lambda c: ids[c])[:count],
    all_images=images,
    held_images=held_images,
  )


def _check_noise(share: float, paired: bool) -> None:
  noise_lib.check(share)
  if share and not paired:
    raise ValueError(
      f'data.label_noise={share}: single pictures are trained on, which have '
      'no labels; set it to 0, or train on pairs'
    )


def _add_noise(fingerprint: str, share: float) -> str:
  """The fingerprint of the same data with wrong labels."""
  if not share:
    return fingerprint
  text = f'{fingerprint} label_noise {float(share)}'
  return hashlib.sha256(text.encode()).hexdigest()


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
  kind: str = 'pairs',
  label_noise: float = 0.0,
  labels: labelling.Labelling | None = None,
) -> Data:
  """Opens prepared folders of pairs or likes, to be mixed; reads no record.

  kind: 'pairs', or 'likes' for single pictures that are liked or not; all
  folders are of it. weights: of the folders in the mixture, by default their
  numbers of examples. holdout, max_held: as for read_parquet. eval_paths:
  folders that are held out instead; no caption of theirs is trained on.
  Without `use_cache` pictures are decoded though latents are there.
  label_noise: as for read_parquet, and of a like `liked` becomes 1 - liked;
  how many that are is not counted, since the ids are in the records. labels:
  who wins the training pairs, and which are kept; held-out ones keep the labels
  of the records.

  Raises ValueError, naming the folder, for what is no prepared folder of
  this kind, for weights that do not fit, and where nothing is left for a side.
  """
  labels = labels or labelling.Labelling()
  _check_mixture(kind, weights, paths, labels)
  noise_lib.check(label_noise)
  opened, held = (
    [prepared.open_folder(p, kind=kind, use_cache=use_cache) for p in some]
    for some in (paths, eval_paths)
  )
  opened, fingerprint = _with_columns(opened, labels)
  held, _ = _with_columns(held, labelling.Labelling(columns=labels.columns))
  sides = _split_sources(opened, held, holdout)
  _check_sides(sides.train, sides.held, paths, holdout)
  counts = prepared.sum_counts(opened) | {
    kind: sum(map(len, opened)),
    f'training_{kind}': sum(map(len, sides.train)),
    f'held_out_{kind}': sum(map(len, held)) if held else sides.left_out,
  }
  if held:
    counts[f'{kind}_with_held_out_captions_dropped'] = sides.left_out
  chosen, dropped = _choose(sides, labels)
  counts |= dropped
  train = [
    dataclasses.replace(source, weight=weight, label_noise=label_noise)
    for source, weight in zip(chosen, weights or map(len, chosen), strict=True)
  ]
  return Data(
    train=tuple(train),
    held=_limit(sides.held, sides.held_hashes, max_held),
    counts=counts,
    fingerprint=_add_noise(fingerprint, label_noise),
    find_prompts=functools.partial(
      prepared.find_prompts, sides.held, sides.held_hashes
    ),
  )


def _check_mixture(kind, weights, paths, labels):
  if kind not in prepared.KINDS:
    raise ValueError(
      f'kind {kind!r}: must be one of {", ".join(prepared.KINDS)}'
    )
  if weights and len(weights) != len(paths):
    raise ValueError(
      f'data.weights={tuple(weights)}: {len(weights)} weights for '
      f'{len(paths)} folders; give one for each, or none'
    )
  if kind != 'pairs' and (labels.winner or labels.min_agree):
    raise ValueError(
      f'data.winner={labels.winner!r}, data.consensus={labels.consensus}: are '
      'for pairs; likes have no winner'
    )


def _with_columns(sources, labels):
  """(the sources with the columns that are asked for, fingerprint of all)."""
  digest = prepared.hash_sources(sources)
  if not labels.names:
    return sources, digest
  found = [labelling.with_columns(source, labels) for source in sources]
  text = ' '.join([digest, *(some for _, some in found)])
  return [s for s, _ in found], hashlib.sha256(text.encode()).hexdigest()


def _choose(sides, labels):
  """(the training sources with the pairs that are kept, counts of the rest)."""
  if not labels.winner and not labels.min_agree:
    return sides.train, {}
  sources, counts = [], collections.Counter()
  for source, hashes in zip(sides.train, sides.train_hashes, strict=True):
    source, dropped = labelling.choose(source, labels, hashes)
    sources.append(source)
    counts.update(dropped)
  counts['training_pairs'] = sum(map(len, sources))
  return sources, dict(counts)


class _Sides(NamedTuple):
  """Sources that are trained on and held out; rows that are `left_out`."""

  train: list[record_loader.Source]
  train_hashes: list[prepared.Hashes]
  held: list[record_loader.Source]
  held_hashes: list[prepared.Hashes]
  left_out: int


def _split_sources(opened, given, holdout: float) -> _Sides:
  """Holds out `given` and their captions, or a share of those of `opened`."""
  hashes = [prepared.read_split_hashes(source) for source in opened]
  held, held_hashes = given, list(map(prepared.read_split_hashes, given))
  if given:
    taken = np.unique(np.concatenate(held_hashes))
    is_held = [np.isin(some, taken) for some in hashes]
  else:
    # As pairs.split_by_caption decides.
    is_held = [some < np.uint64(holdout * 2**64) for some in hashes]
    held, held_hashes = opened, hashes
    if holdout:
      rows = [np.flatnonzero(some) for some in is_held]
      held = [s.select(r) for s, r in zip(opened, rows, strict=True)]
      held_hashes = [h[r] for h, r in zip(hashes, rows, strict=True)]
  train = [
    source.select(np.flatnonzero(~some)) if some.any() else source
    for source, some in zip(opened, is_held, strict=True)
  ]
  train_hashes = [h[~some] for h, some in zip(hashes, is_held, strict=True)]
  left_out = sum(int(some.sum()) for some in is_held)
  return _Sides(train, train_hashes, held, held_hashes, left_out)


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
  hashes: Sequence[prepared.Hashes],
  most: int,
) -> Sources:
  """The examples of the smallest hashes; empty sources are left out."""
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


def make_loader(
  examples: Examples, tokenizer: tokenizer_lib.Encoder, **options
) -> loader.BatchIterator:
  """Endless batches; `options` are those of the loaders in data."""
  if isinstance(examples, tuple):
    return record_loader.make_record_loader(examples, tokenizer, **options)
  make = loader.make_image_loader
  if isinstance(examples, pairs.Pairs):
    make = loader.make_pair_loader
  elif isinstance(examples, label_loader.LabelExamples):
    make = label_loader.make_label_loader
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
