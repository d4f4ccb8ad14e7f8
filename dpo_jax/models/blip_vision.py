"""BLIP's image encoder, with the names of its release (`vit.py`)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dpo_jax import types
from dpo_jax.models import attention, layers, options


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The options of the image encoder; ViT-L/16 at 224 by default."""

  hidden_size: int = 1024
  intermediate_size: int = 4096
  num_hidden_layers: int = 24
  num_attention_heads: int = 16
  image_size: int = 224
  patch_size: int = 16
  layer_norm_eps: float = 1e-6

  def __post_init__(self):
    options.check_types(self)
    options.check_heads(self)


class VisionTransformer(nn.Module):
  """Dosovitskiy et al. 2021, norms first, one projection for q, k and v."""

  config: VisionConfig
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, pixels: Float[Array, 'n H W 3']) -> Float[Array, 'n p d']:
    """The states of the class token and of the patches, row by row."""
    config, n = self.config, len(pixels)
    size, width = config.image_size, config.hidden_size
    if pixels.shape[1:3] != (size, size):
      raise ValueError(
        f'pictures of {pixels.shape[1]} x {pixels.shape[2]} pixels for an '
        f'encoder of image_size={size}; crop them to it'
      )
    patches = PatchEmbed(config, self.dtype, name='patch_embed')(pixels)
    init = nn.initializers.normal(0.02)
    first = self.param('cls_token', init, (1, 1, width)).astype(self.dtype)
    x = jnp.concatenate(
      [jnp.broadcast_to(first, (n, 1, width)), patches], axis=1
    )
    positions = self.param('pos_embed', init, (1, x.shape[1], width))
    x = x + positions.astype(self.dtype)
    for i in range(config.num_hidden_layers):
      x = VisionBlock(config, self.dtype, name=f'blocks_{i}')(x)
    return _norm(config, self.dtype, 'norm')(x)


class PatchEmbed(nn.Module):
  """Patches to vectors, with a bias."""

  config: VisionConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, pixels):
    patch, width = self.config.patch_size, self.config.hidden_size
    x = layers.Conv(
      width,
      (patch, patch),
      strides=(patch, patch),
      padding='VALID',
      dtype=self.dtype,
      name='proj',
    )(pixels.astype(self.dtype))
    return x.reshape(len(x), -1, width)


class VisionBlock(nn.Module):
  """Self-attention and a two-layer network, each added to what it got."""

  config: VisionConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    config = self.config
    h = _norm(config, self.dtype, 'norm1')(x)
    x = x + VisionAttention(
      config.num_attention_heads, self.dtype, name='attn'
    )(h)
    h = _norm(config, self.dtype, 'norm2')(x)
    return x + Mlp(config, self.dtype, name='mlp')(h)


class VisionAttention(nn.Module):
  """Attention whose q, k and v are thirds of one product."""

  heads: int
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    n, s, d = x.shape
    qkv = layers.Dense(3 * d, dtype=self.dtype, name='qkv')(x)
    qkv = qkv.reshape(n, s, 3, self.heads, d // self.heads)
    q, k, v = (qkv[:, :, i] for i in range(3))
    out = attention.attend(q, k, v).reshape(n, s, d)
    return layers.Dense(d, dtype=self.dtype, name='proj')(out)


class Mlp(nn.Module):
  """Dense, gelu, dense."""

  config: VisionConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    config = self.config
    h = layers.Dense(config.intermediate_size, dtype=self.dtype, name='fc1')(x)
    h = jax.nn.gelu(h, approximate=False)
    return layers.Dense(config.hidden_size, dtype=self.dtype, name='fc2')(h)


def _norm(config, dtype, name):
  return layers.layer_norm(dtype=dtype, name=name, eps=config.layer_norm_eps)
