"""Random keys bound to examples, so that no device layout changes a draw.

Noise belongs to (run seed, epoch, example id) and never to a row of a batch:
another batch order, number of devices, processes or microbatches draws the
same noise for the same example.
"""

import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, UInt32, UInt64

from dpo_jax import types


def by_name(key: types.Key, names: Sequence[str]) -> dict[str, types.Key]:
  """One independent key a name; adding a name changes no other draw."""
  return {
    name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in names
  }


def per_example(
  key: types.Key,
  ids: UInt32[Array, ' b'] | UInt32[Array, 'b 2'],
  epochs: UInt32[Array, ' b'],
) -> types.Key:
  """Keys [b]: `key` folded with each example's id, then its epoch.

  Ids of 64 bits are [b, 2], as `split_ids` makes them.
  """

  def fold(words, epoch):
    folded = key
    for word in words:
      folded = jax.random.fold_in(folded, word)
    return jax.random.fold_in(folded, epoch)

  return jax.vmap(fold)(ids.reshape((len(ids), -1)), epochs)


def split_ids(ids: UInt64[np.ndarray, ' b']) -> UInt32[np.ndarray, 'b 2']:
  """64-bit ids as their (high, low) words: JAX has 32-bit integers."""
  return np.stack([ids >> np.uint64(32), ids], axis=-1).astype(np.uint32)


def id_numbers(
  ids: UInt32[np.ndarray, ' b'] | UInt32[np.ndarray, 'b 2'],
) -> list[int]:
  """The ids as whole numbers, whichever way they are stored."""
  words = np.asarray(ids).reshape((len(ids), -1)).T.tolist()
  if len(words) == 1:
    return words[0]
  return [high << 32 | low for high, low in zip(*words, strict=True)]


def normal(keys: types.Key, shape: Sequence[int]) -> jax.Array:
  """Standard normal [b, *shape] float32, row i drawn from `keys[i]`."""
  return jax.vmap(lambda key: jax.random.normal(key, tuple(shape)))(keys)


def uniform(keys: types.Key) -> jax.Array:
  """Uniform [0, 1) of shape [b], element i drawn from `keys[i]`."""
  return jax.vmap(jax.random.uniform)(keys)


def randint(keys: types.Key, low: int, high: int) -> jax.Array:
  """int32 [b] uniform in [low, high), element i drawn from `keys[i]`."""
  return jax.vmap(lambda key: jax.random.randint(key, (), low, high))(keys)
