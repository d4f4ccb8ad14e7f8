"""Reads CLIP's two towers: a transformers folder, or OpenCLIP's names.

A folder of transformers has config.json and model.safetensors. OpenCLIP's has
open_clip_model.safetensors, or another single .safetensors file with tensors of
its names (a converted HPS_v2.1_compressed.pt, say), and may have
open_clip_config.json; without that the sizes are those of the release whose
widths the tensors have. Either may be given as the file itself.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax

from dpo_jax import types
from dpo_jax.models import clip_pair
from dpo_jax.weights import (
  diffusers_maps,
  json_files,
  mapping,
  safetensors_io,
  single_file_maps,
  single_file_tensors,
  weight_files,
)

RULES = mapping.Rules(
  indexed=('layers',),
  bare=('class_embedding', 'logit_scale'),
  ignored=(r'\.position_ids$',),
)
OPEN_CLIP_CONFIG = 'open_clip_config.json'
FIRST = 'visual.conv1.weight'
# No parameters: a mask, and what a training wrote beside the model.
UNREAD = re.compile(r'(.*\.)?attn_mask')
# (image width, text width) of a release to heads of both towers.
HEADS = {
  (768, 512): (12, 8),  # ViT-B/32 and B/16
  (1024, 768): (16, 12),  # ViT-L/14
  (1280, 1024): (16, 16),  # ViT-H/14
  (1664, 1280): (16, 20),  # ViT-bigG/14
}


def load(
  path: str | pathlib.Path, *, dtype: str = 'float32'
) -> tuple[clip_pair.CLIPConfig, types.Params]:
  """(config, parameters of `dtype` as NumPy arrays).

  Raises:
    ValueError: one line naming the file: nothing of either layout there, an
      option that is not supported, tensors that are not those of the config.
  """
  path = pathlib.Path(path)
  if path.is_dir() and (path / 'config.json').is_file():
    tensors = weight_files.open_weights(path, 'model')
    if FIRST not in tensors.keys():
      config = read_config(path)
      return config, _to_params(tensors, config, dtype)
  file = safetensors_io.TensorFiles([find_file(path)])
  config = open_clip_config(file, path.parent if path.is_file() else path)
  return config, _to_params(_rename(file, config), config, dtype)


def read_config(folder: pathlib.Path) -> clip_pair.CLIPConfig:
  """That of a transformers folder; ValueError naming its file."""
  values = diffusers_maps.load_config(folder)
  try:
    return clip_pair.CLIPConfig.from_dict(values)
  except ValueError as error:
    raise ValueError(f'{folder / "config.json"}: {error}') from error


def find_file(path: pathlib.Path) -> pathlib.Path:
  """The one safetensors file that is `path` or in it; ValueError if not one."""
  if path.is_file():
    return path
  if not path.is_dir():
    raise ValueError(
      f'{path}: no such file or folder; give a folder with model.safetensors '
      'and config.json (transformers), or a .safetensors file of OpenCLIP'
    )
  named = path / 'open_clip_model.safetensors'
  found = [named] if named.is_file() else sorted(path.glob('*.safetensors'))
  if len(found) != 1:
    shown = ', '.join(file.name for file in found) or 'none'
    pickles = sorted(
      file.name
      for file in path.iterdir()
      if file.suffix in safetensors_io.PICKLE_SUFFIXES
    )
    more = f'; {pickles[0]}: {safetensors_io.HINT}' if pickles else ''
    raise ValueError(
      f'{path}: must hold one .safetensors file of CLIP, found {shown}{more}'
    )
  return found[0]


def open_clip_config(
  file: safetensors_io.Tensors, folder: pathlib.Path
) -> clip_pair.CLIPConfig:
  """From open_clip_config.json in the folder, else from the tensors' shapes.

  The activation cannot be told from shapes: it is gelu, as in all models that
  OpenCLIP trained; OpenAI's have quick_gelu, and config.json in their folder.

  Raises ValueError for widths of no known release and for other layouts.
  """
  shapes = {name: tuple(file.shape(name)) for name in file.keys()}
  wanted = (FIRST, 'token_embedding.weight', 'text_projection', 'visual.proj')
  missing = [name for name in wanted if name not in shapes]
  if missing:
    raise ValueError(
      f'{file.source}: no {", ".join(missing)}: not a CLIP model of OpenCLIP '
      'with a ViT; allowed are ViT models that are no CustomTextCLIP'
    )
  values = {}
  if (folder / OPEN_CLIP_CONFIG).is_file():
    values = json_files.read(folder / OPEN_CLIP_CONFIG)
  try:
    return clip_pair.CLIPConfig.from_dict(_sizes(shapes, values))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{file.source}: {error}') from error


def _sizes(
  shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any]
) -> dict[str, Any]:
  """CLIPConfig's dict."""
  width, _, _, patch = shapes[FIRST]
  vocabulary, text_width = shapes['token_embedding.weight']
  model = values.get('model_cfg', {})
  heads = HEADS.get((width, text_width))
  vision, text = model.get('vision_cfg', {}), model.get('text_cfg', {})
  if model:
    heads = width // vision.get('head_width', 64), text.get('heads', 8)
  elif heads is None:
    known = ', '.join(map(str, HEADS))
    raise ValueError(
      f'widths {(width, text_width)} of no known release ({known}); put its '
      f'{OPEN_CLIP_CONFIG} beside it'
    )
  positions = shapes['visual.positional_embedding'][0]
  act = 'quick_gelu' if model.get('quick_gelu', False) else 'gelu'
  return {
    'projection_dim': shapes['visual.proj'][1],
    'text_config': {
      'vocab_size': vocabulary,
      'hidden_size': text_width,
      'intermediate_size': shapes['transformer.resblocks.0.mlp.c_fc.weight'][0],
      'num_hidden_layers': _layers(shapes, 'transformer.resblocks.'),
      'num_attention_heads': heads[1],
      'max_position_embeddings': shapes['positional_embedding'][0],
      'hidden_act': act,
      # The largest id, wherever the vocabulary ends.
      'eos_token_id': vocabulary - 1,
    },
    'vision_config': {
      'hidden_size': width,
      'intermediate_size': shapes[
        'visual.transformer.resblocks.0.mlp.c_fc.weight'
      ][0],
      'num_hidden_layers': _layers(shapes, 'visual.transformer.resblocks.'),
      'num_attention_heads': heads[0],
      'image_size': round((positions - 1) ** 0.5) * patch,
      'patch_size': patch,
      'hidden_act': act,
    },
  }


def _layers(shapes: Mapping[str, Any], prefix: str) -> int:
  return len(
    {
      name[len(prefix) :].partition('.')[0]
      for name in shapes
      if name.startswith(prefix)
    }
  )


def _rename(
  file: safetensors_io.Tensors, config: clip_pair.CLIPConfig
) -> single_file_tensors.RenamedTensors:
  names = [name for name in file.keys() if not UNREAD.fullmatch(name)]
  modules = single_file_maps.open_clip_pair_modules(config)
  origins, unknown = single_file_maps.find_origins(names, modules)
  if unknown:
    shown = ', '.join(unknown[:5]) + (', ...' if len(unknown) > 5 else '')
    raise ValueError(
      f'{file.source}: {len(unknown)} tensors that an OpenCLIP model of these '
      f'sizes has not: {shown}'
    )
  return single_file_tensors.RenamedTensors(file, '', origins)


def _to_params(
  tensors: safetensors_io.Tensors, config: clip_pair.CLIPConfig, dtype: str
) -> types.Params:
  kind = diffusers_maps.check_dtype(dtype)
  model = clip_pair.CLIP(config)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return mapping.to_flax(tensors, shapes, RULES, dtype=kind)
