"""What the columns of a scanned data set say: counts, repeats, leaks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from dpo_jax.data import perceptual
from dpo_jax.data import scan as scan_lib

# Examples that are listed; all are counted.
LISTED = 100


def mix(*keys: UInt64[np.ndarray, ' n']) -> UInt64[np.ndarray, ' n']:
  """One key of several; their order matters (splitmix64's finaliser)."""
  mixed = np.zeros_like(keys[0])
  for one in keys:
    mixed = mixed + one + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
  return mixed


def count_all(columns: scan_lib.Columns) -> dict[str, int]:
  """How many records, captions, prompts and pictures there are."""
  read = columns.read
  images = columns.images[read]
  return {
    'records': len(read),
    'unreadable': int((~read).sum()),
    'captions': len(np.unique(columns.captions[read])),
    'captions_normalised': len(np.unique(columns.prompts[read])),
    'images_shown': int((images != 0).sum()),
    'images': len(np.unique(images[images != 0])),
    'images_kept': int(columns.present.sum()),
    'images_undecodable': int((columns.present & ~columns.hashed).sum()),
  }


def count_labels(columns: scan_lib.Columns) -> dict[str, int]:
  """How often image 0 won (it is liked), lost, and neither."""
  labels = columns.labels[columns.read]
  return {
    'first': int((labels > 0.5).sum()),
    'second': int((labels < 0.5).sum()),
    'even': int((labels == 0.5).sum()),
    'soft': int(((labels != 0) & (labels != 1) & (labels != 0.5)).sum()),
  }


@dataclasses.dataclass(frozen=True)
class Repeats:
  """Pictures and pairs that come more than once, byte for byte.

  Attributes:
    same_on_both_sides: indices of records.
    shown_again: showings of a picture beyond its first.
    several_captions: pictures shown with more than one caption.
    repeated: records whose caption and pictures came before, either order.
    conflicting: groups of records of one pair whose labels disagree.
  """

  same_on_both_sides: Int64[np.ndarray, ' n']
  shown_again: int
  several_captions: int
  repeated: int
  conflicting: list[list[int]]


def find_repeats(columns: scan_lib.Columns) -> Repeats:
  """Compares the keys of pictures and captions."""
  rows = np.flatnonzero(columns.read & (columns.images != 0).all(axis=1))
  images = columns.images[rows]
  captions = columns.captions[rows]
  sides = images.shape[1]
  flat, owner = images.ravel(), np.repeat(captions, sides)
  distinct = len(np.unique(flat))
  _, once = np.unique(mix(flat, owner), return_index=True)
  _, uses = np.unique(flat[once], return_counts=True)
  same = np.zeros(len(rows), bool)
  swapped = np.zeros(len(rows), bool)
  if sides == 2:
    same = images[:, 0] == images[:, 1]
    swapped = images[:, 0] > images[:, 1]
  ordered = np.sort(images, axis=1)
  groups = mix(captions, *ordered.T)
  labels = columns.labels[rows]
  labels = np.where(swapped, 1 - labels, labels)
  # A picture against itself has no label to contradict.
  conflicting = _conflicts(rows[~same], groups[~same], labels[~same])
  return Repeats(
    same_on_both_sides=rows[same],
    shown_again=len(flat) - distinct,
    several_captions=int((uses > 1).sum()),
    repeated=len(groups) - len(np.unique(groups)),
    conflicting=conflicting,
  )


def _conflicts(rows, groups, labels) -> list[list[int]]:
  order = np.argsort(groups, kind='stable')
  rows, labels = rows[order], labels[order]
  starts = np.flatnonzero(np.diff(groups[order], prepend=0) != 0)
  starts = np.union1d(starts, [0])[: len(rows)]
  if not len(rows):
    return []
  low = np.minimum.reduceat(labels, starts)
  high = np.maximum.reduceat(labels, starts)
  ends = np.append(starts[1:], len(rows))
  found = [
    rows[starts[g] : ends[g]].tolist()
    for g in np.flatnonzero((low < 0.5) & (high > 0.5))
  ]
  return sorted(found)


@dataclasses.dataclass(frozen=True)
class Alike:
  """Different files that show nearly the same picture.

  Attributes:
    clusters: groups of two or more such pictures.
    images: pictures in them.
    largest: pictures in the largest.
    several_captions: clusters shown with more than one caption.
    pairs: indices of records whose two pictures are nearly the same.
    examples: ((record, side), (record, side)) of two pictures of a cluster.
    complete: whether every picture was compared with every candidate.
  """

  clusters: int
  images: int
  largest: int
  several_captions: int
  pairs: Int64[np.ndarray, ' n']
  examples: list[tuple[tuple[int, int], tuple[int, int]]]
  complete: bool


def find_alike(
  columns: scan_lib.Columns, *, distance: int = perceptual.DISTANCE
) -> Alike:
  """Clusters of pictures whose perceptual hashes differ in few bits.

  Files that are equal byte for byte count as one picture.
  """
  rows, sides = np.nonzero(columns.hashed)
  images = columns.images[rows, sides]
  _, first, inverse = np.unique(images, return_index=True, return_inverse=True)
  inverse = inverse.reshape(-1)
  found = perceptual.find_clusters(
    columns.hashes[rows, sides][first], distance=distance
  )
  sizes = np.bincount(found.labels, minlength=1)
  label = found.labels[inverse]
  inside = sizes[label] > 1
  owners = columns.captions[rows[inside]]
  _, once = np.unique(
    mix(label[inside].astype(np.uint64), owners), return_index=True
  )
  _, captions = np.unique(label[inside][once], return_counts=True)
  examples = []
  for one in np.flatnonzero(sizes > 1)[:LISTED]:
    members = first[np.flatnonzero(found.labels == one)[:2]]
    examples.append(
      tuple((int(rows[m]), int(sides[m])) for m in sorted(members))
    )
  return Alike(
    clusters=int((sizes > 1).sum()),
    images=int(sizes[sizes > 1].sum()),
    largest=int(sizes.max(initial=0)) if (sizes > 1).any() else 0,
    several_captions=int((captions > 1).sum()),
    pairs=_alike_pairs(columns, rows, sides, label),
    examples=examples,
    complete=found.complete,
  )


def _alike_pairs(columns, rows, sides, label) -> np.ndarray:
  """Records both of whose pictures are hashed, differ, and are alike."""
  if columns.images.shape[1] < 2:
    return np.zeros(0, np.int64)
  labels = np.full(columns.images.shape, -1, np.int64)
  labels[rows, sides] = label
  alike = (labels[:, 0] == labels[:, 1]) & (labels[:, 0] >= 0)
  return np.flatnonzero(alike & (columns.images[:, 0] != columns.images[:, 1]))


def find_leaks(
  columns: scan_lib.Columns, prompts: Sequence[str]
) -> dict[str, Any]:
  """Which of an evaluation set's prompts the data set trains on.

  Compared after `scan.normalise`. Returns prompts (distinct ones given),
  found (of them in the data), records (that have such a caption), and
  examples [{prompt, records}], the most frequent LISTED first.
  """
  given = {scan_lib.key(scan_lib.normalise(text)): text for text in prompts}
  keys = np.array(list(given), np.uint64)
  used = columns.prompts[columns.read]
  hits, counts = np.unique(used[np.isin(used, keys)], return_counts=True)
  order = np.lexsort((hits, -counts))[:LISTED]
  return {
    'prompts': len(given),
    'found': len(hits),
    'records': int(counts.sum()),
    'examples': [
      {'prompt': given[int(hits[i])], 'records': int(counts[i])} for i in order
    ],
  }


def count_sizes(columns: scan_lib.Columns) -> dict[str, Any]:
  """Pictures of each (height, width), the most frequent LISTED first.

  Returns sizes [{height, width, images}], distinct (how many sizes), unequal
  (records whose two pictures differ in size), smallest and largest shorter
  side in pixels.
  """
  sizes = columns.sizes[columns.read]
  flat = sizes.reshape(-1, 2)
  if not len(flat):
    return {'sizes': [], 'distinct': 0, 'unequal': 0}
  found, counts = np.unique(flat, axis=0, return_counts=True)
  order = np.argsort(-counts, kind='stable')[:LISTED]
  return {
    'sizes': [
      {
        'height': int(found[i][0]),
        'width': int(found[i][1]),
        'images': int(counts[i]),
      }
      for i in order
    ],
    'distinct': len(found),
    'unequal': int((sizes[:, 0] != sizes[:, -1]).any(axis=1).sum()),
    'shortest_side': int(flat.min()),
    'longest_side': int(flat.max()),
  }


def count_generators(columns: scan_lib.Columns) -> list[dict[str, Any]]:
  """Wins, losses and ties of each generator, the most frequent first.

  Of pairs: against other generators; `own` counts pairs it has with itself.
  Of likes: liked, not liked, and neither.
  """
  labels = columns.labels[columns.read]
  makers = columns.generators[columns.read]
  count = len(columns.names)
  same = np.zeros(len(labels), bool)
  if makers.shape[1] == 2:
    same = makers[:, 0] == makers[:, 1]
  tally = {
    name: np.zeros(count, np.int64) for name in ('wins', 'losses', 'ties')
  }
  for side, sign in zip(range(makers.shape[1]), (1, -1), strict=False):
    lead = sign * (labels - 0.5)
    for name, rows in (
      ('wins', lead > 0),
      ('losses', lead < 0),
      ('ties', lead == 0),
    ):
      chosen = makers[rows & ~same, side]
      tally[name] += np.bincount(chosen, minlength=count)
  own = np.bincount(makers[same, 0], minlength=count)
  total = sum(tally.values()) + own
  return [
    {
      'name': columns.names[i],
      **{name: int(counts[i]) for name, counts in tally.items()},
      'own': int(own[i]),
    }
    for i in np.argsort(-total, kind='stable')
  ]


def pick(columns: scan_lib.Columns, count: int) -> list[int]:
  """Indices of `count` readable records by the hash of their ids.

  The same in every run, whatever the order and the other records.
  """
  rows = np.flatnonzero(columns.read)
  keys = mix(columns.ids[rows])
  return rows[np.lexsort((rows, keys))[:count]].tolist()
