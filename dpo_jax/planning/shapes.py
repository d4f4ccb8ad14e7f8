"""Models and batches as shapes: config files are enough, no weights."""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from dpo_jax import types
from dpo_jax.data import cached
from dpo_jax.weights import (
  diffusers_maps,
  json_files,
  model_index,
  pipeline,
  released,
)

# Name to (family, prediction type) of weights.released.
RELEASED = {
  'sd15': ('sd1', 'epsilon'),
  'sd21': ('sd2', released.V_PREDICTION),
  'sdxl': ('sdxl', 'epsilon'),
  'sdxl_refiner': ('sdxl_refiner', 'epsilon'),
}


@dataclasses.dataclass(frozen=True)
class Model:
  """A pipeline without weights.

  Attributes:
    parts: as pipeline.load reads it, without parameters.
    params: component name to shapes of its parameters.
    tokens: [k s], how many text encoders and tokens of each.
  """

  parts: pipeline.Pipeline
  params: dict[str, types.PyTree]
  tokens: tuple[int, int]


def read_model(name: str) -> Model:
  """The model of a diffusers folder with its JSON files, or of RELEASED.

  Raises ValueError for another name, or files that cannot be read.
  """
  folder = pathlib.Path(name).expanduser()
  if name in RELEASED and not folder.is_dir():
    parts = _released(name)
  elif folder.is_dir():
    parts = _read(folder)
  else:
    raise ValueError(
      f'model.folder={name!r}: a plan takes a local folder in the diffusers '
      'layout (its JSON files are enough), or one of ' + ', '.join(RELEASED)
    )
  texts = [
    config for key, config in parts.configs.items() if key.startswith('text')
  ]
  return Model(
    parts=parts,
    # As loading.open_model has it: what a model in pixels lacks is empty.
    params={'vae': {}}
    | {
      key: diffusers_maps.COMPONENTS[key].init_shapes(config)
      for key, config in parts.configs.items()
    },
    tokens=(
      (len(texts), texts[0].max_position_embeddings) if texts else (0, 1)
    ),
  )


def _released(name) -> pipeline.Pipeline:
  family, prediction_type = RELEASED[name]
  return pipeline.Pipeline(
    folder=pathlib.Path(name),
    class_name=released.CLASS_NAMES[family],
    configs={
      key: diffusers_maps.COMPONENTS[key].make_config(values)
      for key, values in released.model_configs(family, prediction_type).items()
    },
    scheduler_config=released.scheduler_config(family, prediction_type),
    params={},
    tokenizer_folders=(),
    **released.FLAGS[family],
  )


def _read(folder) -> pipeline.Pipeline:
  index = model_index.read(folder)
  configs = {
    key: diffusers_maps.read_config(key, folder / key)
    for key in index.components
  }
  model_index.check_parts(folder, index, configs)
  return pipeline.Pipeline(
    folder=folder,
    class_name=index.class_name,
    configs=configs,
    scheduler_config=json_files.read(
      folder / 'scheduler' / pipeline.SCHEDULER_CONFIG
    ),
    params={},
    tokenizer_folders=(),
    **index.flags,
  )


def text_states(model: Model) -> dict[str, tuple[int, ...]]:
  """Shapes of the text states of one caption, as a cache has them.

  Raises ValueError for an unconditional model, which has no cache.
  """
  if not model.tokens[0]:
    raise ValueError(
      f'{model.parts.folder}: works on pixels and takes no text, so that there '
      'is no cache to train from; give --cached=false'
    )
  unet = model.parts.configs['unet']
  shapes = {'prompt_embeds': (model.tokens[1], unet.cross_attention_dim)}
  if unet.addition_embed_type is not None:
    pooled = model.parts.configs['text_encoder_2'].projection_dim
    shapes['pooled_embeds'] = (pooled,)
  return shapes


def batch(
  model: Model, *, task: str, size: int, resolution: int, from_cache: bool
) -> Mapping[str, jax.ShapeDtypeStruct]:
  """Shapes of a global batch of `size` examples, as the loader makes it.

  from_cache: latents and text states instead of pictures and tokens.
  """
  images = (2,) if task == 'preference' else ()
  shapes = {
    'sizes': ((*images, 4), np.int32),
    'id': ((), np.uint32),
    'epoch': ((), np.uint32),
  }
  if from_cache:
    vae = model.parts.configs['vae']
    side = resolution // vae.downscale
    stored = np.dtype(cached.POSTERIOR_DTYPE)
    moments = (*images, side, side, 2 * vae.latent_channels)
    # Ids of records are wider than those of rows.
    shapes['id'] = (2,), np.uint32
    shapes['substituted'] = (), np.float32
    shapes['moments'] = moments, stored
    for name, shape in text_states(model).items():
      shapes[name] = shape, np.dtype(np.float16)
  else:
    shapes['images'] = (*images, resolution, resolution, 3), np.uint8
    shapes['input_ids'] = model.tokens, np.int32
  return {
    name: jax.ShapeDtypeStruct((size, *shape), dtype)
    for name, (shape, dtype) in shapes.items()
  }
