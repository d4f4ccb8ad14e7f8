"""Opens judges: their weights, tokenizer and preprocessing, on a mesh."""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from dpo_jax import clip_features, loading, sharding, trees, types
from dpo_jax.data import clip_texts
from dpo_jax.data import images as images_lib
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.evaluate import censor, clip_pixels, implicit, scorers
from dpo_jax.models import blip, classifier, clip_pair, reward
from dpo_jax.weights import (
  blip_files,
  classifiers,
  clip_files,
  diffusers_maps,
  json_files,
  mapping,
  rewards,
  safetensors_io,
)

PREPROCESS = 'preprocessor_config.json'
# Files of the aesthetic predictor's tensors, beside the CLIP it stands on.
HEAD = 'aesthetic.safetensors'
# Of noise and timestep for each picture's implicit reward.
IMPLICIT_DRAWS = 8
# Judges that read no texts, or have a tokenizer of their own.
WITHOUT_TOKENIZER = (
  'aesthetic',
  'classifier',
  'imagereward',
  'implicit',
  'reward',
)
# Judges of FOLDER:PART.
IN_PARTS = ('classifier', 'implicit')
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
  aesthetic.safetensors; of `imagereward` it is one of med_config.json,
  model.safetensors and BERT's vocab.txt; of `classifier` it is FOLDER:CLASS,
  the export of task classify and the class that should win; of `implicit`
  BASE:WEIGHTS, a model and what loading.load_weights takes (a run of
  dpo_jax.main); of `reward` what weights.rewards writes. tokenizer: folder of
  CLIP's vocab.json and merges.txt, where that is not the scorer's own.
  dtype: of parameters and compute; 'auto' is float32 on a CPU and bfloat16
  elsewhere. batch_size: captions at once, 0 for 8 a device.

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
  elif name == 'implicit':
    networks = _open_implicit(folder, mesh=mesh, dtype=dtype)
  elif name == 'reward':
    networks = _open_reward(folder, mesh=mesh)
  elif name == 'imagereward':
    networks = _open_imagereward(folder, dtype=dtype)
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
    preprocess=_read_preprocess(name, own, config),
    encode=encode,
    dtype=dtype,
  )


def _open_imagereward(folder: str, *, dtype: str) -> _Networks:
  config, params = blip_files.load(folder, dtype=dtype)
  words = tokenizer_lib.load_bert(folder)
  if words.vocab_size != config.text.vocab_size:
    raise ValueError(
      f'{folder}/vocab.txt: {words.vocab_size} tokens with [DEC] '
      f'and [ENC], med_config.json has vocab_size={config.text.vocab_size}'
    )
  model = blip.ImageReward(config, dtype=jnp.dtype(dtype))
  return _Networks(
    compute=scorers.imagereward_compute(model),
    params=params,
    preprocess=clip_pixels.Preprocess(config.vision.image_size, rounds=True),
    encode=lambda captions: words.encode(captions)[0],
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

  model = classifier.ImageClassifier(config)
  return _Networks(
    compute=scorers.classifier_compute(model, config.classes.index(wanted)),
    params=params,
    preprocess=functools.partial(_to_square, side=config.image_size),
    encode=None,
    dtype='float32',
  )


def _open_implicit(
  place: str, *, mesh: jax.sharding.Mesh, dtype: str
) -> _Networks:
  """Of BASE:WEIGHTS: how much better the policy denoises than the base."""
  base, colon, weights = place.rpartition(':')
  if not colon:
    raise ValueError(
      f'implicit={place}: give BASE:WEIGHTS, a model and a run that started '
      'from it'
    )
  opened = loading.open_model(base, mesh=mesh, dtype=dtype)
  trained = loading.load_weights(weights, opened)
  size = loading.own_size(opened)
  if size is None or size[0] != size[1]:
    raise ValueError(
      f'implicit={place}: the UNet of {base} names no square sample_size, the '
      'side at which pictures are compared'
    )
  params = {**opened.params, **trained}
  params |= {'policy': params.pop('unet'), 'ref': opened.params['unet']}
  return _Networks(
    compute=implicit.make_compute(opened.model, draws=IMPLICIT_DRAWS),
    params=params,
    preprocess=functools.partial(_to_square, side=size[0]),
    encode=lambda captions: opened.tokenizers.encode(captions)[0],
    dtype=dtype,
  )


def _open_reward(folder: str, *, mesh: jax.sharding.Mesh) -> _Networks:
  """At t = 0, of pixels or of its generator's latents; always in float32."""
  loaded = rewards.load(folder)
  source, (height, side) = loaded.record['model'], loaded.record['size']
  if height != side:
    raise ValueError(
      f'reward={folder}: reads pictures of {height}x{side}; judges are of '
      'squares'
    )
  params, model, clip = {'reward': list(loaded.members)}, None, None
  if loaded.config.kind == 'features':
    clip = clip_features.open_recorded(loaded.record)
    params['clip'] = clip.params
  if source is not None:
    opened = loading.open_model(**source, mesh=mesh, dtype='float32')
    in_latents = loaded.record['space'] == 'latents'
    whole = side * opened.model.downscale if in_latents else side
    if not censor.decodes(
      loaded.config, loaded.record, opened.model, (whole, whole)
    ):
      params['vae'], model, side = opened.params['vae'], opened.model, whole

  def log_reward_fn(params, x):
    if model is not None:
      mean, _ = model.encode_posterior(params['vae'], x)
      x = model.scaling_factor * mean
    if clip is not None:
      x = clip.features(params['clip'], x)
    module = reward.Reward(loaded.config)
    made = reward.make_log_reward_fn(module, params['reward'])
    return made(x, jnp.zeros(len(x), jnp.int32))

  return _Networks(
    compute=scorers.reward_compute(log_reward_fn),
    params=params,
    preprocess=functools.partial(_to_square, side=side),
    encode=None,
    dtype='float32',
  )


def _to_square(
  pixels: UInt8[np.ndarray, 'H W 3'], *, side: int
) -> Float32[np.ndarray, 'side side 3']:
  """The middle square in [-1, 1], as in training."""
  middle = images_lib.crop_flip(pixels, side, images_lib.Augmentation())
  return np.float32(middle) / 127.5 - 1


def _read_preprocess(
  name: str, folder: pathlib.Path, config: clip_pair.CLIPConfig
) -> Callable[[np.ndarray], np.ndarray]:
  """transformers' where its file is there, else HPSv2's or OpenCLIP's."""
  size, path = config.vision_config.image_size, folder / PREPROCESS
  if not path.is_file():
    if name in ('hpsv2', 'hpsv21'):
      return clip_pixels.FitPreprocess(size)
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
