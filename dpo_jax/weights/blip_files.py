"""Reads ImageReward: med_config.json and model.safetensors of a folder.

The published ImageReward.pt is a pickle; model.safetensors holds its tensors
under their names. The sizes of the image encoder are those of the tensors,
with heads of 64 as in all of BLIP's.
"""

import pathlib

import jax
import jax.numpy as jnp

from dpo_jax import types
from dpo_jax.models import blip, blip_text, blip_vision
from dpo_jax.weights import (
  diffusers_maps,
  json_files,
  mapping,
  safetensors_io,
  weight_files,
)

CONFIG = 'med_config.json'
RULES = mapping.Rules(
  indexed=('blocks', 'layer', 'layers'),
  bare=('cls_token', 'pos_embed'),
  # A buffer, and the projections of BLIP's contrastive loss, which the score
  # does not use.
  ignored=(
    r'^blip\.text_encoder\.embeddings\.position_ids$',
    r'^blip\.(vision|text)_proj\.(weight|bias)$',
  ),
)
VISION = 'blip.visual_encoder'
HEAD_WIDTH = 64


def load(
  folder: str | pathlib.Path, *, dtype: str = 'float32'
) -> tuple[blip.Config, types.Params]:
  """(config, parameters of `dtype` as NumPy arrays).

  Raises:
    ValueError: one line naming the file: not there, an option that is not
      supported, tensors that are missing, left over or misshapen.
  """
  folder = pathlib.Path(folder)
  if not weight_files.exist(folder, 'model'):
    raise ValueError(
      f'{folder}: no model.safetensors; ImageReward is published as a pickle, '
      'ImageReward.pt, which can run code when opened: save its tensors under '
      'the same names with safetensors'
    )
  tensors = weight_files.open_weights(folder, 'model')
  values = json_files.read(folder / CONFIG)
  try:
    text = blip_text.TextConfig.from_dict(values)
  except ValueError as error:
    raise ValueError(f'{folder / CONFIG}: {error}') from error
  config = blip.Config(text, vision_config(tensors))
  kind = diffusers_maps.check_dtype(dtype)
  return config, mapping.to_flax(tensors, shapes(config), RULES, dtype=kind)


def shapes(config: blip.Config) -> types.PyTree:
  """The parameters' shapes; nothing is computed."""
  side = config.vision.image_size
  return jax.eval_shape(
    blip.ImageReward(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
    jax.ShapeDtypeStruct((1, 1), jnp.int32),
  )['params']


def vision_config(tensors: safetensors_io.Tensors) -> blip_vision.VisionConfig:
  """From the shapes of the image encoder's tensors; ValueError if not its."""
  names = {
    'patches': f'{VISION}.patch_embed.proj.weight',
    'positions': f'{VISION}.pos_embed',
    'mlp': f'{VISION}.blocks.0.mlp.fc1.weight',
  }
  missing = [name for name in names.values() if name not in tensors.keys()]
  if missing:
    raise ValueError(f'{tensors.source}: no {missing[0]}: not ImageReward')
  found = {key: tensors.shape(name) for key, name in names.items()}
  try:
    width, _, _, patch = found['patches']
    _, positions, _ = found['positions']
    hidden, _ = found['mlp']
    return blip_vision.VisionConfig(
      hidden_size=width,
      intermediate_size=hidden,
      num_hidden_layers=len(
        {
          name.removeprefix(f'{VISION}.blocks.').partition('.')[0]
          for name in tensors.keys()
          if name.startswith(f'{VISION}.blocks.')
        }
      ),
      num_attention_heads=width // HEAD_WIDTH,
      image_size=round((positions - 1) ** 0.5) * patch,
      patch_size=patch,
    )
  except ValueError as error:
    raise ValueError(f'{tensors.source}: {error}') from error
