"""A small prepared folder, for the tests of the tools that read one."""

import hashlib
import io
import json

import numpy as np
import prepared_pairs
from PIL import Image

from dpo_jax.data import cached, records


def picture(seed, side=16, kind='PNG'):
  """Bytes of a smooth random picture."""
  coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
  image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
  buffer = io.BytesIO()
  image.save(buffer, kind)
  return buffer.getvalue()


def make_record(i, **changes):
  """Record i of pairs, both pictures its own."""
  caption = f'caption {i}'.encode()
  return {
    'id': i + 1,
    'caption': caption,
    'caption_id': cached.caption_id(caption),
    'source': b'made:0',
    'image_0': picture(2 * i),
    'image_1': picture(2 * i + 1),
    'sizes': np.array([[16, 16, 0, 0]] * 2, np.int32),
    'generator_0': b'x',
    'generator_1': b'y',
    'label': float(i % 2),
  } | changes


def write(folder, rows, *, kind='pairs', lengths=None, **options):
  """Writes one kind's shards, metadata and checksums; returns the folder."""
  lengths = lengths or [len(rows)]
  features = records.features(kind, **options)
  data = folder / kind / '1.0.0'
  data.mkdir(parents=True, exist_ok=True)
  rows = list(rows)
  left = iter(rows)
  for i, length in enumerate(lengths):
    name = f'{kind}-train.array_record-{i:05d}-of-{len(lengths):05d}'
    with records.ShardWriter(data / name, features) as writer:
      for _ in range(length):
        writer.write(next(left))
  records.write_metadata(folder, kind, features, {'train': lengths})
  prepared_pairs.write_split_hashes(folder, rows, kind)
  write_checksums(folder)
  return folder


def shards(folder, kind='pairs'):
  """The shards of a kind, in order."""
  return sorted((folder / kind / '1.0.0').glob('*.array_record*'))


def write_checksums(folder):
  """Writes checksums.json of all that is there."""
  sums = {}
  for kind in ('captions', 'likes', 'pairs'):
    for path in shards(folder, kind):
      data = path.read_bytes()
      sums[path.relative_to(folder).as_posix()] = {
        'bytes': len(data),
        'sha256': hashlib.sha256(data).hexdigest(),
      }
  (folder / 'checksums.json').write_text(json.dumps(sums))
