"""Perceptual hashes of pictures, and which of millions are nearly alike.

The hash is the 64-bit pHash of the lowest 8 x 8 frequencies, bit for bit that
of the ImageHash package, which would bring a wavelet library for 8 lines.
"""

import dataclasses
import itertools

import numpy as np
import scipy.fft
from jaxtyping import Int64, UInt8, UInt64
from PIL import Image
from scipy import sparse
from scipy.sparse import csgraph

# Side of the picture whose frequencies are taken, and how many of them.
SIDE, FREQUENCIES = 32, 8
# Bits in which the hashes of two encodings of one picture may differ.
DISTANCE = 4
MAX_DISTANCE = 6
# Neighbours in the order of a bucket that a hash is compared with.
MAX_NEIGHBOURS = 1024
# Links kept until they are merged into clusters.
_MAX_LINKS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Clusters:
  """Which hashes are linked, directly or through others.

  Attributes:
    labels: of each hash the first index of its cluster, its own if alone.
    complete: False when a bucket was too full to compare all with all.
  """

  labels: Int64[np.ndarray, ' n']
  complete: bool


def hash_pixels(pixels: UInt8[np.ndarray, 'H W 3']) -> int:
  """The 64-bit pHash: which low frequencies lie above their median.

  Bit 63 is the mean brightness, then row by row towards finer stripes.
  """
  image = Image.fromarray(pixels).convert('L')
  image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
  waves = scipy.fft.dctn(np.asarray(image, np.float64))
  low = waves[:FREQUENCIES, :FREQUENCIES]
  # A flat picture's frequencies are rounding errors around 0.
  bits = low > np.median(low) + 1e-6
  return int.from_bytes(np.packbits(bits).tobytes(), 'big')


def find_clusters(
  hashes: UInt64[np.ndarray, ' n'], *, distance: int = DISTANCE
) -> Clusters:
  """Links hashes that differ in at most `distance` bits.

  Cut into distance + 2 parts, two such hashes agree in two parts or more, so
  it is enough to compare within buckets of equal pairs of parts (Manku et
  al., 2007, 'Detecting near-duplicates for web crawling'). Near linear in n:
  15 sorts at distance 4, and at most MAX_NEIGHBOURS comparisons a hash in
  each. Raises ValueError for a distance beyond MAX_DISTANCE.
  """
  if not 0 <= distance <= MAX_DISTANCE:
    raise ValueError(
      f'distance {distance}: must be 0 to {MAX_DISTANCE} of 64 bits'
    )
  distinct, first, inverse = np.unique(
    np.asarray(hashes, np.uint64), return_index=True, return_inverse=True
  )
  links = _Links(len(distinct))
  complete = True
  for mask in _masks(distance + 2) if distance else ():
    complete &= _link_buckets(distinct, distinct & mask, distance, links)
  labels = links.labels()
  # `first` of a cluster: the smallest original index among its hashes.
  smallest = np.full(len(distinct), len(hashes), np.int64)
  np.minimum.at(smallest, labels, first)
  return Clusters(smallest[labels][inverse.reshape(-1)], complete)


def _masks(parts: int) -> list[np.uint64]:
  """One mask for each two of the parts of 64 bits."""
  edges = [round(i * 64 / parts) for i in range(parts + 1)]
  single = [(1 << b) - (1 << a) for a, b in itertools.pairwise(edges)]
  return [np.uint64(a | b) for a, b in itertools.combinations(single, 2)]


def _link_buckets(hashes, keys, distance, links) -> bool:
  """Compares within buckets of equal keys; False if one was too full."""
  # Alike hashes come together in a bucket that is too full.
  order = np.lexsort((hashes, keys))
  hashes, keys = hashes[order], keys[order]
  here = np.arange(len(hashes))
  for offset in range(1, MAX_NEIGHBOURS + 1):
    here = here[here + offset < len(hashes)]
    here = here[keys[here] == keys[here + offset]]
    if not here.size:
      return True
    bits = np.bitwise_count(hashes[here] ^ hashes[here + offset])
    near = here[bits <= distance]
    links.add(order[near], order[near + offset])
  return False


class _Links:
  """Connected components of links that may be more than fit in memory."""

  def __init__(self, count: int):
    self._count, self._kept, self._size = count, [], 0

  def add(self, left: np.ndarray, right: np.ndarray) -> None:
    """Links left[i] with right[i]."""
    if not left.size:
      return
    self._kept.append(np.stack([left, right]))
    self._size += left.size
    if self._size > _MAX_LINKS + self._count:
      # One link of each node to its cluster says as much.
      merged = np.stack([np.arange(self._count), self.labels()])
      self._kept = [merged[:, merged[0] != merged[1]]]
      self._size = self._kept[0].shape[1]

  def labels(self) -> Int64[np.ndarray, ' count']:
    """The first node of each node's component."""
    none = np.zeros((2, 0), np.int64)
    left, right = np.concatenate([none, *self._kept], axis=1)
    ones = np.ones(len(left), np.int8)
    shape = (self._count, self._count)
    graph = sparse.coo_array((ones, (left, right)), shape=shape)
    _, component = csgraph.connected_components(graph, directed=False)
    _, first, inverse = np.unique(
      component, return_index=True, return_inverse=True
    )
    return first[inverse.reshape(-1)].astype(np.int64)
