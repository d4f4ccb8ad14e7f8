"""UNet2DConditionModel of Stable Diffusion 1.x, 2.x, SDXL and its refiner."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dpo_jax import types
from dpo_jax.models import layers, transformer, unet_blocks, unet_config

REMAT = unet_blocks.REMAT
# Who needs the model needs its config; the blocks between them need it first.
UNetConfig = unet_config.UNetConfig


class UNet2DConditionModel(nn.Module):
  """Predicts noise (or v) from noisy latents, timestep and text states.

  `remat` says what the backward pass computes again instead of keeping, of
  each residual block, transformer layer, upsampler, and of the norms and
  projections beside them: 'none'; 'full', everything (least
  memory, a forward pass more); 'dots', all but convolutions and products
  with weights; 'names', all but what the transformer layers name. The numbers
  are the same. `residual_dtype` is that of the sums that run through the
  network beside its blocks, None being `dtype`. `attention` is a backend of
  models.attention.
  """

  config: UNetConfig
  dtype: types.DTypeLike = jnp.float32
  remat: str = 'none'
  residual_dtype: types.DTypeLike | None = None
  attention: str = 'xla'

  @nn.compact
  def __call__(
    self,
    x_t: types.Latents,
    t: types.Timesteps,
    prompt_embeds: types.PromptEmbeds,
    pooled_embeds: Float[Array, 'n e'] | None = None,
    micro_cond: Float[Array, 'n m'] | None = None,
  ) -> types.Latents:
    """Output [n h w c], float32.

    A UNet of addition_embed_type 'text_time' (SDXL) takes `pooled_embeds` and
    `micro_cond` (m is 6, of the refiner 5), any other takes neither.

    Raises:
      ValueError: an unknown `remat`; conditioning that is missing, of the wrong
        width, or not taken by this UNet.
    """
    config, dtype = self.config, self.dtype
    self._check_text(prompt_embeds)
    self._check_addition(pooled_embeds, micro_cond)
    width = config.block_out_channels[0]
    temb = layers.TimestepEmbedding(4 * width, dtype, name='time_embedding')(
      self._sinusoids(t, width).astype(dtype)
    )
    if config.addition_embed_type is not None:
      numbers = self._sinusoids(
        micro_cond.reshape(-1), config.addition_time_embed_dim
      ).reshape(len(micro_cond), -1)
      features = jnp.concatenate(
        [pooled_embeds.astype(dtype), numbers.astype(dtype)], axis=-1
      )
      temb += layers.TimestepEmbedding(4 * width, dtype, name='add_embedding')(
        features
      )
    context = prompt_embeds.astype(dtype)
    x = x_t.astype(dtype)
    stream = self.residual_dtype or dtype
    if config.center_input_sample:
      x = 2 * x - 1
    x = layers.conv(width, dtype=dtype, name='conv_in')(x).astype(stream)

    settings = (config, dtype, self.remat, self.attention)
    skips = [x]
    for i in range(len(config.block_out_channels)):
      block = unet_blocks.DownBlock(*settings, i, name=f'down_blocks_{i}')
      x, outputs = block(x, temb, context)
      skips += outputs
    if config.mid_block_type is not None:
      x = unet_blocks.MidBlock(*settings, name='mid_block')(x, temb, context)
    for i in range(len(config.block_out_channels)):
      block = unet_blocks.UpBlock(*settings, i, name=f'up_blocks_{i}')
      x = block(x, skips, temb, context)

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

  def _sinusoids(self, values, dim):
    return layers.timestep_features(
      values,
      dim,
      flip_sin_to_cos=self.config.flip_sin_to_cos,
      freq_shift=self.config.freq_shift,
    )

  def _check_text(self, prompt_embeds):
    if self.remat not in REMAT:
      raise ValueError(f'remat={self.remat!r}; allowed: {", ".join(REMAT)}')
    if prompt_embeds.shape[-1] != self.config.cross_attention_dim:
      raise ValueError(
        f'prompt_embeds of width {prompt_embeds.shape[-1]} for a UNet of'
        f' cross_attention_dim={self.config.cross_attention_dim}; is the text'
        ' encoder the one of this pipeline?'
      )

  def _check_addition(self, pooled_embeds, micro_cond):
    config = self.config
    kind, dim = config.addition_embed_type, config.addition_time_embed_dim
    given = {'pooled_embeds': pooled_embeds, 'micro_cond': micro_cond}
    if kind is None:
      extra = [name for name, value in given.items() if value is not None]
      if extra:
        raise ValueError(
          f'{" and ".join(extra)} given to a UNet of addition_embed_type=None,'
          ' which takes neither; is it the UNet of an SDXL pipeline?'
        )
      return
    missing = [name for name, value in given.items() if value is None]
    if missing:
      raise ValueError(
        f'no {" and no ".join(missing)} for a UNet of addition_embed_type='
        f'{kind!r}; it takes both, the pooled text and the sizes'
      )
    text, numbers = pooled_embeds.shape[-1], micro_cond.shape[-1]
    total = config.projection_class_embeddings_input_dim
    if text + numbers * dim != total:
      raise ValueError(
        f'pooled_embeds of width {text} and {numbers} numbers of micro_cond'
        f' make {text} + {numbers} * {dim} = {text + numbers * dim}, this UNet'
        f' has projection_class_embeddings_input_dim={total}; SDXL takes width'
        ' 1280 and 6 numbers, its refiner 1280 and 5'
      )
