"""Checkpoints of the original Stability layout: all networks in one file.

Reads SD 1.x, SD 2.x, SDXL and its refiner. The layout of the UNet and VAE is
that of CompVis/latent-diffusion (Rombach et al. 2022), the second text encoder
that of OpenCLIP. The file holds weights only: sizes, schedule and tokenizer
come from a folder, see `write_base`.
"""

import dataclasses
import hashlib
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from dpo_jax import types
from dpo_jax.weights import (
  buckets,
  diffusers_maps,
  mapping,
  safetensors_io,
  single_file_base,
  single_file_maps,
  single_file_tensors,
)

UNET, VAE = 'model.diffusion_model.', 'first_stage_model.'
FIRST_CONV = f'{UNET}input_blocks.0.0.weight'
# By family the components and where they are in the file.
PREFIXES = {
  'sd1': {
    'unet': UNET,
    'vae': VAE,
    'text_encoder': 'cond_stage_model.transformer.',
  },
  'sd2': {
    'unet': UNET,
    'vae': VAE,
    'text_encoder': 'cond_stage_model.model.',
  },
  'sdxl': {
    'unet': UNET,
    'vae': VAE,
    'text_encoder': 'conditioner.embedders.0.transformer.',
    'text_encoder_2': 'conditioner.embedders.1.model.',
  },
  'sdxl_refiner': {
    'unet': UNET,
    'vae': VAE,
    'text_encoder_2': 'conditioner.embedders.0.model.',
  },
}
# Tensors that are no part of the networks: averaged weights beside the plain
# ones, tables of the noise schedule, CLIP's temperature, masks, positions.
UNREAD = re.compile(
  r'model_ema\..*'
  r'|(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?alphas_cumprod(_prev)?'
  r'|betas|posterior_(variance|log_variance_clipped|mean_coef[12])'
  r'|lvlb_weights|logvar|denoiser\.sigmas'
  r'|(cond_stage_model|conditioner)\..*\.(logit_scale|attn_mask|position_ids)'
)
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What is in a file, nothing read yet.

  Attributes:
    family: a key of PREFIXES.
    tensors: the tensors of each component by diffusers' names.
    unread: names of the tensors in the file that are left out on purpose.
  """

  family: str
  tensors: dict[str, single_file_tensors.RenamedTensors]
  unread: tuple[str, ...]


def detect(path: str | pathlib.Path) -> str:
  """'sd1', 'sd2', 'sdxl' or 'sdxl_refiner', from the names in the header.

  SD 2.x base and v-prediction, and SDXL base and Turbo, have the same names.

  Raises:
    ValueError: another kind of model, or not a safetensors file.
  """
  return _detect(safetensors_io.TensorFiles([path]))


def open_checkpoint(
  path: str | pathlib.Path, configs: Mapping[str, Any]
) -> Checkpoint:
  """Finds the tensors of the components in `configs`, nothing read yet.

  `configs` has model configs by component, all or some of those of the file's
  family. SD 2.x conditions on the penultimate layer of its text encoder, so
  its last layer may be beyond the config's `num_hidden_layers`.

  Raises:
    ValueError: as `detect`; a component that the family has not; tensors that
      are neither a component's nor known to be of no use, naming them.
  """
  file = safetensors_io.TensorFiles([path])
  family = _detect(file)
  prefixes = PREFIXES[family]
  for name in configs:
    if name not in prefixes:
      raise ValueError(
        f'{path}: of the family {family!r}, which has no {name!r}; allowed:'
        f' {", ".join(prefixes)}'
      )
  tensors, unread, unknown = {}, [], []
  inside: dict[str, list[str]] = {name: [] for name in prefixes}
  for raw in file.keys():
    owner = _owner(raw, prefixes)
    if UNREAD.fullmatch(raw):
      unread.append(raw)
    elif owner is None:
      unknown.append(raw)
    else:
      inside[owner].append(raw[len(prefixes[owner]) :])
  for name, config in configs.items():
    prefix = prefixes[name]
    modules = modules_of(family, name)(config)
    origins, rest = single_file_maps.find_origins(inside[name], modules)
    tensors[name] = single_file_tensors.RenamedTensors(file, prefix, origins)
    spare = _spare(family, name, config)
    for raw in rest:
      kept = unread if spare and spare.fullmatch(raw) else unknown
      kept.append(prefix + raw)
  if unknown:
    more = f' and {len(unknown) - SHOWN} more' if len(unknown) > SHOWN else ''
    raise ValueError(
      f'{path}: {len(unknown)} tensors that a model of the family {family!r}'
      f' and these configs has not: {", ".join(unknown[:SHOWN])}{more}; do'
      ' configs and file belong together?'
    )
  return Checkpoint(family, tensors, tuple(unread))


def load_params(
  path: str | pathlib.Path,
  configs: Mapping[str, Any],
  *,
  place: Callable[[str, types.PyTree], types.PyTree] | None = None,
) -> dict[str, types.Params]:
  """Float32 parameters of the components in `configs`, from one file.

  `place` makes a component's Shardings of its name and its parameters' shapes;
  each process then reads only its parts. Without it the leaves are NumPy.

  Raises:
    ValueError: as `open_checkpoint`; tensors that are not those of a config.
  """
  checkpoint = open_checkpoint(path, configs)
  params = {}
  for name, tensors in checkpoint.tensors.items():
    component = diffusers_maps.COMPONENTS[name]
    target = component.init_shapes(configs[name])
    params[name] = mapping.to_flax(
      tensors,
      target,
      component.rules,
      place=None if place is None else place(name, target),
    )
  return params


def modules_of(family: str, name: str) -> Callable[[Any], dict[str, str]]:
  """What makes the table of a component's modules of its config."""
  if name == 'unet':
    return single_file_maps.unet_modules
  if name == 'vae':
    return single_file_maps.vae_modules
  if name == 'text_encoder_2':
    return single_file_maps.open_clip_projected_modules
  if family == 'sd2':
    return single_file_maps.open_clip_modules
  return single_file_maps.clip_modules


def write_base(
  path: str | pathlib.Path,
  *,
  configs: str | pathlib.Path,
  out: str | pathlib.Path,
  prediction_type: str = '',
) -> None:
  """Writes the diffusers folder of a checkpoint, without weights.

  `configs` is either a pipeline folder of the same architecture, whose configs
  and tokenizers are copied (its weights need not be there); or the folder of
  CLIP's tokenizer, vocab.json and merges.txt, to which the configs of the
  family's first release are added. With the latter `prediction_type` may be
  given, and for SD 2.x must be: 'v_prediction' is right for the checkpoints
  trained at 768 pixels, 'epsilon' for those at 512, and nothing in the file
  tells. SDXL-Turbo looks like SDXL: its schedule needs its own folder.

  Raises:
    ValueError: as `detect`; no such folders; a pipeline of another family; a
      `prediction_type` that is missing, unknown or contradicts a folder; `out`
      is there already.
  """
  configs, out = pathlib.Path(configs), pathlib.Path(out)
  family = detect(path)
  if out.exists():
    raise ValueError(f'{out}: exists already; choose another folder')
  out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix='.base.', dir=out.parent) as scratch:
    draft = pathlib.Path(scratch) / 'base'
    single_file_base.write(draft, family, configs, prediction_type)
    draft.rename(out)


def cached_base(
  path: str | pathlib.Path,
  *,
  configs: str | pathlib.Path,
  prediction_type: str = '',
) -> pathlib.Path:
  """The folder that `write_base` writes, in $DPO_JAX_CACHE by its content.

  Raises:
    ValueError: as `write_base`; no `configs`.
  """
  family = detect(path)
  if not str(configs):
    raise ValueError(
      f'{path}: a single file has no configs and no tokenizer; name a diffusers'
      f' folder of its architecture ({family}), or one with the vocab.json and'
      ' merges.txt of CLIP'
    )
  cache = buckets.cache_folder()
  cache.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix='.base.', dir=cache) as scratch:
    draft = pathlib.Path(scratch) / 'base'
    single_file_base.write(
      draft, family, pathlib.Path(configs), prediction_type
    )
    digest = hashlib.sha256()
    for file in sorted(draft.rglob('*')):
      if file.is_file():
        digest.update(file.relative_to(draft).as_posix().encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    out = cache / f'{family}-{digest.hexdigest()[:16]}'
    if not out.exists():
      draft.rename(out)
  return out


def _detect(file: safetensors_io.Tensors) -> str:
  names = file.keys()
  tops = sorted({name.partition('.')[0] for name in names})
  shown = ', '.join(tops[:SHOWN]) + (', ...' if len(tops) > SHOWN else '')
  kinds = ', '.join(PREFIXES)
  if FIRST_CONV not in names:
    raise ValueError(
      f'{file.source}: no {FIRST_CONV}, so not a single-file checkpoint of'
      f' {kinds}; its tensors begin with {shown}'
    )
  channels = file.shape(FIRST_CONV)[1]
  if channels != 4:
    raise ValueError(
      f'{file.source}: its UNet takes {channels} channels (inpainting, depth or'
      ' editing), which is not supported; allowed: 4'
    )

  def has(prefix):
    return any(name.startswith(prefix) for name in names)

  for family in ('sd1', 'sd2'):
    if has(PREFIXES[family]['text_encoder']):
      return family
  if has(PREFIXES['sdxl']['text_encoder_2']):
    return 'sdxl'
  # SD-Turbo has the same prefix but takes no sizes.
  if has(PREFIXES['sdxl_refiner']['text_encoder_2']) and has(
    f'{UNET}label_emb.'
  ):
    return 'sdxl_refiner'
  raise ValueError(
    f'{file.source}: none of the text encoders of {kinds} in it; its tensors'
    f' begin with {shown}. Give a complete checkpoint, or a pipeline folder'
  )


def _owner(raw: str, prefixes: Mapping[str, str]) -> str | None:
  for name, prefix in prefixes.items():
    if raw.startswith(prefix):
      return name
  return None


def _spare(family: str, name: str, config: Any) -> re.Pattern | None:
  """What SD 2.x leaves out of its text encoder: a layer and the projection."""
  if (family, name) != ('sd2', 'text_encoder'):
    return None
  layer = rf'transformer\.resblocks\.{config.num_hidden_layers}\..*'
  return re.compile(rf'{layer}|{single_file_maps.PROJECTION}')
