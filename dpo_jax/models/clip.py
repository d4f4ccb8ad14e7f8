"""The CLIP text encoder (Radford et al. 2021), as transformers has it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dpo_jax import types
from dpo_jax.models import clip_layers, layers, options

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
  # Older releases wrote all options of text generation into every config.
  + 'bad_words_ids begin_suppress_tokens decoder_start_token_id'
  ' diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size'
  ' exponential_decay_length_penalty finetuning_task forced_bos_token_id'
  ' forced_eos_token_id length_penalty max_length min_length'
  ' no_repeat_ngram_size num_beam_groups num_beams num_return_sequences'
  ' output_scores prefix remove_invalid_values repetition_penalty'
  ' return_dict_in_generate sep_token_id suppress_tokens'
  ' task_specific_params temperature tf_legacy_loss tokenizer_class top_k'
  ' top_p typical_p use_bfloat16'.split()
)
FIXED = {
  'attention_dropout': (0.0,),
  'dropout': (0.0,),
  'add_cross_attention': (False,),
  'cross_attention_hidden_size': (None,),
  'pruned_heads': ({},),
  'torchscript': (False,),
}


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
    clip_layers.check(self)

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
    x, penultimate = clip_layers.Encoder(
      config, self.dtype, is_causal=True, name='encoder'
    )(x)
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
