"""What tools.generate draws from: entries, prompts, noise and start images."""

import pathlib
import zlib

import numpy as np

from dpo_jax import distributed
from dpo_jax.data import images as images_lib
from dpo_jax.evaluate import generate
from dpo_jax.evaluate import prompts as prompts_lib

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')


def make_entries(prompts: list[prompts_lib.Prompt], values) -> list[dict]:
  """One entry a picture, in order; `seed` is what its noise hangs on."""
  entries = []
  for prompt in prompts:
    for i in range(values.images_per_prompt):
      number = zlib.crc32(f'{prompt.id}/{i}'.encode())
      if prompt.seed is not None:
        number = (prompt.seed + i) % 2**32
      entries.append(
        {
          'file': f'{prompt.id}_{i}.png',
          'id': prompt.id,
          'image': i,
          'prompt': prompt.text,
          'negative_prompt': (
            values.negative_prompt
            if prompt.negative is None
            else prompt.negative
          ),
          'seed': number,
        }
      )
  return entries


def read(values, opened, refiner, prompts, entries, settings):
  """Arrays [n ...] of make_sample_fn's batch."""
  texts = [entry['prompt'] for entry in entries]
  negative = [entry['negative_prompt'] for entry in entries]
  cut = opened.tokenizers.encode([prompt.text for prompt in prompts])[1]
  if cut:
    distributed.say(
      f'{cut} of {len(prompts)} prompts are longer than the text encoder '
      'takes; their ends are cut off',
    )
  inputs = generate.prompt_batch(
    opened.model, opened.tokenizers.encode, texts, negative
  )
  if refiner:
    second = generate.prompt_batch(
      refiner.model, refiner.tokenizers.encode, texts, negative
    )
    inputs |= {f'refiner_{name}': array for name, array in second.items()}
  shape = opened.model.latent_shape(settings.size)
  if values.latents:
    inputs['noise'] = _read_latents(values.latents, len(entries), shape)
  if values.init_images:
    inputs['images'] = np.stack(
      [
        _read_image(values.init_images, entry['id'], settings.size)
        for entry in entries
      ]
    )
  return inputs


def _read_latents(path: str, n: int, shape: tuple) -> np.ndarray:
  try:
    noise = np.load(path, allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise ValueError(f'--latents={path}: not a .npy array: {error}') from error
  if noise.shape not in ((n, *shape), (1, *shape)):
    raise ValueError(
      f'--latents={path} has shape {noise.shape}; give {(n, *shape)} '
      f'(pictures, height, width, channels) or {(1, *shape)}'
    )
  if noise.dtype.kind != 'f' or not np.isfinite(noise).all():
    raise ValueError(f'--latents={path}: must hold finite floats')
  return np.broadcast_to(noise, (n, *shape)).astype(np.float32)


def _read_image(folder: str, name: str, size: tuple[int, int]) -> np.ndarray:
  """The picture of a prompt, scaled to cover `size` and cut to its middle."""
  paths = [pathlib.Path(folder) / f'{name}{s}' for s in IMAGE_SUFFIXES]
  path = next((path for path in paths if path.is_file()), None)
  if path is None:
    raise ValueError(
      f'--init_images={folder}: no picture {name} with suffix '
      + ', '.join(IMAGE_SUFFIXES)
    )
  try:
    pixels = images_lib.decode(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  return images_lib.cover(pixels, size)
