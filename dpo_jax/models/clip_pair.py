"""CLIP: its two towers, and what stands on their embeddings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dpo_jax import types
from dpo_jax.models import clip, clip_vision, layers, options

# Of CLIPConfig; the towers' own options are in text_config, vision_config.
HARMLESS = clip.HARMLESS | {'logit_scale_init_value'}
# Old releases wrote a tower's options twice; the second ones count.
SECOND = {
  'text_config': 'text_config_dict',
  'vision_config': 'vision_config_dict',
}


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """The options of both towers, whose projections are of one width."""

  text_config: clip.CLIPTextConfig
  vision_config: clip_vision.CLIPVisionConfig

  def __post_init__(self):
    options.check(
      self.text_config.projection_dim == self.vision_config.projection_dim,
      self.text_config,
      'projection_dim',
      f"the image tower's {self.vision_config.projection_dim}",
    )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'CLIPConfig':
    """Reads the config.json of transformers' CLIPModel.

    `projection_dim` beside the towers is theirs, as it is in transformers.
    Raises ValueError on an unsupported option.
    """
    values = dict(values)
    width = values.pop('projection_dim', 512)
    towers = {}
    for name, second in SECOND.items():
      tower = (values.pop(name, None) or {}) | (values.pop(second, None) or {})
      towers[name] = tower | {'projection_dim': width}
    text, vision = towers['text_config'], towers['vision_config']
    return options.read(
      cls,
      values
      | {
        'text_config': clip.CLIPTextConfig.from_dict(text),
        'vision_config': clip_vision.CLIPVisionConfig.from_dict(vision),
      },
      fixed={},
      harmless=HARMLESS,
    )


@dataclasses.dataclass(frozen=True)
class CLIP:
  """The two towers; parameters are not held here.

  They are one tree: text_model, text_projection, vision_model,
  visual_projection, and the number logit_scale.
  """

  config: CLIPConfig
  dtype: types.DTypeLike = jnp.float32

  def _text(self) -> nn.Module:
    return clip.CLIPTextModelWithProjection(self.config.text_config, self.dtype)

  def _vision(self) -> nn.Module:
    return clip_vision.CLIPVisionModelWithProjection(
      self.config.vision_config, self.dtype
    )

  def init(self, key: types.Key) -> types.Params:
    """Random float32 parameters, logit_scale log(1 / 0.07) (section 2.3)."""
    text_key, vision_key = jax.random.split(key)
    side = self.config.vision_config.image_size
    ids = jnp.zeros((1, 1), jnp.int32)
    pixels = jnp.zeros((1, side, side, 3), jnp.float32)
    return {
      **self._text().init(text_key, ids)['params'],
      **self._vision().init(vision_key, pixels)['params'],
      'logit_scale': -jnp.log(jnp.float32(0.07)),
    }

  def embed_texts(
    self, params: types.Params, input_ids: Int[Array, 'n s']
  ) -> Float[Array, 'n e']:
    """Embeddings of length 1, float32."""
    names = ('text_model', 'text_projection')
    found = self._text().apply({'params': _part(params, names)}, input_ids)
    return normalise(found.pooled)

  def embed_images(
    self, params: types.Params, pixels: Float[Array, 'n H W 3']
  ) -> Float[Array, 'n e']:
    """Embeddings of length 1, float32, of normalised pixels."""
    names = ('vision_model', 'visual_projection')
    found = self._vision().apply({'params': _part(params, names)}, pixels)
    return normalise(found)


class AestheticPredictor(nn.Module):
  """LAION's improved aesthetic predictor: image embeddings to 1 .. 10.

  Five dense layers without activations on embeddings [n 768] of length 1 of
  CLIP ViT-L/14; the indices skip what was dropout (Schuhmann, 2022,
  sac+logos+ava1-l14-linearMSE).
  """

  widths: tuple[int, ...] = (1024, 128, 64, 16, 1)
  indices: tuple[int, ...] = (0, 2, 4, 6, 7)

  @nn.compact
  def __call__(self, embeds: Float[Array, 'n e']) -> Float[Array, ' n']:
    x = embeds
    for index, width in zip(self.indices, self.widths, strict=True):
      x = layers.Dense(width, name=f'layers_{index}')(x)
    return x[:, 0].astype(jnp.float32)


def normalise(embeds: Float[Array, 'n e']) -> Float[Array, 'n e']:
  """Vectors of length 1."""
  return embeds / jnp.linalg.norm(embeds, axis=-1, keepdims=True)


def _part(params: types.Params, names: tuple[str, ...]) -> types.Params:
  return {name: params[name] for name in names}
