"""What config.json of a UNet2DModel may say, and what it means."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dpo_jax.models import options

# Has a block of this kind attention?
DOWN_TYPES = {'DownBlock2D': False, 'AttnDownBlock2D': True}
UP_TYPES = {'UpBlock2D': False, 'AttnUpBlock2D': True}
MID_TYPES = ('UNetMidBlock2D', None)
TIME_SHIFTS = ('default', 'scale_shift')

HARMLESS = frozenset({'sample_size'})
FIXED = {
  'time_embedding_type': ('positional',),
  'time_embedding_dim': (None,),
  'mid_block_scale_factor': (1,),
  'downsample_type': ('conv',),
  'upsample_type': ('conv',),
  'dropout': (0,),
  'act_fn': ('silu', 'swish'),
  'attn_norm_num_groups': (None,),
  'class_embed_type': (None,),
  'num_class_embeds': (None,),
  # Of learned time embeddings, which are refused above.
  'num_train_timesteps': (None,),
}


@dataclasses.dataclass(frozen=True)
class UNet2DConfig:
  """The options of a UNet2DModel; diffusers' names and defaults.

  Attributes, where they are not plain:
    attention_head_dim: the width of a head, and not the number of heads as in
      a UNet2DConditionModel; None is one head as wide as the level.
    downsample_padding: 1 pads both sides, 0 bottom and right only.
    add_attention: whether the middle block has attention.
    resnet_time_scale_shift: as of a UNet2DConditionModel; with scale_shift the
      attention of the middle block has no norm.
  """

  in_channels: int = 3
  out_channels: int = 3
  center_input_sample: bool = False
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  down_block_types: tuple[str, ...] = ('DownBlock2D',) + (
    'AttnDownBlock2D',
  ) * 3
  mid_block_type: str | None = 'UNetMidBlock2D'
  up_block_types: tuple[str, ...] = ('AttnUpBlock2D',) * 3 + ('UpBlock2D',)
  block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
  layers_per_block: int = 2
  downsample_padding: int = 1
  attention_head_dim: int | None = 8
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  resnet_time_scale_shift: str = 'default'
  add_attention: bool = True

  def __post_init__(self):
    options.check_types(self)
    options.check_kinds(
      self,
      {'down_block_types': DOWN_TYPES, 'up_block_types': UP_TYPES},
      {
        'mid_block_type': MID_TYPES,
        'resnet_time_scale_shift': TIME_SHIFTS,
      },
    )
    self._check_widths()

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'UNet2DConfig':
    """Reads unet/config.json; ValueError on an unsupported option."""
    return options.read(cls, values, fixed=FIXED, harmless=HARMLESS)

  def heads(self, channels: int) -> int:
    """The number of heads of attention over so many channels."""
    return channels // (self.attention_head_dim or channels)

  def _check_widths(self):
    channels, groups = self.block_out_channels, self.norm_num_groups
    for option in ('in_channels', 'out_channels', 'layers_per_block'):
      options.check(getattr(self, option) > 0, self, option, 'above 0')
    options.check(
      groups > 0 and all(c % groups == 0 for c in channels),
      self,
      'norm_num_groups',
      f'a divisor of each of block_out_channels={channels}',
    )
    options.check(
      self.downsample_padding in (0, 1), self, 'downsample_padding', '0, 1'
    )
    options.check(
      channels[0] % 2 == 0, self, 'block_out_channels', 'an even first width'
    )
    width = self.attention_head_dim
    good = width is None or (options.is_count(width) and width > 0)
    attended = self._attended()
    options.check(
      good and (width is None or all(c % width == 0 for c in attended)),
      self,
      'attention_head_dim',
      f'null, or a divisor of the widths with attention, {attended}',
    )

  def _attended(self) -> tuple[int, ...]:
    """The widths of the blocks that have attention."""
    channels = self.block_out_channels
    down = zip(self.down_block_types, channels, strict=True)
    up = zip(self.up_block_types, channels[::-1], strict=True)
    found = [c for kind, c in down if DOWN_TYPES[kind]]
    found += [c for kind, c in up if UP_TYPES[kind]]
    if self.mid_block_type is not None and self.add_attention:
      found.append(channels[-1])
    return tuple(sorted(set(found)))
