"""Helpers over pytrees: names of leaves, casts, norms and digests."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax import types


def leaf_name(path: tuple) -> str:
  """Slash-joined name of a pytree path: `unet/conv_in/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def cast_floats(tree: types.PyTree, dtype: types.DTypeLike) -> types.PyTree:
  """Casts every floating leaf to `dtype`; integers and bools stay."""

  def cast(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf.astype(dtype)
    return leaf

  return jax.tree.map(cast, tree)


def count(tree: types.PyTree) -> int:
  """Number of scalars in all leaves (works on ShapeDtypeStruct)."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: types.PyTree) -> int:
  """Bytes of all leaves (works on ShapeDtypeStruct)."""
  return sum(
    int(np.prod(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def fetch(leaf: jax.Array | np.ndarray) -> np.ndarray:
  """A leaf on the host, whole also where processes share it.

  All processes must call it then.
  """
  if isinstance(leaf, jax.Array) and not (
    leaf.is_fully_addressable or leaf.is_fully_replicated
  ):
    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(leaf)


def global_norm(tree: types.PyTree) -> jax.Array:
  """Euclidean norm over all leaves, summed in float32."""
  squares = [
    jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    for leaf in jax.tree.leaves(tree)
  ]
  return jnp.sqrt(sum(squares))


def digest(tree: types.PyTree) -> str:
  """SHA-256 over names, dtypes, shapes and bytes of all leaves.

  Typed PRNG keys are hashed by their key data. Leaves are fetched to the
  host one at a time.
  """
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(
      leaf.dtype, jax.dtypes.prng_key
    ):
      leaf = jax.random.key_data(leaf)
    array = fetch(leaf)
    header = f'{leaf_name(path)} {array.dtype} {array.shape}\n'
    sha.update(header.encode())
    sha.update(np.ascontiguousarray(array).tobytes())
  return sha.hexdigest()
