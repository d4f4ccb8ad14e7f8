"""CLIP's embedding of pictures that a program has, with a gradient."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import types
from dpo_jax.models import clip_pair


@dataclasses.dataclass(frozen=True)
class ClipFeatures:
  """(params, pictures in [-1, 1] [n H W 3]) -> embeddings [n e], float32.

  The shorter side is scaled to the tower's, the middle square cut out and
  normalised, as evaluate.clip_pixels does it with bytes: bicubic, smoothed
  where pictures become smaller. Nothing is rounded or clipped, so there is a
  slope everywhere.
  Embeddings are of length sqrt(e), their numbers about 1 wide, as a layer on
  top of them wants it.

  Attributes:
    mean, std: of the channels, of values in [0, 1].
  """

  model: clip_pair.CLIP
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @property
  def width(self) -> int:
    """How many numbers an embedding has."""
    return self.model.config.vision_config.projection_dim

  def pixels(
    self, images: Float[Array, 'n H W 3']
  ) -> Float[Array, 'n side side 3']:
    """What the tower is shown."""
    n, height, width, channels = images.shape
    side = self.model.config.vision_config.image_size
    shorter = min(height, width)
    h, w = int(side * height / shorter), int(side * width / shorter)
    values = (images.astype(jnp.float32) + 1.0) / 2.0
    if (h, w) != (height, width):
      values = jax.image.resize(values, (n, h, w, channels), 'cubic')
    top, left = (h - side) // 2, (w - side) // 2
    values = values[:, top : top + side, left : left + side]
    return (values - jnp.asarray(self.mean)) / jnp.asarray(self.std)

  def __call__(
    self, params: types.Params, images: Float[Array, 'n H W 3']
  ) -> Float[Array, 'n e']:
    """Embeddings by parameters of weights.clip_files."""
    embeds = self.model.embed_images(params, self.pixels(images))
    return embeds.astype(jnp.float32) * jnp.sqrt(jnp.float32(self.width))
