"""AutoencoderKL: pixels to latents and back (Rombach et al. 2022)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dpo_jax import types
from dpo_jax.models import attention, layers, options, transformer

EPS = 1e-6
DOWN_TYPE, UP_TYPE = 'DownEncoderBlock2D', 'UpDecoderBlock2D'
HARMLESS = frozenset({'sample_size', 'dropout'})
FIXED = {
  'act_fn': ('silu', 'swish'),
  'shift_factor': (None,),
  'latents_mean': (None,),
  'latents_std': (None,),
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """The options of an AutoencoderKL; diffusers' names and defaults.

  `scaling_factor` and `force_upcast` are for those who call the model: it
  neither scales latents nor chooses its own dtype.
  """

  in_channels: int = 3
  out_channels: int = 3
  down_block_types: tuple[str, ...] = (DOWN_TYPE,)
  up_block_types: tuple[str, ...] = (UP_TYPE,)
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  latent_channels: int = 4
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  force_upcast: bool = True
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True

  def __post_init__(self):
    options.check_types(self)
    n = len(self.block_out_channels)
    for option, kind in (
      ('down_block_types', DOWN_TYPE),
      ('up_block_types', UP_TYPE),
    ):
      good = getattr(self, option) == (kind,) * n
      options.check(good, self, option, f'{n} times {kind} (one per block)')
    groups = self.norm_num_groups
    options.check(
      groups > 0 and all(c % groups == 0 for c in self.block_out_channels),
      self,
      'norm_num_groups',
      f'a divisor of each of block_out_channels={self.block_out_channels}',
    )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'VAEConfig':
    """Reads vae/config.json; ValueError on an unsupported option."""
    return options.read(cls, values, fixed=FIXED, harmless=HARMLESS)

  @property
  def downscale(self) -> int:
    """Pixels to a latent cell, along a side."""
    return 2 ** (len(self.block_out_channels) - 1)


class AutoencoderKL(nn.Module):
  """Convolutional autoencoder with a Gaussian posterior per latent value.

  Inputs and outputs are float32; latents are not times the scaling factor.
  `remat`, one of transformer.REMAT, is the decoder's: what it computes again
  in its backward pass, of each residual block and of the middle's attention.
  """

  config: VAEConfig
  dtype: types.DTypeLike = jnp.float32
  remat: str = 'none'

  def setup(self):
    config, dtype = self.config, self.dtype
    self.encoder = Encoder(config, dtype)
    self.decoder = Decoder(config, dtype, self.remat)
    if config.use_quant_conv:
      width = 2 * config.latent_channels
      self.quant_conv = layers.Conv(width, (1, 1), dtype=dtype)
    if config.use_post_quant_conv:
      self.post_quant_conv = layers.Conv(
        config.latent_channels, (1, 1), dtype=dtype
      )

  def encode(
    self, images: Float[Array, 'n H W 3']
  ) -> tuple[types.Latents, types.Latents]:
    """Posterior (mean, logvar) of images in [-1, 1]; logvar in [-30, 20]."""
    moments = self.encoder(images.astype(self.dtype))
    if self.config.use_quant_conv:
      moments = self.quant_conv(moments)
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, z: types.Latents) -> Float[Array, 'n H W 3']:
    """Images, about [-1, 1] and not clipped, of unscaled latents."""
    z = z.astype(self.dtype)
    if self.config.use_post_quant_conv:
      z = self.post_quant_conv(z)
    return self.decoder(z).astype(jnp.float32)

  def __call__(
    self, images: Float[Array, 'n H W 3'], eps: types.Latents
  ) -> tuple[Float[Array, 'n H W 3'], types.Latents, types.Latents]:
    """(decode(mean + exp(logvar / 2) * eps), mean, logvar)."""
    mean, logvar = self.encode(images)
    z = mean + jnp.exp(0.5 * logvar) * eps
    return self.decode(z), mean, logvar


class Encoder(nn.Module):
  """Pixels to moments, before the quantisation convolution."""

  config: VAEConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    config, dtype = self.config, self.dtype
    channels = config.block_out_channels
    x = layers.conv(channels[0], dtype=dtype, name='conv_in')(x)
    for i, width in enumerate(channels):
      is_last = i == len(channels) - 1
      x = DownBlock(config, width, not is_last, dtype, name=f'down_blocks_{i}')(
        x
      )
    x = MidBlock(config, dtype, name='mid_block')(x)
    return _head(x, 2 * config.latent_channels, config, dtype)


class Decoder(nn.Module):
  """Latents, after the quantisation convolution, to pixels."""

  config: VAEConfig
  dtype: types.DTypeLike
  remat: str

  @nn.compact
  def __call__(self, x):
    config, dtype, remat = self.config, self.dtype, self.remat
    channels = config.block_out_channels[::-1]
    x = layers.conv(channels[0], dtype=dtype, name='conv_in')(x)
    x = MidBlock(config, dtype, remat, name='mid_block')(x)
    for i, width in enumerate(channels):
      is_last = i == len(channels) - 1
      x = UpBlock(
        config, width, not is_last, dtype, remat, name=f'up_blocks_{i}'
      )(x)
    return _head(x, config.out_channels, config, dtype)


def _head(x, features, config, dtype):
  # Called inside a compact method: the names are the caller's children.
  x = layers.group_norm(
    config.norm_num_groups, EPS, dtype=dtype, name='conv_norm_out'
  )(x)
  return layers.conv(features, dtype=dtype, name='conv_out')(jax.nn.silu(x))


class DownBlock(nn.Module):
  """Residual blocks, then half the size."""

  config: VAEConfig
  features: int
  downsample: bool
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    for i in range(self.config.layers_per_block):
      x = _resnet(self.features, self.config, self.dtype, f'resnets_{i}')(x)
    if self.downsample:
      x = layers.Downsample2D(
        self.features, asymmetric=True, dtype=self.dtype, name='downsamplers_0'
      )(x)
    return x


class UpBlock(nn.Module):
  """One more residual block than on the way down, then twice the size."""

  config: VAEConfig
  features: int
  upsample: bool
  dtype: types.DTypeLike
  remat: str

  @nn.compact
  def __call__(self, x):
    for i in range(self.config.layers_per_block + 1):
      x = _resnet(
        self.features, self.config, self.dtype, f'resnets_{i}', self.remat
      )(x)
    if self.upsample:
      x = layers.Upsample2D(
        self.features, dtype=self.dtype, name='upsamplers_0'
      )(x)
    return x


class MidBlock(nn.Module):
  """Residual block, single-head attention, residual block."""

  config: VAEConfig
  dtype: types.DTypeLike
  remat: str = 'none'

  @nn.compact
  def __call__(self, x):
    config, dtype, remat = self.config, self.dtype, self.remat
    n, h, w, c = x.shape
    x = _resnet(c, config, dtype, 'resnets_0', remat)(x)
    if config.mid_block_add_attention:
      x = x + transformer.rematted(attention.Attention, remat)(
        heads=1,
        qkv_bias=True,
        norm_groups=config.norm_num_groups,
        norm_eps=EPS,
        dtype=dtype,
        name='attentions_0',
      )(x.reshape(n, h * w, c)).reshape(n, h, w, c)
    return _resnet(c, config, dtype, 'resnets_1', remat)(x)


def _resnet(features, config, dtype, name, remat='none'):
  return transformer.rematted(layers.ResnetBlock2D, remat)(
    features, config.norm_num_groups, EPS, dtype=dtype, name=name
  )
