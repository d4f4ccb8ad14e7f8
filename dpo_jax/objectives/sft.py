"""Supervised fine-tuning on the preferred images."""

import jax
from jaxtyping import Array, Float

from dpo_jax import types


def sft(
  policy: Float[Array, 'b 2'], ref: Float[Array, 'b 2']
) -> tuple[Float[Array, ' b'], dict[str, jax.Array]]:
  """The winner's denoising error; `ref` and the loser do not matter."""
  del ref
  return policy[:, types.WIN], {}
