"""BLIP's text encoder, with the names of its release (`med.py`).

BERT (Devlin et al. 2019: norms last) that also attends to a picture's tokens
in every layer, between its own attention and its two-layer network.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dpo_jax import types
from dpo_jax.models import attention_kernels, layers, options

FIXED = {
  'hidden_act': ('gelu',),
  'add_cross_attention': (True,),
  'position_embedding_type': ('absolute',),
}
# `encoder_width` is overwritten by the image encoder's in the original.
HARMLESS = frozenset(
  'architectures model_type attention_probs_dropout_prob hidden_dropout_prob'
  ' initializer_range type_vocab_size encoder_width transformers_version'
  ' torch_dtype use_cache gradient_checkpointing classifier_dropout'
  ' chunk_size_feed_forward'.split()
)


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The options of the text encoder; names and values of med_config.json."""

  vocab_size: int = 30524
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  max_position_embeddings: int = 512
  layer_norm_eps: float = 1e-12
  pad_token_id: int = 0

  def __post_init__(self):
    options.check_types(self)
    options.check_heads(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'TextConfig':
    """Reads med_config.json; ValueError on an unsupported option."""
    return options.read(cls, values, fixed=FIXED, harmless=HARMLESS)


def real_tokens(
  input_ids: Int[Array, 'n s'], pad_token_id: int
) -> Bool[Array, 'n s']:
  """Which tokens stand before the padding at the end.

  The last token of a text is never the padding's, but one within may be: a
  caption that spells [PAD].
  """
  real = input_ids != pad_token_id
  return jnp.flip(jnp.cumsum(jnp.flip(real, axis=-1), axis=-1), axis=-1) > 0


class TextEncoder(nn.Module):
  """Token ids and a picture's tokens to text states."""

  config: TextConfig
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, input_ids: Int[Array, 'n s'], images: Float[Array, 'n p c']
  ) -> Float[Array, 'n s d']:
    """States [n s d]; those at the padding mean nothing.

    input_ids: padded at the end with pad_token_id, never all padding.

    Raises:
      ValueError: more tokens than the encoder has positions.
    """
    config = self.config
    mask = real_tokens(input_ids, config.pad_token_id)
    x = Embeddings(config, self.dtype, name='embeddings')(input_ids)
    return Layers(config, self.dtype, name='encoder')(x, images, mask)


class Embeddings(nn.Module):
  """Token plus position embedding, normed; no token types."""

  config: TextConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, input_ids):
    config, length = self.config, input_ids.shape[-1]
    if length > config.max_position_embeddings:
      raise ValueError(
        f'{length} tokens for a text encoder of max_position_embeddings='
        f'{config.max_position_embeddings}; tokenize with truncation'
      )

    def table(rows, name):
      return nn.Embed(
        rows,
        config.hidden_size,
        embedding_init=nn.initializers.normal(0.02),
        dtype=self.dtype,
        name=name,
      )

    tokens = table(config.vocab_size, 'word_embeddings')(input_ids)
    positions = table(config.max_position_embeddings, 'position_embeddings')
    x = tokens + positions(jnp.arange(length))
    return _norm(config, self.dtype)(x)


class Layers(nn.Module):
  """The stack of layers."""

  config: TextConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x, images, mask):
    for i in range(self.config.num_hidden_layers):
      x = Layer(self.config, self.dtype, name=f'layer_{i}')(x, images, mask)
    return x


class Layer(nn.Module):
  """Attention to the text, to the picture, and a two-layer network."""

  config: TextConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x, images, mask):
    config = self.config
    x = Attention(config, self.dtype, name='attention')(x, x, mask)
    everything = jnp.ones(images.shape[:2], bool)
    x = Attention(config, self.dtype, name='crossattention')(
      x, images, everything
    )
    h = Intermediate(config, self.dtype, name='intermediate')(x)
    return Output(config, self.dtype, name='output')(h, x)


class Attention(nn.Module):
  """Attention of `x` to `context`, added to x and normed."""

  config: TextConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x, context, mask):
    h = Heads(self.config, self.dtype, name='self')(x, context, mask)
    return Output(self.config, self.dtype, name='output')(h, x)


class Heads(nn.Module):
  """What the heads found, side by side."""

  config: TextConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x, context, mask):
    width, heads = self.config.hidden_size, self.config.num_attention_heads

    def project(name, inputs):
      out = layers.Dense(width, dtype=self.dtype, name=name)(inputs)
      return out.reshape(*out.shape[:2], heads, width // heads)

    q = project('query', x)
    k, v = project('key', context), project('value', context)
    return attention_kernels.masked(q, k, v, mask).reshape(x.shape)


class Intermediate(nn.Module):
  """Dense and gelu."""

  config: TextConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    h = layers.Dense(
      self.config.intermediate_size, dtype=self.dtype, name='dense'
    )(x)
    return jax.nn.gelu(h, approximate=False)


class Output(nn.Module):
  """Dense, added to what came before and normed."""

  config: TextConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, h, before):
    h = layers.Dense(self.config.hidden_size, dtype=self.dtype, name='dense')(h)
    return _norm(self.config, self.dtype)(h + before)


def _norm(config, dtype):
  return layers.layer_norm(
    dtype=dtype, name='LayerNorm', eps=config.layer_norm_eps
  )
