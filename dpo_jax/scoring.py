"""Opens judges: their weights, tokenizer and preprocessing, on a mesh."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from dpo_jax import sharding, trees, types
from dpo_jax.data import clip_texts
from dpo_jax.data import images as images_lib
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.evaluate import clip_pixels, scorers
from dpo_jax.models import classifier, clip_pair
from dpo_jax.weights import (
  classifiers,
  clip_files,
  diffusers_maps,
  json_files,
  mapping,
  safetensors_io,
)

PREPROCESS = 'preprocessor_config.json'
# Files of the aesthetic predictor's tensors, beside the CLIP it stands on.
HEAD = 'aesthetic.safetensors'
# Judges of pictures alone.
TEXTLESS = ('aesthetic', 'classifier')
HEAD_RULES = mapping.Rules(indexed=('layers',))


def parse(text: str) -> dict[str, str]:
  """{name: folder} of 'pickscore=FOLDER,aesthetic=FOLDER'.

  Raises ValueError for another form, unknown names, and a name twice.
  """
  found = {}
  for word in text.split(','):
    name, equals, folder = word.strip().partition('=')
    if not equals or not folder or name not in scorers.NAMES or name in found:
      raise ValueError(
        f'{word.strip()!r} of scorers {text!r}: give NAME=FOLDER once each, '
        f'separated by commas; names are {", ".join(scorers.NAMES)}'
      )
    found[name] = folder
  return found


def open_scorer(
  name: str,
  folder: str,
  *,
  mesh: jax.sharding.Mesh,
  tokenizer: str = '',
  dtype: str = 'auto',
  batch_size: int = 0,
) -> scorers.Scorer:
  """The judge of a name, with the weights of a folder.

  `folder` is one that weights.clip_files reads; of `aesthetic` it also holds
  aesthetic.safetensors; of `classifier` it is FOLDER:CLASS, the export of task
  classify and the class that should win. tokenizer: folder of vocab.json and
  merges.txt, where that is not the scorer's own. dtype: of parameters and
  compute; 'auto' is float32 on a CPU and bfloat16 elsewhere. batch_size:
  captions at once, 0 for 8 a device.

  Raises:
    ValueError: one line naming the file that is missing or wrong.
  """
  if dtype == 'auto':
    on_cpu = mesh.devices.flat[0].platform == 'cpu'
    dtype = 'float32' if on_cpu else 'bfloat16'
  # Each device and each process takes an equal part.
  ways = math.lcm(sharding.batch_ways(mesh), jax.process_count())
  size = batch_size or 8 * ways
  if size % ways:
    raise ValueError(
      f'batch of {size} captions: must be a multiple of {ways}, over which the '
      'mesh splits it'
    )
  if name == 'classifier':
    networks = _open_classifier(folder)
  else:
    networks = _open_clip(name, folder, tokenizer=tokenizer, dtype=dtype)
  return scorers.Scorer(
    name=name,
    compute=networks.compute,
    params=jax.device_put(networks.params, sharding.replicated(mesh)),
    preprocess=networks.preprocess,
    encode=networks.encode,
    mesh=mesh,
    source={
      'name': folder,
      'sha256': trees.digest(networks.params),
      'dtype': networks.dtype,
    },
    batch_size=size,
  )


class _Networks(NamedTuple):
  """What a kind of judge is made of; see scorers.Scorer."""

  compute: scorers.ComputeFn
  params: types.Params
  preprocess: Callable[[np.ndarray], np.ndarray]
  encode: scorers.EncodeFn | None
  dtype: str


def _open_clip(
  name: str, folder: str, *, tokenizer: str, dtype: str
) -> _Networks:
  path = pathlib.Path(folder)
  config, params = clip_files.load(path, dtype=dtype)
  params = {'clip': params}
  own = path if path.is_dir() else path.parent
  encode = None
  if name == 'aesthetic':
    params['head'] = _load_head(own / HEAD, config, dtype)
  else:
    encode = _encoder(name, tokenizer or own, config)
  model = clip_pair.CLIP(config, dtype=jnp.dtype(dtype))
  return _Networks(
    compute=scorers.clip_compute(name, model),
    params=params,
    preprocess=_read_preprocess(own, config),
    encode=encode,
    dtype=dtype,
  )


def _open_classifier(place: str) -> _Networks:
  """Of FOLDER:CLASS; always in float32."""
  folder, colon, wanted = place.rpartition(':')
  if not colon:
    raise ValueError(
      f'classifier={place}: give FOLDER:CLASS, the class that should win'
    )
  config, params = classifiers.load(folder)
  if wanted not in config.classes:
    raise ValueError(
      f'classifier={place}: {folder} knows {", ".join(config.classes)}'
    )

  def preprocess(pixels):
    plain = images_lib.Augmentation()
    middle = images_lib.crop_flip(pixels, config.image_size, plain)
    return np.float32(middle) / 127.5 - 1

  model = classifier.ImageClassifier(config)
  return _Networks(
    compute=scorers.classifier_compute(model, config.classes.index(wanted)),
    params=params,
    preprocess=preprocess,
    encode=None,
    dtype='float32',
  )


def _read_preprocess(
  folder: pathlib.Path, config: clip_pair.CLIPConfig
) -> clip_pixels.Preprocess:
  """transformers' where its file is there, else OpenCLIP's."""
  size, path = config.vision_config.image_size, folder / PREPROCESS
  if not path.is_file():
    return clip_pixels.Preprocess(size, rounds=True)
  try:
    return clip_pixels.from_config(json_files.read(path), size=size)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def _encoder(
  name: str, folder: str | pathlib.Path, config: clip_pair.CLIPConfig
) -> Callable[[Sequence[str]], Int32[np.ndarray, 'n s']]:
  length = config.text_config.max_position_embeddings
  try:
    tokenizer = tokenizer_lib.load(folder, max_length=length)
  except ValueError as error:
    raise ValueError(
      f'{name}: {error}; a folder with the vocab.json and merges.txt of CLIP '
      'can be given beside it'
    ) from error

  def encode(captions):
    if name != 'pickscore':
      captions = [clip_texts.clean(caption) for caption in captions]
    return tokenizer.encode(captions)[0]

  return encode


def _load_head(
  path: pathlib.Path, config: clip_pair.CLIPConfig, dtype: str
) -> types.Params:
  if not path.is_file():
    raise ValueError(
      f'{path}: no such file; it holds the tensors layers.0.weight ... '
      'layers.7.bias of sac+logos+ava1-l14-linearMSE, saved as safetensors'
    )
  width = config.text_config.projection_dim
  shapes = jax.eval_shape(
    clip_pair.AestheticPredictor().init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, width), np.float32),
  )['params']
  tensors: Mapping[str, np.ndarray] = safetensors_io.load(path)
  return mapping.to_flax(
    tensors,
    shapes,
    HEAD_RULES,
    str(path),
    dtype=diffusers_maps.check_dtype(dtype),
  )
