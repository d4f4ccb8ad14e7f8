"""BLIP's two encoders and ImageReward on them (Li et al. 2022, Xu et al. 2023).

A vision transformer sees the picture; BERT reads the caption and attends to
the picture's tokens in every layer. Modules have the names of the released
state (image-reward 1.5, ImageReward.py and models/BLIP).
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dpo_jax import types
from dpo_jax.models import blip_text, blip_vision, clip_pair

# What the original normalises its scores with.
SCORE_MEAN = 0.16717362830052426
SCORE_STD = 1.0333394966054072


@dataclasses.dataclass(frozen=True)
class Config:
  """The options of both encoders."""

  text: blip_text.TextConfig
  vision: blip_vision.VisionConfig


class ImageReward(nn.Module):
  """How well people would like a picture as an answer to a caption."""

  config: Config
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, pixels: Float[Array, 'n H W 3'], input_ids: Int[Array, 'n s']
  ) -> Float[Array, ' n']:
    """(f - mean) / std, float32; about 0 with a spread of 1.

    f is five dense layers, those of AestheticPredictor, on the text encoder's
    state at the first token. pixels: normalised as CLIP's, of image_size.
    input_ids: padded at the end with pad_token_id.

    Raises:
      ValueError: pictures of another size, more tokens than positions.
    """
    states = BLIP(self.config, self.dtype, name='blip')(pixels, input_ids)
    raw = clip_pair.AestheticPredictor(name='mlp')(
      states[:, 0].astype(jnp.float32)
    )
    return (raw - SCORE_MEAN) / SCORE_STD


class BLIP(nn.Module):
  """Captions read with their pictures: the states of the text encoder."""

  config: Config
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, pixels: Float[Array, 'n H W 3'], input_ids: Int[Array, 'n s']
  ) -> Float[Array, 'n s d']:
    images = blip_vision.VisionTransformer(
      self.config.vision, self.dtype, name='visual_encoder'
    )(pixels)
    return blip_text.TextEncoder(
      self.config.text, self.dtype, name='text_encoder'
    )(input_ids, images)
