"""Peak memory of loading full-size models, against their largest file.

  python -m benchmarks.load_memory --family=sd15|sdxl [--folder=TMP]

Writes a random pipeline (float32, then float16) into a temporary folder, one
file a component, and loads it in a fresh process each time: the UNet alone and
all components, as NumPy arrays and straight onto the first device. Prints one
table: bytes of the UNet's file, which is the largest; the process's peak
resident memory in all (JAX and Python included); their ratio; seconds. On a CPU
the device's memory is the host's. SDXL takes 21 GB of disk, as the second
pipeline replaces the first when it is whole, and 15 GB of memory.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from dpo_jax.weights import diffusers_maps, pipeline, released

FAMILIES = {'sd15': 'sd1', 'sdxl': 'sdxl'}
HALF = 'the rest bfloat16'
# Dtype of the files; what is loaded; dtype of the parameters.
CASES = (
  ('float32', 'unet', 'float32'),
  ('float32', 'unet', 'bfloat16'),
  ('float32', 'all', 'float32'),
  ('float32', 'all', 'unet float32'),
  ('float16', 'unet', 'float16'),
  ('float16', 'unet', 'float32'),
  ('float16', 'all', 'float16'),
)
PLACES = ('numpy', 'device')


class _RandomLeaf:
  """A leaf whose values are drawn when they are written."""

  def __init__(self, shape: tuple[int, ...], seed: int) -> None:
    self.shape, self.ndim, self.seed = shape, len(shape), seed
    self.dtype = np.dtype(np.float32)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    rng = np.random.default_rng(self.seed)
    return 0.02 * rng.standard_normal(self.shape, dtype=np.float32)


def _random_params(name: str, config: dict) -> dict:
  component = diffusers_maps.COMPONENTS[name]
  shapes = component.init_shapes(component.make_config(config))
  leaves, structure = jax.tree.flatten(shapes)
  drawn = [_RandomLeaf(leaf.shape, i) for i, leaf in enumerate(leaves)]
  return jax.tree.unflatten(structure, drawn)


def _write(folder: pathlib.Path, family: str, dtype: str) -> int:
  """Bytes of the UNet's file."""
  tokenizer = folder / 'vocabulary'
  tokenizer.mkdir(exist_ok=True)
  for name in ('vocab.json', 'merges.txt'):
    (tokenizer / name).touch()
  family = FAMILIES[family]
  configs = released.model_configs(family, 'epsilon')
  names = ('tokenizer_dir', 'tokenizer_2_dir')
  pipeline.create(
    folder / 'model',
    **configs,
    class_name=released.CLASS_NAMES[family],
    scheduler=released.scheduler_config(family, 'epsilon'),
    params={name: _random_params(name, c) for name, c in configs.items()},
    dtype=dtype,
    **dict.fromkeys(names[: len(configs) - 2], tokenizer),
  )
  path = folder / 'model' / 'unet' / 'diffusion_pytorch_model.safetensors'
  return path.stat().st_size


def _load(folder: str, parts: str, dtype: str, place: str) -> None:
  """In a process of its own: loads and prints [seconds, peak bytes]."""
  started = time.monotonic()
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  others = [name for name in diffusers_maps.COMPONENTS if name != 'unet']
  if dtype == 'unet float32':
    dtype = dict.fromkeys(others, 'bfloat16')
  loaded = pipeline.load(
    folder,
    without=others if parts == 'unet' else (),
    dtype=dtype,
    place=lambda name, shapes: (
      jax.tree.map(lambda _: device, shapes) if place == 'device' else None
    ),
  )
  jax.block_until_ready(loaded.params)
  seconds = time.monotonic() - started
  # Not ru_maxrss, which begins at the peak of the process that forked.
  status = pathlib.Path('/proc/self/status').read_text().splitlines()
  (peak,) = (line.split()[1] for line in status if line.startswith('VmHWM:'))
  print(json.dumps([seconds, int(peak) * 1024]))


def _measure(
  folder: pathlib.Path, parts: str, dtype: str, place: str
) -> list[float]:
  words = (f'--load={folder}', f'--parts={parts}', f'--dtype={dtype}')
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'benchmarks.load_memory',
      *words,
      f'--place={place}',
    ],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
  """Prints the table; returns 2 with one line for bad input."""
  flags = dict(word.removeprefix('--').partition('=')[::2] for word in argv)
  if 'load' in flags:
    _load(flags['load'], flags['parts'], flags['dtype'], flags['place'])
    return 0
  family = flags.get('family', '')
  if family not in FAMILIES or flags.keys() - {'family', 'folder'}:
    print(f'error: give --family={"|".join(FAMILIES)}', file=sys.stderr)
    return 2
  head = 'model', 'loaded', 'file', 'parameters', 'place'
  head += 'largest file GB', 'peak GB', 'ratio', 's'
  print(f'| {" | ".join(head)} |\n|{"---|" * len(head)}')
  with tempfile.TemporaryDirectory(dir=flags.get('folder')) as name:
    folder, written, size = pathlib.Path(name), '', 0
    for stored, parts, dtype in CASES:
      if stored != written:
        size, written = _write(folder, family, stored), stored
      for place in PLACES:
        seconds, peak = _measure(folder / 'model', parts, dtype, place)
        shown = f'{dtype}, {HALF}' if ' ' in dtype else dtype
        print(
          f'| {family} | {parts} | {stored} | {shown} | {place} |'
          f' {size / 1e9:.2f} | {peak / 1e9:.2f} | {peak / size:.2f} |'
          f' {seconds:.0f} |',
          flush=True,
        )
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
