"""The CLIP text encoder (Radford et al. 2021), as transformers has it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dpo_jax import types
from dpo_jax.models import attention, layers, options

ACTIVATIONS = {
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
}
# Written by the old releases of transformers, whose end-of-text id was wrong.
LEGACY_EOS = 2
# Tokens, training, serialisation and text generation: none changes the states.
HARMLESS = frozenset(
  'architectures model_type transformers_version torch_dtype dtype'
  ' initializer_factor initializer_range pad_token_id bos_token_id'
  ' return_dict output_attentions output_hidden_states'
  ' use_cache chunk_size_feed_forward is_encoder_decoder is_decoder'
  ' tie_word_embeddings id2label label2id problem_type'
  ' gradient_checkpointing'.split()
)
FIXED = {'attention_dropout': (0.0,), 'dropout': (0.0,)}


class TextOutput(NamedTuple):
  """What a text encoder says of n prompts of s tokens, float32.

  Attributes:
    last_hidden_state: after the final norm; conditions SD 1.x and 2.x.
    penultimate: what enters the last layer, not normed (`hidden_states[-2]` of
      transformers); conditions SDXL.
    pooled: of the whole prompt, from `last_hidden_state` at the end of text.
  """

  last_hidden_state: Float[Array, 'n s d']
  penultimate: Float[Array, 'n s d']
  pooled: Float[Array, 'n e']


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """The options of a CLIP text encoder; transformers' names and defaults.

  `projection_dim` is of CLIPTextModelWithProjection alone.
  """

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5
  eos_token_id: int = 49407

  def __post_init__(self):
    options.check_types(self)
    allowed = ' or '.join(ACTIVATIONS)
    options.check(self.hidden_act in ACTIVATIONS, self, 'hidden_act', allowed)
    for option in ('num_hidden_layers', 'projection_dim'):
      options.check(getattr(self, option) > 0, self, option, '1 or more')
    heads = self.num_attention_heads
    options.check(
      heads > 0 and self.hidden_size % heads == 0,
      self,
      'num_attention_heads',
      f'a divisor of hidden_size={self.hidden_size}',
    )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'CLIPTextConfig':
    """Reads text_encoder/config.json; ValueError on an unsupported option."""
    return options.read(cls, values, fixed=FIXED, harmless=HARMLESS)


class CLIPTextModel(nn.Module):
  """Token ids to text states."""

  config: CLIPTextConfig
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, input_ids: Int[Array, 'n s']) -> TextOutput:
    """States and, as `pooled` [n d], the last state at the end of text.

    That is the first end-of-text token; with the legacy `eos_token_id` 2 the
    largest id, which is the end of text in CLIP's vocabulary.

    Raises:
      ValueError: more tokens than the encoder has positions.
    """
    return TextTransformer(self.config, self.dtype, name='text_model')(
      input_ids
    )


class CLIPTextModelWithProjection(nn.Module):
  """A CLIPTextModel whose pooled state is projected to where images are."""

  config: CLIPTextConfig
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, input_ids: Int[Array, 'n s']) -> TextOutput:
    """As CLIPTextModel, but `pooled` [n projection_dim] is projected.

    Raises:
      ValueError: more tokens than the encoder has positions.
    """
    output = TextTransformer(self.config, self.dtype, name='text_model')(
      input_ids
    )
    pooled = layers.Dense(
      self.config.projection_dim,
      use_bias=False,
      dtype=self.dtype,
      name='text_projection',
    )(output.pooled.astype(self.dtype))
    return output._replace(pooled=pooled.astype(jnp.float32))


class TextTransformer(nn.Module):
  """The body of the encoder, beside which a projection may stand."""

  config: CLIPTextConfig
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, input_ids):
    config = self.config
    x = Embeddings(config, self.dtype, name='embeddings')(input_ids)
    x, penultimate = Encoder(config, self.dtype, name='encoder')(x)
    states = layers.layer_norm(
      dtype=self.dtype, name='final_layer_norm', eps=config.layer_norm_eps
    )(x).astype(jnp.float32)
    if config.eos_token_id == LEGACY_EOS:
      position = jnp.argmax(input_ids, axis=-1)
    else:
      position = jnp.argmax(input_ids == config.eos_token_id, axis=-1)
    return TextOutput(
      last_hidden_state=states,
      penultimate=penultimate.astype(jnp.float32),
      pooled=states[jnp.arange(len(states)), position],
    )


class Embeddings(nn.Module):
  """Token plus position embedding."""

  config: CLIPTextConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, input_ids):
    config, length = self.config, input_ids.shape[-1]
    if length > config.max_position_embeddings:
      raise ValueError(
        f'{length} tokens for a text encoder of'
        f' max_position_embeddings={config.max_position_embeddings}; tokenize'
        ' with truncation'
      )

    def table(rows, name):
      return nn.Embed(
        rows,
        config.hidden_size,
        embedding_init=nn.initializers.normal(0.02),
        dtype=self.dtype,
        name=name,
      )

    tokens = table(config.vocab_size, 'token_embedding')(input_ids)
    positions = table(config.max_position_embeddings, 'position_embedding')
    return tokens + positions(jnp.arange(length))


class Encoder(nn.Module):
  """The stack of layers; what leaves the last one and what enters it."""

  config: CLIPTextConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    before = x
    for i in range(self.config.num_hidden_layers):
      before = x
      x = EncoderLayer(self.config, self.dtype, name=f'layers_{i}')(x)
    return x, before


class EncoderLayer(nn.Module):
  """Causal self-attention and a two-layer network, norms first."""

  config: CLIPTextConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    def norm(name):
      return layers.layer_norm(
        dtype=self.dtype, name=name, eps=self.config.layer_norm_eps
      )

    h = norm('layer_norm1')(x)
    x = x + SelfAttention(
      self.config.num_attention_heads, self.dtype, name='self_attn'
    )(h)
    h = norm('layer_norm2')(x)
    return x + FeedForward(self.config, self.dtype, name='mlp')(h)


class SelfAttention(nn.Module):
  """Causal attention with transformers' parameter names."""

  heads: int
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    n, s, d = x.shape

    def project(name):
      out = layers.Dense(d, dtype=self.dtype, name=name)(x)
      return out.reshape(n, s, self.heads, d // self.heads)

    q, k, v = project('q_proj'), project('k_proj'), project('v_proj')
    out = attention.attend(q, k, v, is_causal=True).reshape(n, s, d)
    return layers.Dense(d, dtype=self.dtype, name='out_proj')(out)


class FeedForward(nn.Module):
  """Dense, activation, dense."""

  config: CLIPTextConfig
  dtype: types.DTypeLike

  @nn.compact
  def __call__(self, x):
    config = self.config
    h = layers.Dense(config.intermediate_size, dtype=self.dtype, name='fc1')(x)
    h = ACTIVATIONS[config.hidden_act](h)
    return layers.Dense(config.hidden_size, dtype=self.dtype, name='fc2')(h)
