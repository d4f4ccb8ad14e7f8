"""Opens the CLIP that rewards of kind `features` stand on."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_jax import trees, types
from dpo_jax.evaluate import clip_pixels
from dpo_jax.models import clip_features, clip_pair
from dpo_jax.weights import clip_files, json_files

PREPROCESS = 'preprocessor_config.json'


class Opened(NamedTuple):
  """A CLIP: its function, float32 parameters (NumPy), where it came from."""

  features: clip_features.ClipFeatures
  params: types.Params
  source: dict[str, str]


def open_features(folder: str) -> Opened:
  """The image tower of a folder that weights.clip_files reads.

  Only the tower's parameters are kept; `source` has the name and their SHA-256.
  Raises ValueError as clip_files.load does, and for a preprocessing that is not
  CLIP's.
  """
  path = pathlib.Path(folder)
  config, params = clip_files.load(path)
  params = {
    name: params[name] for name in ('vision_model', 'visual_projection')
  }
  size = config.vision_config.image_size
  preprocess = clip_pixels.Preprocess(size)
  own = (path if path.is_dir() else path.parent) / PREPROCESS
  if own.is_file():
    try:
      preprocess = clip_pixels.from_config(json_files.read(own), size=size)
    except ValueError as error:
      raise ValueError(f'{own}: {error}') from error
  return Opened(
    clip_features.ClipFeatures(
      clip_pair.CLIP(config), tuple(preprocess.mean), tuple(preprocess.std)
    ),
    params,
    {'name': folder, 'sha256': trees.digest(params)},
  )


def open_recorded(record: Mapping[str, Any], *, folder: str = '') -> Opened:
  """The CLIP that a reward was trained on, by its record's `clip`.

  folder: where it is now, '' for where it was. Raises ValueError where it is
  not there, or is another.
  """
  known = record['clip']
  opened = open_features(folder or known['name'])
  if opened.source['sha256'] != known['sha256']:
    raise ValueError(
      f'{opened.source["name"]}: is not the CLIP that the reward was trained '
      f'on, which was {known["name"]} with SHA-256 {known["sha256"][:12]}'
    )
  return opened
