"""The VAE of a model that has none: its latents are the pixels."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

# exp(LOGVAR / 2) is 0 in float32: a sample of the posterior is its mean.
LOGVAR = -1e4
# Grey pictures, or colour.
CHANNELS = (1, 3)


class Pixels(nn.Module):
  """The identity with the methods of vae.AutoencoderKL; has no parameters.

  With one channel a picture becomes the mean of its colours, and comes back
  with three equal ones.
  """

  channels: int

  def encode(
    self, images: Float[Array, 'n H W 3']
  ) -> tuple[Float[Array, 'n H W c'], Float[Array, 'n H W c']]:
    """(mean, logvar): the pixels, and a variance of nothing."""
    images = images.astype(jnp.float32)
    if self.channels == 1:
      images = images.mean(-1, keepdims=True)
    return images, jnp.full_like(images, LOGVAR)

  def decode(self, latents: Float[Array, 'n H W c']) -> Float[Array, 'n H W 3']:
    """The pixels, in colour."""
    return jnp.broadcast_to(latents, (*latents.shape[:-1], 3))
