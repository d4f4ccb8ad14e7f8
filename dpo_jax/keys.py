"""Random keys bound to examples, so that no device layout changes a draw.

Noise belongs to (run seed, epoch, example id) and never to a row of a batch:
another batch order, number of devices, processes or microbatches draws the
same noise for the same example.
"""

import zlib
from collections.abc import Sequence

import jax
from jaxtyping import Array, UInt32

from dpo_jax import types


def by_name(key: types.Key, names: Sequence[str]) -> dict[str, types.Key]:
  """One independent key a name; adding a name changes no other draw."""
  return {
    name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in names
  }


def per_example(
  key: types.Key,
  ids: UInt32[Array, ' b'],
  epochs: UInt32[Array, ' b'],
) -> types.Key:
  """Keys [b]: `key` folded with each example's id, then its epoch."""

  def fold(example_id, epoch):
    return jax.random.fold_in(jax.random.fold_in(key, example_id), epoch)

  return jax.vmap(fold)(ids, epochs)


def normal(keys: types.Key, shape: Sequence[int]) -> jax.Array:
  """Standard normal [b, *shape] float32, row i drawn from `keys[i]`."""
  return jax.vmap(lambda key: jax.random.normal(key, tuple(shape)))(keys)


def uniform(keys: types.Key) -> jax.Array:
  """Uniform [0, 1) of shape [b], element i drawn from `keys[i]`."""
  return jax.vmap(jax.random.uniform)(keys)


def randint(keys: types.Key, low: int, high: int) -> jax.Array:
  """int32 [b] uniform in [low, high), element i drawn from `keys[i]`."""
  return jax.vmap(lambda key: jax.random.randint(key, (), low, high))(keys)
