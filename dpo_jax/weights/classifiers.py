"""A picture classifier as a folder: config.json and model.safetensors."""

import json
import pathlib

import flax
import jax
import numpy as np

from dpo_jax import trees, types
from dpo_jax.models import classifier
from dpo_jax.weights import diffusers_maps, safetensors_io

WEIGHTS = 'model.safetensors'


def _shapes(config: classifier.ImageClassifierConfig) -> types.PyTree:
  side = config.image_size
  return jax.eval_shape(
    classifier.ImageClassifier(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, side, side, 3), np.float32),
  )['params']


def save(
  folder: str | pathlib.Path,
  *,
  config: dict,
  params: types.Params,
) -> None:
  """Writes the folder; tensors are named by their path, `block_0/kernel`."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(config, indent=2, sort_keys=True) + '\n'
  (folder / 'config.json').write_text(text)
  tensors = {
    trees.leaf_name(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  safetensors_io.save(folder / WEIGHTS, tensors)


def load(
  folder: str | pathlib.Path,
) -> tuple[classifier.ImageClassifierConfig, types.Params]:
  """(config, float32 parameters).

  Raises ValueError naming the file when tensors are missing, left over,
  misshapen or no floats.
  """
  folder = pathlib.Path(folder)
  values = diffusers_maps.load_config(folder)
  try:
    config = classifier.ImageClassifierConfig.from_dict(values)
  except ValueError as error:
    raise ValueError(f'{folder / "config.json"}: {error}') from error
  tensors = safetensors_io.load(folder / WEIGHTS)
  for name, tensor in tensors.items():
    if tensor.dtype.kind in 'iub':
      raise ValueError(
        f'{folder / WEIGHTS}: tensor {name!r} is {tensor.dtype}, should be a'
        ' float'
      )
  wanted = {
    trees.leaf_name(path): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(_shapes(config))
  }
  safetensors_io.check_shapes(folder / WEIGHTS, tensors, wanted)
  params = {name: np.float32(tensor) for name, tensor in tensors.items()}
  return config, flax.traverse_util.unflatten_dict(params, sep='/')
