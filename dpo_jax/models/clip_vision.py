"""The CLIP image tower (Radford et al. 2021), as transformers has it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dpo_jax import types
from dpo_jax.models import clip, clip_layers, layers, options


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """The options of a CLIP image tower; transformers' names and defaults."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5

  def __post_init__(self):
    options.check_types(self)
    clip_layers.check(self)
    options.check(self.num_channels == 3, self, 'num_channels', '3')
    options.check(self.patch_size > 0, self, 'patch_size', '1 or more')
    options.check(
      self.image_size >= self.patch_size,
      self,
      'image_size',
      f'at least patch_size={self.patch_size}',
    )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'CLIPVisionConfig':
    """Reads vision_config; ValueError on an unsupported option."""
    return options.read(cls, values, fixed=clip.FIXED, harmless=clip.HARMLESS)


class CLIPVisionModelWithProjection(nn.Module):
  """Pictures to where texts are.

  The state of the class token, normed and projected (Dosovitskiy et al. 2021,
  equations 1 to 4, with another norm before the first layer).
  """

  config: CLIPVisionConfig
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: Float[Array, 'n H W 3']) -> Float[Array, 'n e']:
    """Image embeddings, float32, of normalised pixels (not [-1, 1]).

    H = W = image_size. The embeddings are not of length 1.

    Raises:
      ValueError: pictures of another size than the tower's.
    """
    config = self.config
    pooled = VisionTransformer(config, self.dtype, name='vision_model')(images)
    embeds = layers.Dense(
      config.projection_dim,
      use_bias=False,
      dtype=self.dtype,
      name='visual_projection',
    )(pooled)
    return embeds.astype(jnp.float32)


class VisionTransformer(nn.Module):
  """The body of the tower; the normed state of the class token."""

  config: CLIPVisionConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, images):
    def norm(name):
      return layers.layer_norm(
        dtype=self.dtype, name=name, eps=self.config.layer_norm_eps
      )

    x = PatchEmbeddings(self.config, self.dtype, name='embeddings')(images)
    # The name is misspelt in the files.
    x = norm('pre_layrnorm')(x)
    x, _ = clip_layers.Encoder(
      self.config, self.dtype, is_causal=False, name='encoder'
    )(x)
    return norm('post_layernorm')(x[:, 0])


class PatchEmbeddings(nn.Module):
  """Class token and patches, row by row, plus position embeddings."""

  config: CLIPVisionConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, images):
    config, size = self.config, self.config.image_size
    if images.shape[1:3] != (size, size):
      raise ValueError(
        f'pictures of {images.shape[1]} x {images.shape[2]} pixels for a tower '
        f'of image_size={size}; crop them to it'
      )
    patch = config.patch_size
    patches = layers.Conv(
      config.hidden_size,
      (patch, patch),
      strides=(patch, patch),
      padding='VALID',
      use_bias=False,
      dtype=self.dtype,
      name='patch_embedding',
    )(images.astype(self.dtype))
    n = len(images)
    patches = patches.reshape(n, -1, config.hidden_size)
    first = self.param(
      'class_embedding', nn.initializers.normal(0.02), (config.hidden_size,)
    ).astype(self.dtype)
    first = jnp.broadcast_to(first, (n, 1, config.hidden_size))
    positions = nn.Embed(
      1 + patches.shape[1],
      config.hidden_size,
      embedding_init=nn.initializers.normal(0.02),
      dtype=self.dtype,
      name='position_embedding',
    )(jnp.arange(1 + patches.shape[1]))
    return jnp.concatenate([first, patches], axis=1) + positions
