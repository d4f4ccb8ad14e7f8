"""A Stable Diffusion pipeline as a folder in the diffusers layout."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dpo_jax import types
from dpo_jax.models import clip, unet, vae
from dpo_jax.weights import diffusers_maps, safetensors_io

INDEX = 'model_index.json'
PIPELINE_CLASS = 'StableDiffusionPipeline'
SCHEDULER_CONFIG = 'scheduler_config.json'
WEIGHT_SUFFIXES = safetensors_io.PICKLE_SUFFIXES | {
  '.safetensors',
  '.msgpack',
  '.h5',
  '.onnx',
}
CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

Written by dpo_jax{origin}. Weights in {dtype}.

    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained('{name}')
{notes}"""


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """What a pipeline folder holds.

  Attributes:
    folder: where it was read.
    scheduler_config: the dict of scheduler_config.json.
    params: 'unet', 'vae' and 'text_encoder' to float32 NumPy trees.
  """

  folder: pathlib.Path
  unet_config: unet.UNetConfig
  vae_config: vae.VAEConfig
  text_config: clip.CLIPTextConfig
  scheduler_config: dict[str, Any]
  params: dict[str, types.Params]

  @property
  def tokenizer_folder(self) -> pathlib.Path:
    """Where the tokenizer's files lie."""
    return self.folder / 'tokenizer'


def load(
  folder: str | pathlib.Path, *, without: Collection[str] = ()
) -> Pipeline:
  """Reads a StableDiffusionPipeline folder, weights and all.

  Of components named in `without` only the config.json is read, and `params`
  lacks them: they are to be trained from random weights.

  Raises:
    ValueError: one line naming the file and what is wrong with it.
  """
  folder = pathlib.Path(folder)
  _check_index(folder)
  scheduler = diffusers_maps.read_json(folder / 'scheduler' / SCHEDULER_CONFIG)
  configs, params = {}, {}
  for name in diffusers_maps.COMPONENTS:
    if name in without:
      configs[name] = diffusers_maps.read_config(name, folder / name)
      continue
    configs[name], params[name] = diffusers_maps.load_component(
      name, folder / name
    )
  width = configs['text_encoder'].hidden_size
  if configs['unet'].cross_attention_dim != width:
    raise ValueError(
      f'{folder}: the UNet has cross_attention_dim='
      f'{configs["unet"].cross_attention_dim} but the text encoder has'
      f' hidden_size={width}'
    )
  return Pipeline(
    folder=folder,
    unet_config=configs['unet'],
    vae_config=configs['vae'],
    text_config=configs['text_encoder'],
    scheduler_config=scheduler,
    params=params,
  )


def save(
  out: str | pathlib.Path,
  *,
  base: str | pathlib.Path,
  params: Mapping[str, types.Params],
  dtype: str = 'float32',
  notes: str = '',
) -> None:
  """Writes `base` again with the weights of the components in `params`.

  All else is copied from `base`. `notes` are added to the model card. The
  folder appears at once or not at all, and replaces an earlier pipeline there.

  Raises:
    ValueError: `out` is `base` or another kind of folder, an unknown component
      or dtype, or parameters that do not fit the component's config.json.
  """
  out, base = pathlib.Path(out), pathlib.Path(base)
  index = _check_index(base)
  _check_components(params)
  if out.resolve() == base.resolve():
    raise ValueError(f'{out}: is the base pipeline; choose another folder')
  with _replacing(out) as draft:
    shutil.copyfile(base / INDEX, draft / INDEX)
    for path in base.iterdir():
      is_licence = path.stem.upper() in ('LICENSE', 'LICENCE', 'NOTICE')
      if path.is_file() and is_licence:
        shutil.copyfile(path, draft / path.name)
    for name in index:
      if name in params:
        _copy_without_weights(base / name, draft / name)
        values = diffusers_maps.load_config(draft / name)
        _write_weights(draft / name, name, values, params[name], dtype)
      elif (base / name).is_dir():
        shutil.copytree(base / name, draft / name)
    origin = f' from {base.resolve().name} ({", ".join(params)} changed)'
    _write_card(draft, out.name, origin, dtype, notes)


def create(
  out: str | pathlib.Path,
  *,
  unet: Mapping[str, Any],
  vae: Mapping[str, Any],
  text_encoder: Mapping[str, Any],
  scheduler: Mapping[str, Any],
  tokenizer_dir: str | pathlib.Path,
  params: Mapping[str, types.Params],
  dtype: str = 'float32',
  notes: str = '',
) -> None:
  """Writes a new StableDiffusionPipeline folder from dicts and parameters.

  `unet`, `vae` and `text_encoder` are the contents of their config.json,
  `scheduler` that of scheduler_config.json with its `_class_name`; `params`
  has all three. Appears at once or not at all.

  Raises:
    ValueError: unsupported options, missing components, parameters that do not
      fit, no `_class_name` of the scheduler, no tokenizer folder.
  """
  out, tokenizer_dir = pathlib.Path(out), pathlib.Path(tokenizer_dir)
  _check_components(params)
  missing = diffusers_maps.COMPONENTS.keys() - params.keys()
  if missing:
    raise ValueError(f'{out}: no parameters for {", ".join(sorted(missing))}')
  if '_class_name' not in scheduler:
    raise ValueError(f"{out}: the scheduler's config has no '_class_name'")
  if not tokenizer_dir.is_dir():
    raise ValueError(f'{tokenizer_dir}: no such folder (the tokenizer)')
  given = {'unet': unet, 'vae': vae, 'text_encoder': text_encoder}
  with _replacing(out) as draft:
    shutil.copytree(tokenizer_dir, draft / 'tokenizer')
    (draft / 'scheduler').mkdir()
    _write_json(draft / 'scheduler' / SCHEDULER_CONFIG, dict(scheduler))
    for name, component in diffusers_maps.COMPONENTS.items():
      (draft / name).mkdir()
      values = {**_identity(component), **given[name]}
      _write_json(draft / name / 'config.json', values)
      _write_weights(draft / name, name, values, params[name], dtype)
    _write_json(draft / INDEX, _make_index(scheduler['_class_name'], draft))
    _write_card(draft, out.name, '', dtype, notes)


def _check_index(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / INDEX
  index = diffusers_maps.read_json(path)
  found = index.get('_class_name')
  if found != PIPELINE_CLASS:
    raise ValueError(
      f'{path}: _class_name={found!r} is not supported; allowed:'
      f' {PIPELINE_CLASS!r}'
    )
  for name, component in diffusers_maps.COMPONENTS.items():
    expected = [component.library, component.class_name]
    if index.get(name) != expected:
      raise ValueError(
        f'{path}: {name}={index.get(name)!r} is not supported; allowed:'
        f' {expected!r}'
      )
  return index


def _check_components(params: Mapping[str, types.Params]) -> None:
  for name in params:
    if name not in diffusers_maps.COMPONENTS:
      raise ValueError(
        f'params has an unknown component {name!r}; allowed:'
        f' {", ".join(diffusers_maps.COMPONENTS)}'
      )


def _write_weights(
  folder: pathlib.Path,
  name: str,
  values: dict[str, Any],
  params: types.Params,
  dtype: str,
) -> None:
  config = diffusers_maps.COMPONENTS[name].make_config(values)
  diffusers_maps.save_component(
    name, folder, config=config, params=params, dtype=dtype
  )
  # transformers opens a model in the dtype that its config.json names.
  stale = {key: dtype for key in ('dtype', 'torch_dtype') if key in values}
  if stale:
    _write_json(folder / 'config.json', {**values, **stale})


def _copy_without_weights(source: pathlib.Path, target: pathlib.Path) -> None:
  def ignore(_, names):
    return [
      name
      for name in names
      if pathlib.PurePath(name).suffix in WEIGHT_SUFFIXES
      or name.endswith('.index.json')
    ]

  shutil.copytree(source, target, ignore=ignore)


def _identity(component: diffusers_maps.Component) -> dict[str, Any]:
  if component.library == 'transformers':
    return {
      'architectures': [component.class_name],
      'model_type': 'clip_text_model',
    }
  return {'_class_name': component.class_name}


def _make_index(scheduler_class: str, draft: pathlib.Path) -> dict[str, Any]:
  tokenizer = 'CLIPTokenizer'
  path = draft / 'tokenizer' / 'tokenizer_config.json'
  if path.is_file():
    values = diffusers_maps.read_json(path)
    tokenizer = values.get('tokenizer_class', tokenizer)
  return {
    '_class_name': PIPELINE_CLASS,
    'feature_extractor': [None, None],
    'image_encoder': [None, None],
    'requires_safety_checker': False,
    'safety_checker': [None, None],
    'scheduler': ['diffusers', scheduler_class],
    'tokenizer': ['transformers', tokenizer],
    **{
      name: [component.library, component.class_name]
      for name, component in diffusers_maps.COMPONENTS.items()
    },
  }


def _write_card(
  folder: pathlib.Path, name: str, origin: str, dtype: str, notes: str
) -> None:
  notes = f'\n{notes.strip()}\n' if notes else ''
  text = CARD.format(name=name, origin=origin, dtype=dtype, notes=notes)
  (folder / 'README.md').write_text(text)


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2, sort_keys=True) + '\n')


@contextlib.contextmanager
def _replacing(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A draft folder that becomes `out` when the block ends without error."""
  is_pipeline = (out / INDEX).is_file()
  if out.exists() and not is_pipeline and (out.is_file() or any(out.iterdir())):
    raise ValueError(
      f'{out}: exists and is not a pipeline; choose another folder'
    )
  out.parent.mkdir(parents=True, exist_ok=True)
  prefix = f'.{out.name}.'
  with tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as scratch:
    draft, old = pathlib.Path(scratch) / 'new', pathlib.Path(scratch) / 'old'
    draft.mkdir()
    yield draft
    if out.exists():
      out.rename(old)
    draft.rename(out)
