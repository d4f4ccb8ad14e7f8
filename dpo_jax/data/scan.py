"""One pass over a prepared data set, kept as columns of numbers.

About 90 bytes a pair whatever the pictures' size: keys (64-bit hashes) stand
for captions and pictures.
"""

import concurrent.futures
import dataclasses
import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt64

from dpo_jax.data import images as images_lib
from dpo_jax.data import perceptual
from dpo_jax.data import records as records_lib

# The pictures of an example, by kind of data set.
SIDES = {'pairs': ('image_0', 'image_1'), 'likes': ('image',)}
LABELS = {'pairs': 'label', 'likes': 'liked'}
# Records in memory at once.
CHUNK = 64
# Failures that are listed; all are counted.
LISTED = 100


@dataclasses.dataclass(frozen=True)
class Failure:
  """A record, or one picture of it, that cannot be used."""

  index: int
  reason: str


@dataclasses.dataclass
class Columns:
  """One entry a record; s pictures a record (2 of pairs, 1 of likes).

  Attributes:
    read: whether the record could be read; other columns hold 0 if not.
    captions, prompts: keys of the caption as it is, and normalised.
    labels: probability that image 0 is preferred, or that it is liked.
    sizes: (height, width) as displayed, from the record.
    generators: index into `names`.
    images: keys of the encoded pictures, of their latents where pictures
      are not kept; 0 where neither is there.
    present: whether the record holds the encoded picture.
    hashes, hashed: perceptual hashes, and whether there is one: a picture
      that is present and not hashed cannot be decoded.
    failures: the first LISTED; `failed` counts them all.
  """

  read: Bool[np.ndarray, ' n']
  ids: UInt64[np.ndarray, ' n']
  captions: UInt64[np.ndarray, ' n']
  prompts: UInt64[np.ndarray, ' n']
  labels: Float32[np.ndarray, ' n']
  sizes: Int32[np.ndarray, 'n s 2']
  generators: Int32[np.ndarray, 'n s']
  images: UInt64[np.ndarray, 'n s']
  present: Bool[np.ndarray, 'n s']
  hashes: UInt64[np.ndarray, 'n s']
  hashed: Bool[np.ndarray, 'n s']
  names: list[str]
  failures: list[Failure]
  failed: int = 0

  @classmethod
  def empty(cls, count: int, sides: int):
    """Columns of zeros."""
    return cls(
      read=np.zeros(count, bool),
      ids=np.zeros(count, np.uint64),
      captions=np.zeros(count, np.uint64),
      prompts=np.zeros(count, np.uint64),
      labels=np.zeros(count, np.float32),
      sizes=np.zeros((count, sides, 2), np.int32),
      generators=np.zeros((count, sides), np.int32),
      images=np.zeros((count, sides), np.uint64),
      present=np.zeros((count, sides), bool),
      hashes=np.zeros((count, sides), np.uint64),
      hashed=np.zeros((count, sides), bool),
      names=[],
      failures=[],
    )

  def fail(self, index: int, reason: str) -> None:
    """Counts a failure, and lists the first."""
    self.failed += 1
    if len(self.failures) < LISTED:
      self.failures.append(Failure(index, reason))


def key(text: str | bytes) -> int:
  """A 64-bit hash of a text or bytes, equal on every machine."""
  if isinstance(text, str):
    text = text.encode('utf-8', 'surrogatepass')
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'big')


def normalise(prompt: str) -> str:
  """The prompt without differences of case, spaces and Unicode's spelling."""
  return ' '.join(unicodedata.normalize('NFKC', prompt).casefold().split())


def text(value: str | bytes) -> str:
  """A text feature's value."""
  return value if isinstance(value, str) else value.decode('utf-8', 'replace')


def scan(
  records: Sequence[dict[str, Any]],
  *,
  kind: str = 'pairs',
  threads: int = 2,
  on_progress: Callable[[int], None] = lambda done: None,
  on_captions: Callable[[list[str]], None] | None = None,
) -> Columns:
  """Reads every record once and decodes every picture.

  on_progress: called with the number of records done. on_captions: called
  with captions, each distinct one once (keeps a set of their keys). Records
  and pictures that cannot be read are counted and left out.
  """
  sides = SIDES[kind]
  columns = Columns.empty(len(records), len(sides))
  names: dict[str, int] = {}
  seen: set[int] = set()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for start in range(0, len(records), CHUNK):
      chunk = range(start, min(start + CHUNK, len(records)))
      found = [(i, _read(records, i, columns)) for i in chunk]
      found = [(i, record) for i, record in found if record is not None]
      pictures = pool.map(_hash_pictures, _pictures(found, sides))
      fresh = []
      for i, record in found:
        caption = text(record['caption'])
        _fill(columns, i, record, caption, kind, names)
        for side in range(len(sides)):
          _fill_picture(columns, i, side, record, next(pictures), kind)
        if on_captions and columns.captions[i].item() not in seen:
          seen.add(columns.captions[i].item())
          fresh.append(caption)
      if fresh:
        on_captions(fresh)
      on_progress(chunk.stop)
  columns.names = list(names)
  return columns


def _read(records, index, columns):
  try:
    return records[index]
  except records_lib.DamagedRecordError as error:
    columns.fail(index, str(error))
    return None


def _pictures(found, sides) -> Iterable[bytes]:
  return [record.get(side) or b'' for _, record in found for side in sides]


def _hash_pictures(data: bytes) -> int | str | None:
  """The perceptual hash, None without a picture, or why there is none."""
  if not data:
    return None
  try:
    return perceptual.hash_pixels(images_lib.decode(data))
  except ValueError as error:
    return str(error)


def _fill(columns, i, record, caption, kind, names):
  columns.read[i] = True
  columns.ids[i] = record['id']
  columns.captions[i] = key(caption)
  columns.prompts[i] = key(normalise(caption))
  columns.labels[i] = record[LABELS[kind]]
  single = kind == 'likes'
  sizes = np.asarray(record['size' if single else 'sizes']).reshape(-1, 4)
  columns.sizes[i] = sizes[:, :2]
  keys = ['generator'] if single else ['generator_0', 'generator_1']
  for side, name in enumerate(keys):
    generator = text(record[name])
    columns.generators[i, side] = names.setdefault(generator, len(names))


def _fill_picture(columns, i, side, record, outcome, kind):
  data = record.get(SIDES[kind][side])
  if data:
    columns.images[i, side] = key(data)
    columns.present[i, side] = True
  elif record.get('moments') is not None:
    latents = np.asarray(record['moments']).reshape(columns.images.shape[1], -1)
    columns.images[i, side] = key(latents[side].tobytes())
  if isinstance(outcome, str):
    columns.fail(i, f'{SIDES[kind][side]}: {outcome}')
  elif outcome is not None:
    columns.hashes[i, side] = outcome
    columns.hashed[i, side] = True
