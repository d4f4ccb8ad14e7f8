"""UNet2DModel: the unconditional UNet of pixel-space diffusion models."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo_jax import types
from dpo_jax.models import (
  attention,
  layers,
  transformer,
  unet_2d_config,
  unet_blocks,
)

# Who needs the model needs its config.
UNet2DConfig = unet_2d_config.UNet2DConfig


class UNet2DModel(nn.Module):
  """Predicts noise (or v) from noisy images and timestep alone.

  Ho et al. 2020 (DDPM), appendix B, in diffusers' layout. `dtype`, `remat`,
  `residual_dtype` and `attention` are those of unet.UNet2DConditionModel.
  """

  config: UNet2DConfig
  dtype: types.DTypeLike = jnp.float32
  remat: str = 'none'
  residual_dtype: types.DTypeLike | None = None
  attention: str = 'xla'

  @nn.compact
  def __call__(self, x_t: types.Latents, t: types.Timesteps) -> types.Latents:
    """Output [n h w c], float32.

    Raises ValueError for an unknown `remat`, and for sides that the levels do
    not halve evenly: PyTorch's model fails there.
    """
    config, dtype = self.config, self.dtype
    self._check(x_t)
    width, levels = config.block_out_channels[0], len(config.block_out_channels)
    sinusoids = layers.timestep_features(
      t,
      width,
      flip_sin_to_cos=config.flip_sin_to_cos,
      freq_shift=config.freq_shift,
    )
    temb = layers.TimestepEmbedding(4 * width, dtype, name='time_embedding')(
      sinusoids.astype(dtype)
    )
    x = x_t.astype(dtype)
    if config.center_input_sample:
      x = 2 * x - 1
    x = layers.conv(width, dtype=dtype, name='conv_in')(x)
    x = x.astype(self.residual_dtype or dtype)

    settings = (config, dtype, self.remat, self.attention)
    skips = [x]
    for i in range(levels):
      x, outputs = DownBlock(*settings, i, name=f'down_blocks_{i}')(x, temb)
      skips += outputs
    if config.mid_block_type is not None:
      x = MidBlock(*settings, name='mid_block')(x, temb)
    for i in range(levels):
      x = UpBlock(*settings, i, name=f'up_blocks_{i}')(x, skips, temb)

    def leave(_, x):
      x = layers.group_norm(
        config.norm_num_groups,
        config.norm_eps,
        dtype=dtype,
        name='conv_norm_out',
      )(x)
      return layers.conv(
        config.out_channels, dtype=dtype, name='conv_out', zero_init=True
      )(jax.nn.silu(x))

    x = transformer.rematted(leave, self.remat)(self, x)
    return x.astype(jnp.float32)

  def _check(self, x_t):
    if self.remat not in unet_blocks.REMAT:
      allowed = ', '.join(unet_blocks.REMAT)
      raise ValueError(f'remat={self.remat!r}; allowed: {allowed}')
    factor = 2 ** (len(self.config.block_out_channels) - 1)
    height, width = x_t.shape[1:3]
    if height % factor or width % factor:
      raise ValueError(
        f'images of {height}x{width}: both sides must be multiples of {factor},'
        f' as this UNet has {len(self.config.block_out_channels)} levels'
      )


class Attention2D(attention.Attention):
  """Positions of a feature map attend to each other, residual."""

  def __call__(self, x: layers.Features) -> layers.Features:
    n, h, w, c = x.shape
    out = super().__call__(x.reshape(n, h * w, c))
    return x + out.reshape(x.shape)


class Block(unet_blocks.Block):
  """What the blocks share: how their layers are made."""

  def attend(self, i, features, *, normed=True):
    cls = transformer.rematted(Attention2D, self.remat)
    return cls(
      self.config.heads(features),
      qkv_bias=True,
      norm_groups=self.config.norm_num_groups if normed else None,
      norm_eps=self.config.norm_eps,
      dtype=self.dtype,
      backend=self.backend,
      name=f'attentions_{i}',
    )


class DownBlock(Block):
  """Residual blocks, with attention or without, then half the size."""

  index: int

  @nn.compact
  def __call__(self, x, temb):
    config, i = self.config, self.index
    features, outputs = config.block_out_channels[i], []
    has_attention = unet_2d_config.DOWN_TYPES[config.down_block_types[i]]
    for j in range(config.layers_per_block):
      x = self.resnet(j, features)(x, temb)
      if has_attention:
        x = self.attend(j, features)(x)
      outputs.append(x)
    if i < len(config.block_out_channels) - 1:
      down = layers.Downsample2D(
        features,
        asymmetric=config.downsample_padding == 0,
        dtype=self.dtype,
        name='downsamplers_0',
      )
      x = down(x).astype(x.dtype)
      outputs.append(x)
    return x, outputs


class MidBlock(Block):
  """Residual block, attention where it has some, residual block."""

  @nn.compact
  def __call__(self, x, temb):
    features = x.shape[-1]
    normed = self.config.resnet_time_scale_shift == 'default'
    x = self.resnet(0, features)(x, temb)
    if self.config.add_attention:
      x = self.attend(0, features, normed=normed)(x)
    return self.resnet(1, features)(x, temb)


class UpBlock(Block):
  """Takes the skips off the end of the list, then doubles the size."""

  index: int

  @nn.compact
  def __call__(self, x, skips, temb):
    config, i = self.config, self.index
    level = len(config.block_out_channels) - 1 - i
    features = config.block_out_channels[level]
    has_attention = unet_2d_config.UP_TYPES[config.up_block_types[i]]
    for j in range(config.layers_per_block + 1):
      x = self.resnet(j, features)(x, temb, skips.pop())
      if has_attention:
        x = self.attend(j, features)(x)
    if level > 0:
      x = self.upsample(x, skips[-1].shape[1:3]).astype(x.dtype)
    return x
