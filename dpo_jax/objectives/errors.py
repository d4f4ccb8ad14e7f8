"""Denoising errors of pairs: the numbers every objective works on."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def mean_squared(
  output: Float[Array, 'b p h w c'], target: Float[Array, 'b #p h w c']
) -> Float[Array, 'b p']:
  """Mean over h w c of (output - target)^2, always in float32.

  A mean, not the sum of Wallace et al. (2023), eq. 14: their beta equals
  ours times 0.5 / (h w c), see README.
  """
  difference = output.astype(jnp.float32) - target.astype(jnp.float32)
  return jnp.mean(jnp.square(difference), axis=(-3, -2, -1))
