"""Opens a model wherever it lies and wires its networks and schedule."""

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import folders, sharding, trees, types
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.diffusion import schedule as schedule_lib
from dpo_jax.models import attention as attention_lib
from dpo_jax.models import clip, pixels, unet, unet_2d, vae
from dpo_jax.train import checkpoint
from dpo_jax.weights import (
  diffusers_maps,
  model_index,
  pipeline,
  single_file,
  sources,
)

TEXT_ENCODERS = {
  'text_encoder': clip.CLIPTextModel,
  'text_encoder_2': clip.CLIPTextModelWithProjection,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
  """A model that is ready to be trained or sampled.

  Attributes:
    base: the diffusers folder whose configs and tokenizers it has; an export
      is written on top of it.
    base_has_weights: not where the weights came from a single file.
    source: where it came from, for the record: name and revision.
    params: component name to parameters, placed on the mesh. Of a pixel model
      those of 'vae' are an empty dict.
  """

  base: pathlib.Path
  base_has_weights: bool
  source: dict[str, str]
  model: sd_lib.StableDiffusion
  params: dict[str, types.Params]
  tokenizers: tokenizer_lib.Tokenizers


def make_model(
  parts: pipeline.Pipeline,
  *,
  dtype: types.DTypeLike,
  platform: str = 'cpu',
  remat: str = 'none',
  residual_dtype: str = '',
  attention: str = 'auto',
  zero_terminal_snr: bool = False,
) -> sd_lib.StableDiffusion:
  """Modules and schedule of a pipeline folder.

  attention: a backend of models.attention for the UNet, on devices of that
  `platform`; the VAE and the text encoders use xla's.

  The VAE of an SDXL whose config says force_upcast computes in float32: half
  precision overflows in it (diffusers' other pipelines ignore that flag). With
  `zero_terminal_snr` the training schedule is rescaled to end in pure noise
  (Lin et al., 2023, algorithm 1).
  """
  dtype = jnp.dtype(dtype)
  config, scheduler = parts.configs['unet'], dict(parts.scheduler_config)
  if parts.class_name == 'StableDiffusionPipeline':
    # diffusers' pipeline of that name overrides its file in these two.
    scheduler |= {'steps_offset': 1, 'clip_sample': False}
  if zero_terminal_snr:
    scheduler['rescale_betas_zero_snr'] = True
  make_unet, spaces = unet.UNet2DConditionModel, _latents_and_text
  if isinstance(config, unet_2d.UNet2DConfig):
    make_unet, spaces = unet_2d.UNet2DModel, _pixels
  return sd_lib.StableDiffusion(
    unet=make_unet(
      config,
      dtype=dtype,
      remat=remat,
      residual_dtype=jnp.dtype(residual_dtype) if residual_dtype else None,
      attention=attention_lib.choose(attention, platform=platform, dtype=dtype),
    ),
    schedule=schedule_lib.from_config(scheduler),
    scheduler_config=scheduler,
    **spaces(parts, dtype),
  )


def _latents_and_text(parts: pipeline.Pipeline, dtype) -> dict[str, Any]:
  """What a StableDiffusion with a VAE and text encoders is made of."""
  configs, settings = parts.configs, parts.configs['vae']
  is_sdxl = parts.class_name != 'StableDiffusionPipeline'
  upcast = is_sdxl and settings.force_upcast
  return {
    'vae': vae.AutoencoderKL(
      settings, dtype=jnp.dtype('float32') if upcast else dtype
    ),
    'text_encoders': {
      name: make(configs[name], dtype=dtype)
      for name, make in TEXT_ENCODERS.items()
      if name in configs
    },
    'scaling_factor': settings.scaling_factor,
    'latent_channels': settings.latent_channels,
    'downscale': settings.downscale,
    'micro_cond_dim': _micro_cond_dim(parts),
    'zero_uncond': parts.force_zeros_for_empty_prompt,
  }


def _pixels(parts: pipeline.Pipeline, dtype) -> dict[str, Any]:
  """The same of an unconditional model in pixels, which are float32."""
  del dtype
  channels = parts.configs['unet'].in_channels
  return {
    'vae': pixels.Pixels(channels),
    'text_encoders': {},
    'scaling_factor': 1.0,
    'latent_channels': channels,
    'downscale': 1,
  }


def _micro_cond_dim(parts: pipeline.Pipeline) -> int:
  if parts.class_name == 'StableDiffusionPipeline':
    return 0
  return 5 if parts.requires_aesthetics_score else 6


def open_model(
  name: str,
  *,
  mesh: jax.sharding.Mesh,
  revision: str = '',
  variant: str = '',
  configs: str = '',
  prediction_type: str = '',
  random_init: Collection[str] = (),
  seed: int = 0,
  **options,
) -> Opened:
  """Opens a folder, a gs:// path, a hub id or a single-file checkpoint.

  revision, variant: of a hub id; the variant also of a folder ('fp16').
  configs: for a single file, a diffusers folder of the same architecture
  (weights are not needed) or a folder with CLIP's tokenizer, and with that
  `prediction_type` where the file does not tell (SD 2.x). Components in
  `random_init` start from random weights that follow from `seed`. `options`
  are those of make_model.

  Raises ValueError with one line on what is wrong and what to do.
  """
  place = functools.partial(_place, mesh)
  source = sources.resolve(name, revision=revision, variant=variant)
  base = _base_of(source, configs, prediction_type)
  if source.kind == 'file':
    # All components but those that are to start at random lie in one file.
    parts = pipeline.load(base, without=tuple(diffusers_maps.COMPONENTS))
    wanted = {k: v for k, v in parts.configs.items() if k not in random_init}
    params = single_file.load_params(source.path, wanted, place=place)
  else:
    parts = pipeline.load(
      base, without=tuple(random_init), variant=variant, place=place
    )
    params = dict(parts.params)
  for missing in random_init:
    if missing not in parts.configs:
      raise ValueError(
        f'model.random_init: {name!r} has no {missing}, only '
        + ', '.join(parts.configs)
      )
    params[missing] = _init(missing, parts, seed, place)
  # The identity of a pixel model has no weights.
  params.setdefault('vae', {})
  return Opened(
    base=base,
    base_has_weights=source.kind == 'folder',
    source={'name': name, 'revision': source.revision},
    model=make_model(parts, platform=mesh.devices.flat[0].platform, **options),
    params=params,
    tokenizers=tokenizer_lib.load_all(parts.tokenizer_folders),
  )


def own_size(opened: Opened) -> tuple[int, int] | None:
  """(height, width) in pixels that the UNet names as its own, if it does."""
  latent = diffusers_maps.load_config(opened.base / 'unet').get('sample_size')
  if latent is None:
    return None
  height, width = [latent] * 2 if isinstance(latent, int) else latent
  factor = opened.model.downscale
  return int(height) * factor, int(width) * factor


def save_model(
  out: str | pathlib.Path,
  opened: Opened,
  trained: Mapping[str, types.Params],
  *,
  dtype: str,
  notes: str = '',
) -> None:
  """Writes a diffusers folder with the trained components.

  Arguments and errors as for pipeline.save. What was not trained is copied
  from the base, or cast to `dtype` where the model came from a single file.
  """
  rest = {} if opened.base_has_weights else opened.params
  pipeline.save(
    out,
    base=opened.base,
    params={**rest, **trained},
    dtype=dtype,
    notes=notes,
  )


def load_weights(
  path: str, opened: Opened, *, step: int | None = None
) -> dict[str, types.Params]:
  """Components that replace those of `opened`, placed as they are.

  path: a run's workdir (its newest checkpoint, or that of `step`), a pipeline
  folder, or the folder of a UNet alone.

  Raises ValueError when it is none of these or does not fit the model.
  """
  folder = pathlib.Path(path)
  if (folders.to_path(path) / 'checkpoints').is_dir():
    found, _ = checkpoint.restore_params(path, step=step)
  elif step is not None:
    raise ValueError(f'{path}: only a run has steps; leave out the step')
  elif (folder / model_index.NAME).is_file():
    found = dict(pipeline.load(folder).params)
  elif (folder / 'config.json').is_file():
    found = {'unet': diffusers_maps.load_component('unet', folder)[1]}
  else:
    raise ValueError(
      f"{path}: neither a run's workdir, nor a pipeline (model_index.json), "
      'nor a UNet (config.json)'
    )
  for name, params in found.items():
    _check_fit(path, name, params, opened.params.get(name))
  return {
    name: jax.tree.map(
      lambda new, old: jax.device_put(new, old.sharding),
      params,
      opened.params[name],
    )
    for name, params in found.items()
  }


def _check_fit(path, name, params, wanted):
  shapes, expected = (
    {trees.leaf_name(place): tuple(leaf.shape) for place, leaf in leaves}
    for leaves in (
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree_util.tree_leaves_with_path(wanted),
    )
  )
  wrong = sorted(
    key
    for key in shapes.keys() | expected.keys()
    if shapes.get(key) != expected.get(key)
  )
  if wrong:
    key = wrong[0]
    raise ValueError(
      f'{path}: {name} does not fit the model: {key} is {shapes.get(key)}, '
      f'the model has {expected.get(key)} ({len(wrong)} leaves differ)'
    )


def _base_of(
  source: sources.Source, configs: str, prediction_type: str
) -> pathlib.Path:
  if source.kind == 'file':
    return single_file.cached_base(
      source.path, configs=configs, prediction_type=prediction_type
    )
  for name, value in (
    ('configs', configs),
    ('prediction_type', prediction_type),
  ):
    if value:
      raise ValueError(
        f'model.{name}={value!r} is for single-file checkpoints; '
        f'{source.name!r} is a folder with configs of its own'
      )
  return source.path


def _place(mesh, name: str, shapes: types.PyTree) -> types.PyTree:
  del name  # Every component is sharded by the same rule.
  return sharding.state_shardings(shapes, mesh)


def _init(
  name: str, parts: pipeline.Pipeline, seed: int, place
) -> types.Params:
  """Random parameters of one component, placed."""
  component, config = diffusers_maps.COMPONENTS[name], parts.configs[name]
  key = jax.random.fold_in(
    jax.random.key(seed), list(diffusers_maps.COMPONENTS).index(name)
  )
  return jax.jit(
    functools.partial(component.init, config),
    out_shardings=place(name, component.init_shapes(config)),
  )(key)
