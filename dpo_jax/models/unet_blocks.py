"""The down, middle and up blocks of a UNet2DConditionModel."""

from flax import linen as nn

from dpo_jax import types
from dpo_jax.models import layers, transformer, unet_2d_config, unet_config

REMAT = transformer.REMAT


class Block(nn.Module):
  """What the down, middle and up blocks share: how their layers are made.

  What runs from block to block keeps the dtype it comes in.
  """

  config: unet_config.UNetConfig | unet_2d_config.UNet2DConfig
  dtype: types.DTypeLike
  remat: str
  backend: str

  def resnet(self, i, features):
    cls = transformer.rematted(layers.ResnetBlock2D, self.remat)
    return cls(
      features,
      self.config.norm_num_groups,
      self.config.norm_eps,
      zero_init=True,
      scale_shift=self.config.resnet_time_scale_shift == 'scale_shift',
      dtype=self.dtype,
      name=f'resnets_{i}',
    )

  def transformer(self, i, level, depth):
    return transformer.Transformer2D(
      heads=self.config.attention_head_dim[level],
      depth=depth,
      groups=self.config.norm_num_groups,
      use_linear_projection=self.config.use_linear_projection,
      dtype=self.dtype,
      remat=self.remat,
      backend=self.backend,
      name=f'attentions_{i}',
    )

  def upsample(self, x, size):
    def up(_, x):
      return layers.Upsample2D(
        x.shape[-1], dtype=self.dtype, name='upsamplers_0'
      )(x, size)

    # Its convolution's input is four times what it is made of.
    return transformer.rematted(up, self.remat)(self, x)


class DownBlock(Block):
  """Residual blocks, with attention or without, then half the size."""

  index: int

  @nn.compact
  def __call__(self, x, temb, context):
    config, i = self.config, self.index
    features, outputs = config.block_out_channels[i], []
    has_attention = unet_config.DOWN_TYPES[config.down_block_types[i]]
    depths = config.transformer_layers_per_block[i]
    for j in range(config.layers_per_block[i]):
      x = self.resnet(j, features)(x, temb)
      if has_attention:
        x = self.transformer(j, i, depths[j])(x, context)
      outputs.append(x)
    if i < len(config.block_out_channels) - 1:
      down = layers.Downsample2D(
        features, dtype=self.dtype, name='downsamplers_0'
      )
      x = down(x).astype(x.dtype)
      outputs.append(x)
    return x, outputs


class MidBlock(Block):
  """Residual block, transformer, residual block; the first alone without."""

  @nn.compact
  def __call__(self, x, temb, context):
    level, features = len(self.config.block_out_channels) - 1, x.shape[-1]
    x = self.resnet(0, features)(x, temb)
    if not unet_config.MID_TYPES[self.config.mid_block_type]:
      return x
    depth = self.config.transformer_layers_per_block[level][0]
    x = self.transformer(0, level, depth)(x, context)
    return self.resnet(1, features)(x, temb)


class UpBlock(Block):
  """Takes the skips off the end of the list, then doubles the size."""

  index: int

  @nn.compact
  def __call__(self, x, skips, temb, context):
    config, i = self.config, self.index
    level = len(config.block_out_channels) - 1 - i
    features = config.block_out_channels[level]
    has_attention = unet_config.UP_TYPES[config.up_block_types[i]]
    depths = config.reverse_transformer_layers_per_block[i]
    for j in range(config.layers_per_block[level] + 1):
      x = self.resnet(j, features)(x, temb, skips.pop())
      if has_attention:
        x = self.transformer(j, level, depths[j])(x, context)
    if level > 0:
      x = self.upsample(x, skips[-1].shape[1:3]).astype(x.dtype)
    return x
