"""Weights in eight bits, with a scale for each output channel.

For weights that are read and never trained: a frozen reference. They round
far more than bfloat16 does (RESULTS.md, margin noise).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import types

# What the largest value of a channel becomes.
LARGEST = {'int8': 127.0, 'float8_e4m3fn': 448.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
  """values * scale; `astype` computes it, as if this were an array.

  Attributes:
    values: int8 or float8_e4m3fn.
    scale: one number for each entry of the last axis.
  """

  values: Array
  scale: Float[Array, ' out']

  def astype(self, dtype: types.DTypeLike) -> Array:
    """The weights, multiplied in float32."""
    return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantise(kernel: Float[Array, '... out'], dtype: str) -> Quantised:
  """A kernel in one of LARGEST, rounded to the nearest.

  scale = max |kernel[..., i]| / LARGEST[dtype]; a channel of zeros has 1.
  """
  kernel = kernel.astype(jnp.float32)
  scale = jnp.max(jnp.abs(kernel), axis=range(kernel.ndim - 1))
  scale = jnp.where(scale > 0, scale, LARGEST[dtype]) / LARGEST[dtype]
  values = kernel / scale
  if dtype == 'int8':
    values = jnp.round(values)
  return Quantised(values.astype(dtype), scale)


def quantise_kernels(tree: types.Params, dtype: str) -> types.PyTree:
  """Every `kernel` in eight bits; biases and norms stay as they are."""
  return {
    name: quantise_kernels(value, dtype)
    if isinstance(value, Mapping)
    else quantise(value, dtype)
    if name == 'kernel'
    else value
    for name, value in tree.items()
  }
