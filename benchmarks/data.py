"""Rates and memory of the data's way: preparing, loading.

  python -m benchmarks.data [--parts=prepare,cached,pictures] [--gb=5]

Prints one table. `prepare` writes a parquet file of about --gb gigabytes in
Pick-a-Pic's columns, pairs of 512-pixel JPEGs of about 85 kB in row groups of
1000, and prepares it in a process of its own, every image decoded; its peak
resident memory (Python and JAX included) is taken ten times a second. Beside
it stands what decoding alone reaches in the same minutes on the same cores.
`cached` and `pictures` are the loader over records; see data_loading.
"""

import argparse
import concurrent.futures
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from benchmarks import data_loading
from dpo_jax.data import images

SIDE, DISTINCT, GROUP = 512, 64, 1000
DECODED = 600


class Row(NamedTuple):
  """One line of the table."""

  part: str
  what: str
  value: str
  goal: str = ''


def make_jpegs(count: int = DISTINCT, side: int = SIDE) -> list[bytes]:
  """JPEGs with about the bytes of photographs of this size."""
  rng = np.random.default_rng(0)
  made = []
  for _ in range(count):
    coarse = rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.BICUBIC)
    noise = rng.normal(0, 9, (side, side, 3))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'JPEG', quality=88)
    made.append(buffer.getvalue())
  return made


def write_parquet(path: pathlib.Path, size: int) -> int:
  """Writes about `size` bytes of pairs; returns their number."""
  jpegs = make_jpegs()
  names = {'caption': pa.string(), 'has_label': pa.bool_()}
  for side in (0, 1):
    names |= {
      f'image_{side}_uid': pa.string(),
      f'jpg_{side}': pa.binary(),
      f'label_{side}': pa.float64(),
      f'model_{side}': pa.string(),
    }
  schema = pa.schema(list(names.items()))
  count = size // (2 * sum(map(len, jpegs)) // len(jpegs))
  with parquet.ParquetWriter(path, schema) as writer:
    for start in range(0, count, GROUP):
      rows = []
      for i in range(start, min(start + GROUP, count)):
        row = {'caption': f'a picture of thing {i // 4}', 'has_label': True}
        for side in (0, 1):
          # Bytes after the end of a JPEG make it another one.
          data = jpegs[(2 * i + side) % DISTINCT] + i.to_bytes(4, 'big')
          row |= {
            f'image_{side}_uid': f'{side}-{i}',
            f'jpg_{side}': data,
            f'label_{side}': float((i + side) % 2),
            f'model_{side}': 'sdxl',
          }
        rows.append(row)
      table = pa.Table.from_pylist(rows, schema=schema)
      writer.write_table(table, row_group_size=GROUP)
  return count


def decode_rate(threads: int) -> float:
  """Pairs a second that `threads` threads decode, and do nothing else."""
  jpegs = make_jpegs(8)
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    started = time.monotonic()
    for _ in pool.map(images.decode, jpegs * (DECODED // len(jpegs))):
      pass
    return DECODED / 2 / (time.monotonic() - started)


def measure_prepare(folder: pathlib.Path, size: int) -> list[Row]:
  """The rate of tools.prepare and its memory, over a source of `size`."""
  source, out = folder / 'source.parquet', folder / 'out'
  count = write_parquet(source, size)
  before = decode_rate(os.cpu_count())
  command = [sys.executable, '-m', 'dpo_jax.tools.prepare']
  flags = [f'--source={source}', f'--out={out}', '--format=pickapic']
  started = time.monotonic()
  process = subprocess.Popen([*command, *flags], stderr=subprocess.DEVNULL)
  memory, first, spent = [], None, [0.0, 0.0]
  while process.poll() is None:
    # Importing and the check of all labels are not the rate's.
    if first is None and (folder / 'out.incomplete').exists():
      first, spent[0] = time.monotonic(), _processor(process.pid)
    spent[1] = _processor(process.pid) or spent[1]
    memory.append(_resident(process.pid))
    time.sleep(0.1)
  ended = time.monotonic()
  if process.returncode or first is None:
    raise RuntimeError(f'prepare ended with {process.returncode}')
  after = decode_rate(os.cpu_count())
  third = len(memory) // 3
  return [
    Row('prepare', f'{count} pairs, {source.stat().st_size / 1e9:.2f} GB', ''),
    Row('prepare', 'pairs/s', f'{count / (ended - first):.0f}', '300'),
    Row(
      'prepare',
      'processor ms a pair',
      f'{1e3 * (spent[1] - spent[0]) / count:.2f}',
      f'< {1e3 * os.cpu_count() / 300:.2f}',
    ),
    Row('prepare', 'seconds in all', f'{ended - started:.1f}'),
    Row('prepare', 'peak memory, MB', f'{max(memory) / 1e6:.0f}', '< 1000'),
    Row(
      'prepare',
      'peak by thirds of the time, MB',
      ', '.join(
        f'{max(part, default=0) / 1e6:.0f}'
        for part in (memory[:third], memory[third:-third], memory[-third:])
      ),
      'flat',
    ),
    Row(
      'prepare',
      f'decoding alone, pairs/s, {os.cpu_count()} threads, before and after',
      f'{before:.0f}, {after:.0f}',
    ),
  ]


def _resident(pid: int) -> int:
  """Resident bytes of a process, 0 once it is gone."""
  try:
    fields = pathlib.Path(f'/proc/{pid}/statm').read_text().split()
  except (OSError, ValueError):
    return 0
  return int(fields[1]) * os.sysconf('SC_PAGE_SIZE') if fields else 0


def measure_cached(folder: pathlib.Path, size: int) -> list[Row]:
  """Latents of 512-pixel pictures and text states of Stable Diffusion 1.5."""
  del size
  root = data_loading.write_cached(folder)
  rows = _beside('cached', '4000', root, data_loading.make_cached, flip=False)
  raw = data_loading.file_rate(root)
  return [*rows, Row('cached', 'records alone, one thread, GB/s', f'{raw:.2f}')]


def measure_pictures(folder: pathlib.Path, size: int) -> list[Row]:
  """Pairs of 512-pixel JPEGs, decoded."""
  del size
  root = data_loading.write_pictures(folder, make_jpegs())
  threads = os.cpu_count()
  before = decode_rate(threads)
  rows = _beside('pictures', '400', root, data_loading.make_pictures, flip=True)
  name = f'decoding alone, pairs/s, {threads} threads, before and after'
  both = f'{before:.0f}, {decode_rate(threads):.0f}'
  return [*rows, Row('pictures', name, both)]


def _beside(part, goal, root, make, *, flip) -> list[Row]:
  """Our loader twice, the peer twice, taking turns."""
  ours, peers = [], []
  for _ in range(2):
    ours.append(data_loading.our_rate(root, flip=flip))
    peers.append(data_loading.peer_rate(root / 'peer.parquet', make))
  rows = []
  name = data_loading.peer_name()
  for who, found, wanted in (('ours', ours, goal), (name, peers, '')):
    if None in found:
      rows.append(Row(part, who, 'torch is not there'))
      continue
    pairs = ', '.join(f'{rate.pairs:.0f}' for rate in found)
    times = ', '.join(f'{rate.milliseconds:.2f}' for rate in found)
    rows.append(Row(part, f'{who}: pairs/s, in turns', pairs, wanted))
    rows.append(Row(part, f'{who}: processor ms a pair', times))
  return rows


def _processor(pid: int) -> float:
  """Seconds of processor time that a process has had, 0 once it is gone."""
  try:
    text = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return 0.0
  # User and system time are fields 14 and 15; the name may hold blanks.
  fields = text.rpartition(')')[2].split()
  return sum(map(int, fields[11:13])) / os.sysconf('SC_CLK_TCK')


PARTS = {
  'prepare': measure_prepare,
  'cached': measure_cached,
  'pictures': measure_pictures,
}


def main() -> None:
  """Measures the parts and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--parts', default=','.join(PARTS))
  parser.add_argument('--gb', type=float, default=5.0)
  parser.add_argument('--folder', help='a disk with room for twice that')
  values = parser.parse_args()
  rows = []
  for part in values.parts.split(','):
    with tempfile.TemporaryDirectory(dir=values.folder) as folder:
      rows += PARTS[part](pathlib.Path(folder), int(values.gb * 1e9))
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  print(f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}')
  for row in rows:
    cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    print('  '.join(cells).rstrip())


if __name__ == '__main__':
  main()
