"""What config.json of a UNet2DConditionModel may say, and what it means."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dpo_jax.models import options

# Has a block of this kind attention?
DOWN_TYPES = {'CrossAttnDownBlock2D': True, 'DownBlock2D': False}
UP_TYPES = {'CrossAttnUpBlock2D': True, 'UpBlock2D': False}
MID_TYPES = {
  'UNetMidBlock2DCrossAttn': True,
  'UNetMidBlock2D': False,
  None: False,
}
TIME_SHIFTS = ('default', 'scale_shift')
ADDITION_TYPES = (None, 'text_time')

# The last one is the width of an embedding that is refused below.
HARMLESS = frozenset({'sample_size', 'addition_embed_type_num_heads'})
FIXED = {
  'only_cross_attention': (False,),
  'mid_block_only_cross_attention': (None, False),
  'dual_cross_attention': (False,),
  'attention_type': ('default',),
  'cross_attention_norm': (None,),
  # Attention scores are float32 always (attention.attend).
  'upcast_attention': (False, True, None),
  'num_attention_heads': (None,),
  'downsample_padding': (1,),
  'mid_block_scale_factor': (1,),
  'dropout': (0,),
  'act_fn': ('silu', 'swish'),
  'conv_in_kernel': (3,),
  'conv_out_kernel': (3,),
  'resnet_skip_time_act': (False,),
  'resnet_out_scale_factor': (1,),
  'encoder_hid_dim': (None,),
  'encoder_hid_dim_type': (None,),
  'class_embed_type': (None,),
  'num_class_embeds': (None,),
  'class_embeddings_concat': (False,),
  'time_embedding_type': ('positional',),
  'time_embedding_dim': (None,),
  'time_embedding_act_fn': (None,),
  'timestep_post_act': (None,),
  'time_cond_proj_dim': (None,),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """The options of a UNet2DConditionModel; diffusers' names and defaults.

  Attributes, as they are after construction, where they are not plain:
    attention_head_dim: the number of heads of each level, not their width:
      the name is diffusers' mistake, which every released config.json repeats.
    layers_per_block: residual blocks of each level, on the way down.
    transformer_layers_per_block: for each level, the depth of the transformer
      behind each residual block; the middle block has the last level's first.
    reverse_transformer_layers_per_block: the same for each up block, which has
      one residual block more; the reverse of the above if not given.
    cross_attention_dim: width of the text states; a list must have one width
      for all blocks with attention, as there is one sequence of states.
    addition_embed_type: 'text_time' if the time embedding also depends on the
      pooled text and on sizes (SDXL), where `addition_time_embed_dim` is the
      number of sinusoids of a size and `projection_class_embeddings_input_dim`
      the width of pooled text and all sinusoids together.
  """

  in_channels: int = 4
  out_channels: int = 4
  center_input_sample: bool = False
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  down_block_types: tuple[str, ...] = ('CrossAttnDownBlock2D',) * 3 + (
    'DownBlock2D',
  )
  mid_block_type: str | None = 'UNetMidBlock2DCrossAttn'
  up_block_types: tuple[str, ...] = ('UpBlock2D',) + ('CrossAttnUpBlock2D',) * 3
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int | tuple[int, ...] = 2
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  cross_attention_dim: int | tuple[int, ...] = 1280
  transformer_layers_per_block: int | tuple = 1
  reverse_transformer_layers_per_block: tuple | None = None
  attention_head_dim: int | tuple[int, ...] = 8
  use_linear_projection: bool = False
  resnet_time_scale_shift: str = 'default'
  addition_embed_type: str | None = None
  addition_time_embed_dim: int | None = None
  projection_class_embeddings_input_dim: int | None = None

  def __post_init__(self):
    options.check_types(self)
    for option in ('layers_per_block', 'attention_head_dim'):
      options.spread(self, option, len(self.block_out_channels))
      good = all(value > 0 for value in getattr(self, option))
      options.check(good, self, option, 'integers above 0')
    options.check_kinds(
      self,
      {'down_block_types': DOWN_TYPES, 'up_block_types': UP_TYPES},
      {
        'mid_block_type': MID_TYPES,
        'resnet_time_scale_shift': TIME_SHIFTS,
        'addition_embed_type': ADDITION_TYPES,
      },
    )
    self._check_widths()
    self._spread_depths()
    self._spread_text_width()
    self._check_addition()

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'UNetConfig':
    """Reads unet/config.json; ValueError on an unsupported option."""
    return options.read(cls, values, fixed=FIXED, harmless=HARMLESS)

  def _check_widths(self):
    channels, groups = self.block_out_channels, self.norm_num_groups
    options.check(
      groups > 0 and all(c % groups == 0 for c in channels),
      self,
      'norm_num_groups',
      f'a divisor of each of block_out_channels={channels}',
    )
    heads = self.attention_head_dim
    options.check(
      all(c % h == 0 for c, h in zip(channels, heads, strict=True)),
      self,
      'attention_head_dim',
      f'numbers of heads that divide block_out_channels={channels}',
    )
    options.check(
      channels[0] % 2 == 0, self, 'block_out_channels', 'an even first width'
    )

  def _spread_depths(self):
    given, reverse = (
      'transformer_layers_per_block',
      'reverse_transformer_layers_per_block',
    )
    n, value = len(self.block_out_channels), getattr(self, given)
    if getattr(self, reverse) is None:
      depths = value if isinstance(value, tuple) else (value,) * n
      is_plain = not any(isinstance(depth, tuple) for depth in depths)
      options.check(is_plain, self, reverse, f'a list, as {given} has lists')
      object.__setattr__(self, reverse, depths[::-1])
    options.spread_layers(self, given, self.layers_per_block)
    up = tuple(count + 1 for count in self.layers_per_block[::-1])
    options.spread_layers(self, reverse, up)

  def _spread_text_width(self):
    option = 'cross_attention_dim'
    options.spread(self, option, len(self.block_out_channels))
    dims = self.cross_attention_dim
    kinds = [
      *(DOWN_TYPES[kind] for kind in self.down_block_types),
      *(UP_TYPES[kind] for kind in self.up_block_types),
      MID_TYPES[self.mid_block_type],
    ]
    levels = zip(kinds, (*dims, *dims[::-1], dims[-1]), strict=True)
    widths = {dim for has_attention, dim in levels if has_attention}
    good = len(widths) < 2 and min(dims) > 0
    options.check(good, self, option, 'one width for all blocks with attention')
    object.__setattr__(self, option, widths.pop() if widths else dims[0])

  def _check_addition(self):
    names = 'addition_time_embed_dim', 'projection_class_embeddings_input_dim'
    dim, total = (getattr(self, name) for name in names)
    if self.addition_embed_type is None:
      for name in names:
        options.check(
          getattr(self, name) is None, self, name, 'None without text_time'
        )
      return
    options.check(
      options.is_count(dim) and dim > 0 and dim % 2 == 0,
      self,
      names[0],
      'an even integer above 0 with text_time',
    )
    options.check(
      options.is_count(total) and total > dim,
      self,
      names[1],
      f'an integer above {names[0]}={dim} with text_time',
    )
