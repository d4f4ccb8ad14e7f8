"""Latents of records' pictures and text states of captions, in batches."""

import concurrent.futures
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import sharding, trees, types
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.data import cached, record_fields, records, threads
from dpo_jax.data import images as images_lib
from dpo_jax.data import tokenizer as tokenizer_lib

# Threads that decode pictures while the device computes.
THREADS = 2
DTYPE = cached.POSTERIOR_DTYPE
_SIDES = {'pairs': ('image_0', 'image_1'), 'likes': ('image',)}


class LatentMaker:
  """Reads records and computes the posterior of their pictures."""

  def __init__(
    self,
    model: sd_lib.StableDiffusion,
    vae_params: types.Params,
    *,
    mesh: jax.sharding.Mesh,
    kind: str,
    size: int,
    flips: int,
    keep_images: bool,
  ):
    """`size`: side of the square cut from the middle; `flips`: 1, or 2."""
    threads.keep_freed_memory()
    self._params, self._mesh = vae_params, mesh
    self._size, self._flips, self._keep = size, flips, keep_images
    self._sides = _SIDES[kind]
    self._field = 'sizes' if kind == 'pairs' else 'size'
    self._encode = jax.jit(
      functools.partial(_encode_posterior, model),
      out_shardings=sharding.batch_sharding(mesh),
    )

  def batches(
    self, source: records.Records, rows: Sequence[int], batch_size: int
  ) -> Iterator[list[record_fields.Record]]:
    """The records at `rows` with their latents, a batch of them at a time."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      waiting = []
      for start in (*range(0, len(rows), batch_size), None):
        ready = waiting
        if start is not None:
          some = rows[start : start + batch_size]
          waiting = [pool.submit(self._read, source, row) for row in some]
        if ready:
          yield self._finish([future.result() for future in ready], batch_size)

  def _read(self, source, row) -> tuple[dict, np.ndarray, str]:
    """(record, its pictures uint8 [p f H W 3], which record it is)."""
    record, size = dict(source[row]), self._size
    plain, images = images_lib.Augmentation(), []
    sizes = np.reshape(record[self._field], (-1, 4)).copy()
    for side, name in enumerate(self._sides):
      try:
        picture = images_lib.decode(record[name])
      except ValueError as error:
        raise ValueError(
          f'{source.folder}: record {row}, {name}: {error}; prepare the folder '
          'again'
        ) from error
      resized = images_lib.resize_shorter(picture, size)
      cut = images_lib.crop_flip(resized, size, plain)
      images.append([cut, cut[:, ::-1]][: self._flips])
      sizes[side, 2:] = images_lib.crop_place(*resized.shape[:2], size, plain)
      if not self._keep:
        record[name] = b''
    record[self._field] = sizes.reshape(record[self._field].shape)
    return record, np.array(images), f'{source.folder}: record {row}'

  def _finish(self, read, batch_size) -> list[record_fields.Record]:
    images = np.stack([images for _, images, _ in read])
    moments = _on_devices(
      lambda placed: self._encode(self._params, placed['images']),
      {'images': images},
      batch_size,
      self._mesh,
    )
    made = []
    for (record, _, place), values in zip(read, moments, strict=True):
      _check_finite(place, 'latents', values)
      # Of a single picture there is no axis over the sides.
      values = values if len(self._sides) > 1 else values[0]
      made.append(record | {'moments': values})
    return made


class TextMaker:
  """Computes the text states of captions."""

  def __init__(
    self,
    model: sd_lib.StableDiffusion,
    params: Mapping[str, types.Params],
    tokenizers: tokenizer_lib.Tokenizers,
    *,
    mesh: jax.sharding.Mesh,
  ):
    """`params`: those of the text encoders, and others."""
    self._params = {name: params[name] for name in model.text_encoders}
    self._tokenizers, self._mesh = tokenizers, mesh

    def encode(params, ids):
      return trees.cast_floats(model.encode_text(params, ids), DTYPE)

    self._encode = jax.jit(encode, out_shardings=sharding.batch_sharding(mesh))

  def __call__(
    self, ids: np.ndarray, captions: Sequence[str], batch_size: int
  ) -> Iterator[record_fields.Record]:
    """Records of the captions."""
    tokens = self._tokenizers.encode(captions)[0]
    states = _on_devices(
      lambda placed: self._encode(self._params, placed['input_ids']),
      {'input_ids': tokens},
      batch_size,
      self._mesh,
    )
    for i, (key, caption) in enumerate(zip(ids, captions, strict=True)):
      for name, values in states.items():
        _check_finite(f'caption {caption!a:.80}', name, values[i])
      yield {
        'caption_id': key,
        'caption': caption.encode('utf-8', 'replace'),
        'input_ids': tokens[i],
        **{name: values[i] for name, values in states.items()},
      }


def _encode_posterior(
  model: sd_lib.StableDiffusion, params: types.Params, images: jax.Array
) -> jax.Array:
  """float16 [b p f h w 2c], mean before logvar, of uint8 [b p f H W 3]."""
  flat = sd_lib.to_float(images).reshape((-1, *images.shape[3:]))
  moments = jnp.concatenate(model.encode_posterior(params, flat), axis=-1)
  moments = moments.astype(DTYPE)
  return moments.reshape((*images.shape[:3], *moments.shape[1:]))


def _on_devices(compute, batch, batch_size: int, mesh) -> types.PyTree:
  """NumPy arrays [n ...] of a batch that is filled up to be split."""
  count = len(next(iter(batch.values())))

  def fill(array):
    # The last row again; what comes of it is cut off.
    return np.pad(
      array,
      [(0, batch_size - count)] + [(0, 0)] * (array.ndim - 1),
      mode='edge',
    )

  full = {name: fill(array) for name, array in batch.items()}
  values = jax.device_get(compute(sharding.put_batch(full, mesh)))
  return jax.tree.map(lambda array: np.asarray(array)[:count], values)


def _check_finite(place: str, name: str, values: np.ndarray) -> None:
  if not np.isfinite(values).all():
    raise ValueError(
      f'{place}: its {name} are no finite numbers in float16; look at it, and '
      'at the weights of the model'
    )
