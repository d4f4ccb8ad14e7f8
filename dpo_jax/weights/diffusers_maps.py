"""The components of a diffusers pipeline: names, configs and weights."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn

from dpo_jax import types
from dpo_jax.models import clip, unet, unet_2d, vae
from dpo_jax.weights import (
  json_files,
  mapping,
  safetensors_io,
  weight_files,
)

# (component name, shapes of its parameters) to a tree of Shardings, or None.
PlaceFn: TypeAlias = Callable[[str, types.PyTree], types.PyTree | None]

INDEXED = (
  'down_blocks',
  'up_blocks',
  'resnets',
  'attentions',
  'transformer_blocks',
  'downsamplers',
  'upsamplers',
  'to_out',
  'net',
)
# Until diffusers 0.17 attention without text, that of the VAE and of a
# UNet2DModel, was query, key, value, proj_attn.
OLD_ATTENTION = (
  (r'(\.attentions\.\d+)\.query\.', r'\1.to_q.'),
  (r'(\.attentions\.\d+)\.key\.', r'\1.to_k.'),
  (r'(\.attentions\.\d+)\.value\.', r'\1.to_v.'),
  (r'(\.attentions\.\d+)\.proj_attn\.', r'\1.to_out.0.'),
)
UNET = mapping.Rules(indexed=INDEXED, renames=OLD_ATTENTION)
VAE = mapping.Rules(indexed=INDEXED, renames=OLD_ATTENTION)
# transformers 5 writes no prefix; every release reads the prefixed names.
CLIP_TEXT = mapping.Rules(
  indexed=('layers',),
  renames=((r'^(?=(embeddings|encoder|final_layer_norm)\.)', 'text_model.'),),
  ignored=(r'(^|\.)embeddings\.position_ids$',),
)

# What a `unet` folder may hold, by diffusers' class.
CONDITIONAL, UNCONDITIONAL = 'UNet2DConditionModel', 'UNet2DModel'
UNET_CONFIGS = {
  CONDITIONAL: unet.UNetConfig,
  UNCONDITIONAL: unet_2d.UNet2DConfig,
}

DTYPES = {
  'float32': np.float32,
  'float16': np.float16,
  'bfloat16': ml_dtypes.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Component:
  """One sub-folder of a pipeline that holds weights.

  Attributes:
    library: the Python package that model_index.json names.
    class_name: the class there; of a UNet the one of models with text.
    stem: the weight file's name without suffixes.
    make_config: from the dict of config.json.
    make_example: (module, shapes of its inputs) from the config.
  """

  library: str
  class_name: str
  stem: str
  rules: mapping.Rules
  make_config: Callable[[dict[str, Any]], Any]
  make_example: Callable[[Any], tuple[nn.Module, tuple]]

  def init(self, config: Any, key: types.Key) -> types.Params:
    """Random float32 parameters; under jit no forward pass is computed."""
    module, inputs = self.make_example(config)
    inputs = [jnp.zeros(spec.shape, spec.dtype) for spec in inputs]
    return module.init(key, *inputs)['params']

  def init_shapes(self, config: Any) -> types.PyTree:
    """Shapes and dtypes of the parameters, nothing computed."""
    return jax.tree.map(lambda leaf: leaf, _find_shapes(self, config))


@functools.cache
def _find_shapes(component: Component, config: Any) -> types.PyTree:
  return jax.eval_shape(
    functools.partial(component.init, config), jax.random.key(0)
  )


def load_config(folder: str | pathlib.Path) -> dict[str, Any]:
  """The dict of config.json in a folder; ValueError if it cannot be read."""
  return json_files.read(pathlib.Path(folder) / 'config.json')


def read_config(name: str, folder: str | pathlib.Path) -> Any:
  """The model config of COMPONENTS[name]; ValueError naming the file."""
  folder = pathlib.Path(folder)
  values = load_config(folder)
  try:
    return COMPONENTS[name].make_config(values)
  except ValueError as error:
    raise ValueError(f'{folder / "config.json"}: {error}') from error


def load_component(
  name: str,
  folder: str | pathlib.Path,
  *,
  variant: str = '',
  place: PlaceFn | None = None,
  dtype: str = 'float32',
) -> tuple[Any, types.Params]:
  """(model config, parameters of `dtype`) of COMPONENTS[name].

  The parameters are NumPy arrays, or lie where `place` says: it gets the name
  and the shapes and returns a tree of Shardings, or None for NumPy. Without a
  `variant` full precision is preferred to the float16 files.

  Raises:
    ValueError: unsupported options, no safetensors file, or tensors that are
      not those of the config.
  """
  component, folder = COMPONENTS[name], pathlib.Path(folder)
  kind = check_dtype(dtype)
  config = read_config(name, folder)
  tensors = weight_files.open_weights(folder, component.stem, variant=variant)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind),
    component.init_shapes(config),
  )
  params = mapping.to_flax(
    tensors,
    shapes,
    component.rules,
    place=None if place is None else place(name, shapes),
    dtype=kind,
  )
  return config, params


def save_component(
  name: str,
  folder: str | pathlib.Path,
  *,
  config: Any,
  params: types.Params,
  dtype: str,
) -> None:
  """Writes the weight file of COMPONENTS[name], cast to `dtype`.

  Raises:
    ValueError: an unknown dtype, parameters that are not those of `config`, or
      values that are not finite in `dtype`.
  """
  kind, component = check_dtype(dtype), COMPONENTS[name]
  tensors = mapping.ParamTensors(
    params, component.rules, target=component.init_shapes(config)
  )
  path = pathlib.Path(folder) / f'{component.stem}.safetensors'
  safetensors_io.save(path, tensors, dtype=kind)


def check_dtype(dtype: str) -> np.dtype:
  """The NumPy dtype of a name in DTYPES; ValueError for other names."""
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r}; allowed: {", ".join(DTYPES)}')
  return np.dtype(DTYPES[dtype])


def _unet_config(values: Mapping[str, Any]):
  """The config of the class that a file names; most name none."""
  name = values.get('_class_name', CONDITIONAL)
  return UNET_CONFIGS.get(name, unet.UNetConfig).from_dict(values)


def _unet_example(config):
  side = 2 ** len(config.block_out_channels)
  shape = jax.ShapeDtypeStruct
  inputs = (
    shape((1, side, side, config.in_channels), np.float32),
    shape((1,), np.int32),
  )
  if isinstance(config, unet_2d.UNet2DConfig):
    return unet_2d.UNet2DModel(config), inputs
  inputs += (shape((1, 1, config.cross_attention_dim), np.float32),)
  if config.addition_embed_type is not None:
    # One number and the rest for the text: any split has these parameters.
    text = (
      config.projection_class_embeddings_input_dim
      - config.addition_time_embed_dim
    )
    inputs += (shape((1, text), np.float32), shape((1, 1), np.float32))
  return unet.UNet2DConditionModel(config), inputs


def _vae_example(config: vae.VAEConfig):
  side = 2 * config.downscale
  shape = jax.ShapeDtypeStruct
  return vae.AutoencoderKL(config), (
    shape((1, side, side, config.in_channels), np.float32),
    shape((1, 2, 2, config.latent_channels), np.float32),
  )


def _text_example(config: clip.CLIPTextConfig):
  return clip.CLIPTextModel(config), (jax.ShapeDtypeStruct((1, 1), np.int32),)


def _projected_text_example(config: clip.CLIPTextConfig):
  model = clip.CLIPTextModelWithProjection(config)
  return model, (jax.ShapeDtypeStruct((1, 1), np.int32),)


COMPONENTS = {
  'unet': Component(
    library='diffusers',
    class_name=CONDITIONAL,
    stem='diffusion_pytorch_model',
    rules=UNET,
    make_config=_unet_config,
    make_example=_unet_example,
  ),
  'vae': Component(
    library='diffusers',
    class_name='AutoencoderKL',
    stem='diffusion_pytorch_model',
    rules=VAE,
    make_config=vae.VAEConfig.from_dict,
    make_example=_vae_example,
  ),
  'text_encoder': Component(
    library='transformers',
    class_name='CLIPTextModel',
    stem='model',
    rules=CLIP_TEXT,
    make_config=clip.CLIPTextConfig.from_dict,
    make_example=_text_example,
  ),
  'text_encoder_2': Component(
    library='transformers',
    class_name='CLIPTextModelWithProjection',
    stem='model',
    rules=CLIP_TEXT,
    make_config=clip.CLIPTextConfig.from_dict,
    make_example=_projected_text_example,
  ),
}
