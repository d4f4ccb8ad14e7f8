"""Rewards r = P(benign | picture): the networks that censor.

Yoon et al., 2023, arXiv 2307.02770, section 3: a few labels, so small networks
and several of them. All give one logit f an example; r = sigmoid(f).

  time      x_t and t: half a UNet with attention pooling
  clean     x_0, pixels or latents: a residual network (He et al., 2016, with
            group norm: a logit hangs on its own picture only)
  features  CLIP's embedding of a picture: one hidden layer
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dpo_jax import types
from dpo_jax.models import layers, options

KINDS = ('time', 'clean', 'features')


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """The shape of a reward network.

  Attributes:
    kind: one of KINDS.
    in_channels: of its input; of `features` their number.
    widths: channels of each level; the next one has half the side.
    depth: residual blocks a level.
    num_heads: of the attention that pools, for `time`.
    norm_num_groups: divides all widths.
  """

  kind: str
  in_channels: int
  widths: tuple[int, ...] = (32, 64, 128)
  depth: int = 1
  num_heads: int = 4
  norm_num_groups: int = 8

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f'kind={self.kind!r}: must be one of {", ".join(KINDS)}')
    for name in ('in_channels', 'depth', 'num_heads', 'norm_num_groups'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f'{name}={value!r}: must be a positive integer')
    if not self.widths or any(w < 1 for w in self.widths):
      raise ValueError(f'widths={self.widths}: must be positive integers')
    uneven = [w for w in self.widths if w % self.norm_num_groups]
    if uneven and self.kind != 'features':
      raise ValueError(
        f'widths={self.widths}: {uneven[0]} is no multiple of '
        f'norm_num_groups={self.norm_num_groups}'
      )
    if self.kind == 'time' and self.widths[-1] % self.num_heads:
      raise ValueError(
        f'widths={self.widths}: the last is no multiple of '
        f'num_heads={self.num_heads}'
      )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'RewardConfig':
    """Reads config.json; ValueError names an option there is not."""
    return options.read(cls, dict(values), fixed={}, harmless=())


class Reward(nn.Module):
  """(x, t) -> f [n] float32; t [n] is looked at by kind `time` alone.

  x: [n h w c], or [n c] for `features`.
  """

  config: RewardConfig
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'n *h c'], t: types.Timesteps
  ) -> Float[Array, ' n']:
    config = self.config
    if x.shape[-1] != config.in_channels:
      raise ValueError(
        f'a reward of {config.in_channels} channels was given {x.shape[-1]}'
      )
    if config.kind == 'features':
      h = nn.silu(layers.Dense(config.widths[0], name='hidden')(x))
    else:
      h = self._trunk(x.astype(self.dtype), t)
    # As a start all rewards are one half: no guidance before training.
    logit = nn.Dense(
      1, kernel_init=nn.initializers.zeros, dtype=jnp.float32, name='logit'
    )
    return logit(h.astype(jnp.float32))[:, 0]

  def _trunk(self, x, t):
    config, temb = self.config, None
    if config.kind == 'time':
      temb = layers.timestep_features(
        t, config.widths[0], flip_sin_to_cos=True, freq_shift=0.0
      )
      temb = layers.TimestepEmbedding(
        4 * config.widths[0], dtype=self.dtype, name='time_embedding'
      )(temb.astype(self.dtype))
    h = layers.conv(config.widths[0], dtype=self.dtype, name='conv_in')(x)
    for level, width in enumerate(config.widths):
      for block in range(config.depth):
        h = layers.ResnetBlock2D(
          width,
          config.norm_num_groups,
          1e-5,
          dtype=self.dtype,
          name=f'level_{level}_resnet_{block}',
        )(h, temb)
      if level < len(config.widths) - 1:
        h = layers.Downsample2D(
          width, dtype=self.dtype, name=f'level_{level}_down'
        )(h)
    h = layers.group_norm(
      config.norm_num_groups, 1e-5, dtype=self.dtype, name='norm_out'
    )(h)
    h = nn.silu(h)
    if config.kind == 'clean':
      return jnp.mean(h.astype(jnp.float32), axis=(1, 2))
    return AttentionPool(config.num_heads, dtype=self.dtype, name='pool')(h)


class AttentionPool(nn.Module):
  """The mean over positions attends to all of them, and is what is returned.

  As CLIP's ResNets end (Radford et al., 2021, section 2.4), without learned
  positions: what is malign may stand anywhere.
  """

  num_heads: int
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: layers.Features) -> Float[Array, 'n c']:
    n, _, _, c = x.shape
    tokens = x.reshape(n, -1, c)
    tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)

    def heads(name, of):
      made = layers.Dense(c, dtype=self.dtype, name=name)(of)
      return made.reshape(n, -1, self.num_heads, c // self.num_heads)

    pooled = nn.dot_product_attention(
      heads('to_q', tokens[:, :1]),
      heads('to_k', tokens),
      heads('to_v', tokens),
      force_fp32_for_softmax=True,
    ).reshape(n, c)
    return layers.Dense(c, dtype=self.dtype, name='to_out')(pooled)


def log_reward(
  logits: Sequence[Float[Array, ' n']] | Float[Array, 'k n'],
) -> Float[Array, ' n']:
  """log r = sum over K networks of log sigmoid(f_k), float32.

  Yoon et al., 2023, section 3.2: the ensemble's product is near 1 only where
  all networks say benign.
  """
  return sum(jax.nn.log_sigmoid(f.astype(jnp.float32)) for f in logits)


def find_offset(malign_share: float, odds: float) -> float:
  """What a logit lacks where the share of malign pictures is another one.

  A network whose labels came at `odds`, benign to malign, weights counted,
  says f = log(odds p(x | benign) / p(x | malign)) at its best. Of a generator
  that draws malign_share malign the odds are others, and log r of most noisy
  states is then near 0 (Saerens et al., 2002, eq. 2.4).
  """
  return math.log((1 - malign_share) / malign_share) - math.log(odds)


def make_log_reward_fn(
  module: Reward,
  members: Sequence[types.Params],
  offsets: Sequence[float] = (),
) -> Callable[[Float[Array, 'n *h c'], types.Timesteps], Float[Array, ' n']]:
  """(x, t) -> log r [n] of an ensemble's members.

  offsets: what is added to the logit of each; none: nothing.

  One after the other: mapped over by `vmap`, convolutions whose weights differ
  were seen five times slower on a CPU.
  """

  offsets = offsets or (0.0,) * len(members)

  def log_reward_fn(x, t):
    return log_reward(
      [
        module.apply({'params': params}, x, t) + offset
        for params, offset in zip(members, offsets, strict=True)
      ]
    )

  return log_reward_fn
