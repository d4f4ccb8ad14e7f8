"""The components of a diffusers pipeline: names, configs and weights."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn

from dpo_jax import types
from dpo_jax.models import clip, unet, vae
from dpo_jax.weights import mapping, safetensors_io

UNET = mapping.Rules(
  indexed=(
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
)
# Until diffusers 0.17 the VAE's attention was query, key, value, proj_attn.
VAE = mapping.Rules(
  indexed=UNET.indexed,
  renames=(
    (r'(\.attentions\.\d+)\.query\.', r'\1.to_q.'),
    (r'(\.attentions\.\d+)\.key\.', r'\1.to_k.'),
    (r'(\.attentions\.\d+)\.value\.', r'\1.to_v.'),
    (r'(\.attentions\.\d+)\.proj_attn\.', r'\1.to_out.0.'),
  ),
)
# transformers 5 writes no prefix; every release reads the prefixed names.
CLIP_TEXT = mapping.Rules(
  indexed=('layers',),
  renames=((r'^(?=(embeddings|encoder|final_layer_norm)\.)', 'text_model.'),),
  ignored=(r'(^|\.)embeddings\.position_ids$',),
)

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
    class_name: the class there.
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
    return jax.eval_shape(
      functools.partial(self.init, config), jax.random.key(0)
    )


def load_config(folder: str | pathlib.Path) -> dict[str, Any]:
  """The dict of config.json in a folder; ValueError if it cannot be read."""
  return read_json(pathlib.Path(folder) / 'config.json')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; ValueError naming the file if it is not there or not one."""
  try:
    values = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise ValueError(f'{path}: no such file') from error
  except ValueError as error:
    raise ValueError(f'{path}: not JSON: {error}') from error
  if not isinstance(values, dict):
    raise ValueError(f'{path}: not a JSON object')
  return values


def read_config(name: str, folder: str | pathlib.Path) -> Any:
  """The model config of COMPONENTS[name]; ValueError naming the file."""
  folder = pathlib.Path(folder)
  values = load_config(folder)
  try:
    return COMPONENTS[name].make_config(values)
  except ValueError as error:
    raise ValueError(f'{folder / "config.json"}: {error}') from error


def load_component(
  name: str, folder: str | pathlib.Path
) -> tuple[Any, types.Params]:
  """(model config, float32 NumPy parameters) of COMPONENTS[name].

  Raises:
    ValueError: unsupported options, no safetensors file, or tensors that are
      not those of the config.
  """
  component, folder = COMPONENTS[name], pathlib.Path(folder)
  config = read_config(name, folder)
  path = find_weights(folder, component.stem)
  tensors = safetensors_io.load(path)
  params = mapping.to_flax(
    tensors, component.init_shapes(config), component.rules, str(path)
  )
  return config, params


load_unet = functools.partial(load_component, 'unet')
load_vae = functools.partial(load_component, 'vae')
load_text_encoder = functools.partial(load_component, 'text_encoder')


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
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r}; allowed: {", ".join(DTYPES)}')
  component = COMPONENTS[name]
  target = component.init_shapes(config)
  tensors = mapping.from_flax(params, component.rules, target=target)
  with np.errstate(over='ignore'):  # save() refuses the infinities.
    tensors = {key: x.astype(DTYPES[dtype]) for key, x in tensors.items()}
  path = pathlib.Path(folder) / f'{component.stem}.safetensors'
  safetensors_io.save(path, tensors)


def find_weights(folder: pathlib.Path, stem: str) -> pathlib.Path:
  """The weight file of a folder, full precision before float16.

  Raises:
    ValueError: there is none; says what lies there instead.
  """
  for suffix in ('.safetensors', '.fp16.safetensors'):
    path = folder / f'{stem}{suffix}'
    if path.is_file():
      return path
  wanted = f'{folder}: no {stem}.safetensors nor {stem}.fp16.safetensors'
  if list(folder.glob(f'{stem}*.index*.json')):
    raise ValueError(f'{wanted}; sharded weights are not supported, merge them')
  pickles = sorted(
    path.name
    for path in folder.glob('*')
    if path.suffix in safetensors_io.PICKLE_SUFFIXES
  )
  if pickles:
    raise ValueError(
      f'{wanted}; {pickles[0]} is refused: {safetensors_io.HINT}'
    )
  raise ValueError(wanted)


def _unet_example(config: unet.UNetConfig):
  side = 2 ** len(config.block_out_channels)
  shape = jax.ShapeDtypeStruct
  return unet.UNet2DConditionModel(config), (
    shape((1, side, side, config.in_channels), np.float32),
    shape((1,), np.int32),
    shape((1, 1, config.cross_attention_dim), np.float32),
  )


def _vae_example(config: vae.VAEConfig):
  side = 2 * config.downscale
  shape = jax.ShapeDtypeStruct
  return vae.AutoencoderKL(config), (
    shape((1, side, side, config.in_channels), np.float32),
    shape((1, 2, 2, config.latent_channels), np.float32),
  )


def _text_example(config: clip.CLIPTextConfig):
  return clip.CLIPTextModel(config), (jax.ShapeDtypeStruct((1, 1), np.int32),)


COMPONENTS = {
  'unet': Component(
    library='diffusers',
    class_name='UNet2DConditionModel',
    stem='diffusion_pytorch_model',
    rules=UNET,
    make_config=unet.UNetConfig.from_dict,
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
}
