"""UNet2DConditionModel of Stable Diffusion 1.x and 2.x."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dpo_jax import types
from dpo_jax.models import attention, layers, options

DOWN_TYPES = {'CrossAttnDownBlock2D': True, 'DownBlock2D': False}
UP_TYPES = {'CrossAttnUpBlock2D': True, 'UpBlock2D': False}
REMAT = ('none', 'full')
# The epsilon of a transformer's own norm; not the option norm_eps.
TRANSFORMER_EPS = 1e-6

# The last one is the width of an embedding that is refused below.
HARMLESS = frozenset({'sample_size', 'addition_embed_type_num_heads'})
FIXED = {
  'mid_block_type': ('UNetMidBlock2DCrossAttn',),
  'only_cross_attention': (False,),
  'mid_block_only_cross_attention': (None, False),
  'dual_cross_attention': (False,),
  'attention_type': ('default',),
  'cross_attention_norm': (None,),
  # Attention scores are float32 always (attention.attend).
  'upcast_attention': (False, True, None),
  'num_attention_heads': (None,),
  'reverse_transformer_layers_per_block': (None,),
  'downsample_padding': (1,),
  'mid_block_scale_factor': (1,),
  'dropout': (0,),
  'act_fn': ('silu', 'swish'),
  'conv_in_kernel': (3,),
  'conv_out_kernel': (3,),
  'resnet_time_scale_shift': ('default',),
  'resnet_skip_time_act': (False,),
  'resnet_out_scale_factor': (1,),
  'encoder_hid_dim': (None,),
  'encoder_hid_dim_type': (None,),
  'class_embed_type': (None,),
  'num_class_embeds': (None,),
  'class_embeddings_concat': (False,),
  'projection_class_embeddings_input_dim': (None,),
  'addition_embed_type': (None,),
  'addition_time_embed_dim': (None,),
  'time_embedding_type': ('positional',),
  'time_embedding_dim': (None,),
  'time_embedding_act_fn': (None,),
  'timestep_post_act': (None,),
  'time_cond_proj_dim': (None,),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """The options of a UNet2DConditionModel; diffusers' names and defaults.

  `attention_head_dim` is the number of heads, not their width: the name is
  diffusers' mistake, which every released config.json repeats. Options given
  as one integer are spread to one per down block.
  """

  in_channels: int = 4
  out_channels: int = 4
  center_input_sample: bool = False
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  down_block_types: tuple[str, ...] = ('CrossAttnDownBlock2D',) * 3 + (
    'DownBlock2D',
  )
  up_block_types: tuple[str, ...] = ('UpBlock2D',) + ('CrossAttnUpBlock2D',) * 3
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int | tuple[int, ...] = 2
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  cross_attention_dim: int = 1280
  transformer_layers_per_block: int | tuple[int, ...] = 1
  attention_head_dim: int | tuple[int, ...] = 8
  use_linear_projection: bool = False

  def __post_init__(self):
    options.check_types(self)
    channels = self.block_out_channels
    for option, known in (
      ('down_block_types', DOWN_TYPES),
      ('up_block_types', UP_TYPES),
    ):
      kinds = getattr(self, option)
      good = isinstance(kinds, tuple) and len(kinds) == len(channels)
      options.check(
        good and all(kind in known for kind in kinds),
        self,
        option,
        f'{len(channels)} (as block_out_channels) of {", ".join(known)}',
      )
    for option in (
      'layers_per_block',
      'transformer_layers_per_block',
      'attention_head_dim',
    ):
      options.spread(self, option, len(channels))
    groups = self.norm_num_groups
    options.check(
      groups > 0 and all(c % groups == 0 for c in channels),
      self,
      'norm_num_groups',
      f'a divisor of each of block_out_channels={channels}',
    )
    heads = self.attention_head_dim
    options.check(
      all(h > 0 and c % h == 0 for c, h in zip(channels, heads, strict=True)),
      self,
      'attention_head_dim',
      f'numbers of heads that divide block_out_channels={channels}',
    )
    options.check(
      channels[0] % 2 == 0, self, 'block_out_channels', 'an even first width'
    )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'UNetConfig':
    """Reads unet/config.json; ValueError on an unsupported option."""
    return options.read(cls, values, fixed=FIXED, harmless=HARMLESS)


class UNet2DConditionModel(nn.Module):
  """Predicts noise (or v) from noisy latents, timestep and text states.

  `remat='full'` recomputes each residual block and transformer layer in the
  backward pass: less memory, about a third more compute, the same numbers.
  """

  config: UNetConfig
  dtype: types.DTypeLike = jnp.float32
  remat: str = 'none'

  @nn.compact
  def __call__(
    self,
    x_t: types.Latents,
    t: types.Timesteps,
    prompt_embeds: types.PromptEmbeds,
  ) -> types.Latents:
    """Output [n h w c], float32.

    Raises:
      ValueError: an unknown `remat`, or text states of the wrong width.
    """
    config, dtype = self.config, self.dtype
    self._check(prompt_embeds)
    width = config.block_out_channels[0]
    temb = layers.timestep_features(
      t,
      width,
      flip_sin_to_cos=config.flip_sin_to_cos,
      freq_shift=config.freq_shift,
    )
    temb = layers.TimestepEmbedding(4 * width, dtype, name='time_embedding')(
      temb.astype(dtype)
    )
    context = prompt_embeds.astype(dtype)
    x = x_t.astype(dtype)
    if config.center_input_sample:
      x = 2 * x - 1
    x = layers.conv(width, dtype=dtype, name='conv_in')(x)

    settings = (config, dtype, self.remat)
    skips = [x]
    for i in range(len(config.block_out_channels)):
      x, outputs = DownBlock(*settings, i, name=f'down_blocks_{i}')(
        x, temb, context
      )
      skips += outputs
    x = MidBlock(*settings, name='mid_block')(x, temb, context)
    for i in range(len(config.block_out_channels)):
      x = UpBlock(*settings, i, name=f'up_blocks_{i}')(x, skips, temb, context)

    x = layers.group_norm(
      config.norm_num_groups, config.norm_eps, dtype=dtype, name='conv_norm_out'
    )(x)
    x = layers.conv(
      config.out_channels, dtype=dtype, name='conv_out', zero_init=True
    )(jax.nn.silu(x))
    return x.astype(jnp.float32)

  def _check(self, prompt_embeds):
    if self.remat not in REMAT:
      raise ValueError(f'remat={self.remat!r}; allowed: {", ".join(REMAT)}')
    if prompt_embeds.shape[-1] != self.config.cross_attention_dim:
      raise ValueError(
        f'prompt_embeds of width {prompt_embeds.shape[-1]} for a UNet of'
        f' cross_attention_dim={self.config.cross_attention_dim}; is the text'
        ' encoder the one of this pipeline?'
      )


class Block(nn.Module):
  """What the down, middle and up blocks share: how their layers are made."""

  config: UNetConfig
  dtype: types.DTypeLike
  remat: str

  def resnet(self, i, features):
    cls = layers.ResnetBlock2D
    cls = nn.remat(cls) if self.remat == 'full' else cls
    return cls(
      features,
      self.config.norm_num_groups,
      self.config.norm_eps,
      zero_init=True,
      dtype=self.dtype,
      name=f'resnets_{i}',
    )

  def transformer(self, i, level):
    return Transformer2D(
      heads=self.config.attention_head_dim[level],
      depth=self.config.transformer_layers_per_block[level],
      groups=self.config.norm_num_groups,
      use_linear_projection=self.config.use_linear_projection,
      dtype=self.dtype,
      remat=self.remat,
      name=f'attentions_{i}',
    )


class DownBlock(Block):
  """Residual blocks, with attention or without, then half the size."""

  index: int

  @nn.compact
  def __call__(self, x, temb, context):
    config, i = self.config, self.index
    features, outputs = config.block_out_channels[i], []
    for j in range(config.layers_per_block[i]):
      x = self.resnet(j, features)(x, temb)
      if DOWN_TYPES[config.down_block_types[i]]:
        x = self.transformer(j, i)(x, context)
      outputs.append(x)
    if i < len(config.block_out_channels) - 1:
      x = layers.Downsample2D(
        features, dtype=self.dtype, name='downsamplers_0'
      )(x)
      outputs.append(x)
    return x, outputs


class MidBlock(Block):
  """Residual block, transformer, residual block."""

  @nn.compact
  def __call__(self, x, temb, context):
    level, features = len(self.config.block_out_channels) - 1, x.shape[-1]
    x = self.resnet(0, features)(x, temb)
    x = self.transformer(0, level)(x, context)
    return self.resnet(1, features)(x, temb)


class UpBlock(Block):
  """Takes the skips off the end of the list, then doubles the size."""

  index: int

  @nn.compact
  def __call__(self, x, skips, temb, context):
    config, i = self.config, self.index
    level = len(config.block_out_channels) - 1 - i
    features = config.block_out_channels[level]
    for j in range(config.layers_per_block[level] + 1):
      x = jnp.concatenate([x, skips.pop()], axis=-1)
      x = self.resnet(j, features)(x, temb)
      if UP_TYPES[config.up_block_types[i]]:
        x = self.transformer(j, level)(x, context)
    if level > 0:
      x = layers.Upsample2D(features, dtype=self.dtype, name='upsamplers_0')(
        x, skips[-1].shape[1:3]
      )
    return x


class Transformer2D(nn.Module):
  """Transformer layers over the positions of a feature map, residual.

  The two projections are dense layers or 1x1 convolutions, which differ in
  the shape of their kernels only.
  """

  heads: int
  depth: int
  groups: int
  use_linear_projection: bool
  dtype: types.DTypeLike
  remat: str

  @nn.compact
  def __call__(
    self, x: layers.Features, context: Float[Array, 'n s d']
  ) -> layers.Features:
    n, h, w, c = x.shape

    def project(name, init):
      if self.use_linear_projection:
        return layers.Dense(c, kernel_init=init, dtype=self.dtype, name=name)
      return nn.Conv(c, (1, 1), kernel_init=init, dtype=self.dtype, name=name)

    layer = TransformerLayer
    layer = nn.remat(layer) if self.remat == 'full' else layer
    y = layers.group_norm(
      self.groups, TRANSFORMER_EPS, dtype=self.dtype, name='norm'
    )(x)
    y = project('proj_in', nn.linear.default_kernel_init)(y)
    y = y.reshape(n, h * w, c)
    for i in range(self.depth):
      y = layer(self.heads, self.dtype, name=f'transformer_blocks_{i}')(
        y, context
      )
    y = y.reshape(n, h, w, c)
    return x + project('proj_out', nn.initializers.zeros)(y)


class TransformerLayer(nn.Module):
  """Self-attention, attention to the text, gated network; norms first."""

  heads: int
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x, context):
    def norm(name):
      return layers.layer_norm(dtype=self.dtype, name=name)

    def attend(name):
      return attention.Attention(self.heads, dtype=self.dtype, name=name)

    x = x + attend('attn1')(norm('norm1')(x))
    x = x + attend('attn2')(norm('norm2')(x), context)
    return x + FeedForward(self.dtype, name='ff')(norm('norm3')(x))


class FeedForward(nn.Module):
  """Dense to four times the width with GEGLU (Shazeer 2020), and back."""

  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    h = GEGLU(4 * width, self.dtype, name='net_0')(x)
    return layers.Dense(width, dtype=self.dtype, name='net_2')(h)


class GEGLU(nn.Module):
  """value * gelu(gate), the exact gelu, of one projection's halves."""

  features: int
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    x = layers.Dense(2 * self.features, dtype=self.dtype, name='proj')(x)
    value, gate = jnp.split(x, 2, axis=-1)
    return value * jax.nn.gelu(gate, approximate=False)
