"""Rates of the loader over records, beside PyTorch's DataLoader.

Used by benchmarks/data.py. Both sides read the same examples from files in
the page cache, shuffled, in batches of BATCH: ours from a prepared folder; the
peer, a torch Dataset with two workers, from a parquet file through `datasets`
where that is installed, and else through pyarrow's table of the file.
"""

import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from dpo_jax.data import (
  cached,
  loader,
  record_fields,
  record_loader,
  records,
  side_files,
)

BATCH, SECONDS, WORKERS = 64, 6.0, 2
CACHED_PAIRS, PICTURE_PAIRS, PAIRS_A_CAPTION = 4096, 768, 16
SHAPES = record_fields.CacheShapes(
  moments=(1, 64, 64, 8), input_ids=(1, 77), prompt_embeds=(77, 768)
)


class Tokens:
  """Stands for a tokenizer, which the peer has none of either."""

  def encode(self, captions):
    """Zeros."""
    return np.zeros((len(captions), 1, 77), np.int32), 0


class Rate(NamedTuple):
  """Pairs a second, and milliseconds of processor time a pair.

  The latter hangs less on what else the machine does.
  """

  pairs: float
  milliseconds: float


def rate(batches: Iterator) -> tuple[float, int]:
  """Pairs a second after a first few batches, and the pairs in all."""
  for _ in range(4):
    next(batches)
  started, count = time.monotonic(), 0
  while time.monotonic() < started + SECONDS:
    next(batches)
    count += BATCH
  return count / (time.monotonic() - started), count + 4 * BATCH


def _processor_seconds() -> float:
  """Of this process and of the children that have ended."""
  times = os.times()
  return sum(times[:4])


def write_cached(root: pathlib.Path) -> pathlib.Path:
  """A folder of latents and text states of random numbers, and a parquet."""
  rng = np.random.default_rng(0)
  fields = records.features('pairs', cache=SHAPES)
  texts = [f'caption {i}' for i in range(CACHED_PAIRS // PAIRS_A_CAPTION)]
  ids = {cached.caption_id(text): text for text in ('', *texts)}
  pool = rng.normal(size=(64, 2, *SHAPES.moments)).astype(np.float16)
  columns = {'moments': [], 'prompt_embeds': []}
  states = {}
  with records.ShardWriter(
    _shard(root, 'captions'), records.features('captions', cache=SHAPES)
  ) as writer:
    for number in sorted(ids):
      states[number] = rng.normal(size=SHAPES.prompt_embeds).astype(np.float16)
      writer.write(
        {
          'caption_id': number,
          'caption': ids[number].encode(),
          'input_ids': np.zeros(SHAPES.input_ids, np.int32),
          'prompt_embeds': states[number],
        }
      )
  with records.ShardWriter(_shard(root, 'pairs'), fields) as writer:
    for i in range(CACHED_PAIRS):
      text = texts[i % len(texts)]
      number = cached.caption_id(text)
      record = _pair(i, text) | {'moments': pool[i % len(pool)]}
      writer.write(record)
      columns['moments'].append(record['moments'].tobytes())
      columns['prompt_embeds'].append(states[number].tobytes())
  for kind, count in (('pairs', CACHED_PAIRS), ('captions', len(ids))):
    features = records.features(kind, cache=SHAPES)
    records.write_metadata(root, kind, features, {'train': [count]})
  side_files.write_index(root / cached.INDEX, np.array(sorted(ids), np.uint64))
  description = cached.Description(
    model={}, weights={}, size=512, flips=1, keep_images=False,
    compute_dtype='float32', versions={},
  )  # fmt: skip
  (root / cached.NAME).write_text(json.dumps(description.to_json()))
  parquet.write_table(
    pa.table(columns), root / 'peer.parquet', row_group_size=256
  )
  return root


def write_pictures(root: pathlib.Path, jpegs: list[bytes]) -> pathlib.Path:
  """A folder of JPEGs, and a parquet file of the same."""
  columns = {'jpg_0': [], 'jpg_1': []}
  with records.ShardWriter(
    _shard(root, 'pairs'), records.features('pairs')
  ) as writer:
    for i in range(PICTURE_PAIRS):
      record = _pair(i, f'caption {i}')
      for side in (0, 1):
        record[f'image_{side}'] = jpegs[(2 * i + side) % len(jpegs)]
        columns[f'jpg_{side}'].append(record[f'image_{side}'])
      writer.write(record)
  records.write_metadata(
    root, 'pairs', records.features('pairs'), {'train': [PICTURE_PAIRS]}
  )
  parquet.write_table(
    pa.table(columns), root / 'peer.parquet', row_group_size=256
  )
  return root


def _shard(root: pathlib.Path, kind: str) -> pathlib.Path:
  folder = root / kind / '1.0.0'
  folder.mkdir(parents=True)
  return folder / f'{kind}-train.array_record-00000-of-00001'


def _pair(i: int, caption: str) -> dict:
  return {
    'id': i,
    'caption': caption.encode(),
    'caption_id': cached.caption_id(caption),
    'source': b'',
    'image_0': b'',
    'image_1': b'',
    'sizes': np.array([[512, 512, 0, 0]] * 2, np.int32),
    'generator_0': b'',
    'generator_1': b'',
    'label': 1.0,
  }


def our_rate(root: pathlib.Path, *, flip: bool) -> Rate:
  """The rate of make_record_loader."""
  before = _processor_seconds()
  batches: loader.BatchIterator = record_loader.make_record_loader(
    record_loader.open_source(root),
    Tokens(),
    batch_size=BATCH,
    seed=0,
    resolution=512,
    random_crop=False,
    flip=flip,
  )
  pairs, count = rate(batches)
  batches.close()
  return Rate(pairs, 1e3 * (_processor_seconds() - before) / count)


@dataclasses.dataclass
class PeerDataset:
  """A map-style torch dataset over a parquet file, opened in each worker."""

  path: str
  make: Callable
  rows: object = None

  def __len__(self) -> int:
    """Rows of the file."""
    return parquet.ParquetFile(self.path).metadata.num_rows

  def __getitem__(self, index: int):
    """The example of a row."""
    if self.rows is None:
      self.rows = open_rows(self.path)
    return self.make(self.rows(index))


def open_rows(path: str) -> Callable[[int], dict]:
  """A function from an index to the row's columns."""
  if importlib.util.find_spec('datasets'):
    import datasets

    found = datasets.Dataset.from_parquet(
      path, cache_dir=f'{path}.datasets', keep_in_memory=False
    )
    return lambda index: found[index]
  table = parquet.read_table(path)
  columns = {name: table[name] for name in table.column_names}
  return lambda index: {
    name: column[index].as_py() for name, column in columns.items()
  }


def make_cached(row: dict) -> dict:
  """Tensors of a row of latents and text states."""
  import torch

  shapes = {'moments': (2, *SHAPES.moments), 'prompt_embeds': (77, 768)}
  return {
    name: torch.frombuffer(bytearray(row[name]), dtype=torch.float16).reshape(
      shape
    )
    for name, shape in shapes.items()
  }


def make_pictures(row: dict) -> dict:
  """Both pictures of a row, decoded, as uint8."""
  import torch

  pictures = [
    np.asarray(Image.open(io.BytesIO(row[f'jpg_{side}'])).convert('RGB'))
    for side in (0, 1)
  ]
  pixels = np.stack(pictures)
  if np.random.default_rng().random() < 0.5:
    pixels = np.ascontiguousarray(pixels[:, :, ::-1])
  return {'images': torch.from_numpy(pixels)}


def peer_rate(path: pathlib.Path, make: Callable) -> Rate | None:
  """The rate of torch's DataLoader; None where there is no torch."""
  if not importlib.util.find_spec('torch'):
    return None
  import torch

  if importlib.util.find_spec('datasets'):
    # Its own copy of the file is made once, before the workers.
    open_rows(str(path))
  data = torch.utils.data.DataLoader(
    PeerDataset(str(path), make),
    batch_size=BATCH,
    shuffle=True,
    num_workers=WORKERS,
    persistent_workers=True,
    drop_last=True,
  )

  def endless():
    while True:
      yield from data

  before = _processor_seconds()
  batches = endless()
  pairs, count = rate(batches)
  # Ends the workers, whose time counts only then.
  batches.close()
  data._iterator = None
  return Rate(pairs, 1e3 * (_processor_seconds() - before) / count)


def peer_name() -> str:
  """How the peer reads its file."""
  way = 'datasets' if importlib.util.find_spec('datasets') else 'pyarrow'
  return f'torch DataLoader, {WORKERS} workers over {way}'


def file_rate(root: pathlib.Path) -> float:
  """Gigabytes a second of reading the shards' records, and nothing else."""
  source = record_loader.open_source(root).records
  started, total = time.monotonic(), 0
  for index in np.random.default_rng(0).permutation(len(source)):
    total += len(source.read_bytes(int(index)))
  return total / 1e9 / (time.monotonic() - started)
