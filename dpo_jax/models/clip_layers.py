"""The transformer that both towers of CLIP share, as transformers has it."""

from typing import Protocol, runtime_checkable

import jax
from flax import linen as nn

from dpo_jax import types
from dpo_jax.models import attention, layers, options

ACTIVATIONS = {
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
}


@runtime_checkable
class Config(Protocol):
  """What the layers ask of a tower's options."""

  hidden_size: int
  intermediate_size: int
  projection_dim: int
  num_hidden_layers: int
  num_attention_heads: int
  hidden_act: str
  layer_norm_eps: float


def check(config: Config) -> None:
  """Raises ValueError naming an option that the layers do not have."""
  allowed = ' or '.join(ACTIVATIONS)
  options.check(config.hidden_act in ACTIVATIONS, config, 'hidden_act', allowed)
  for option in ('num_hidden_layers', 'projection_dim'):
    options.check(getattr(config, option) > 0, config, option, '1 or more')
  options.check_heads(config)


class Encoder(nn.Module):
  """The stack of layers; what leaves the last one and what enters it."""

  config: Config
  dtype: types.DTypeLike
  is_causal: bool

  @nn.compact
  def __call__(self, x):
    before = x
    for i in range(self.config.num_hidden_layers):
      before = x
      x = EncoderLayer(
        self.config, self.dtype, self.is_causal, name=f'layers_{i}'
      )(x)
    return x, before


class EncoderLayer(nn.Module):
  """Self-attention and a two-layer network, norms first."""

  config: Config
  dtype: types.DTypeLike
  is_causal: bool

  @nn.compact
  def __call__(self, x):
    def norm(name):
      return layers.layer_norm(
        dtype=self.dtype, name=name, eps=self.config.layer_norm_eps
      )

    h = norm('layer_norm1')(x)
    x = x + SelfAttention(
      self.config.num_attention_heads,
      self.dtype,
      self.is_causal,
      name='self_attn',
    )(h)
    h = norm('layer_norm2')(x)
    return x + FeedForward(self.config, self.dtype, name='mlp')(h)


class SelfAttention(nn.Module):
  """Attention with transformers' parameter names."""

  heads: int
  dtype: types.DTypeLike
  is_causal: bool

  @nn.compact
  def __call__(self, x):
    n, s, d = x.shape

    def project(name):
      out = layers.Dense(d, dtype=self.dtype, name=name)(x)
      return out.reshape(n, s, self.heads, d // self.heads)

    q, k, v = project('q_proj'), project('k_proj'), project('v_proj')
    out = attention.attend(q, k, v, is_causal=self.is_causal)
    out = out.reshape(n, s, d)
    return layers.Dense(d, dtype=self.dtype, name='out_proj')(out)


class FeedForward(nn.Module):
  """Dense, activation, dense."""

  config: Config
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    config = self.config
    h = layers.Dense(config.intermediate_size, dtype=self.dtype, name='fc1')(x)
    h = ACTIVATIONS[config.hidden_act](h)
    return layers.Dense(config.hidden_size, dtype=self.dtype, name='fc2')(h)
