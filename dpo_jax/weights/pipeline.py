"""A pipeline as a folder in the diffusers layout."""

import dataclasses
import pathlib
import shutil
from collections.abc import Collection, Mapping
from typing import Any

from dpo_jax import types
from dpo_jax.weights import (
  diffusers_maps,
  drafts,
  json_files,
  model_card,
  model_index,
  safetensors_io,
  weight_files,
)

SCHEDULER_CONFIG = 'scheduler_config.json'
WEIGHT_SUFFIXES = safetensors_io.PICKLE_SUFFIXES | {
  '.safetensors',
  '.msgpack',
  '.h5',
  '.onnx',
}


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """What a pipeline folder holds.

  Attributes:
    folder: where it was read.
    class_name: that of diffusers, one of model_index.CLASSES.
    configs: component name to model config, of all its components.
    scheduler_config: the dict of scheduler_config.json.
    params: component name to parameters, of those that were loaded.
    tokenizer_folders: one per text encoder, in their order.
    force_zeros_for_empty_prompt: no negative prompt means zeros instead of the
      states of an empty one (SDXL).
    requires_aesthetics_score: the micro-conditioning ends in a score instead
      of the target size (the SDXL refiner).
  """

  folder: pathlib.Path
  class_name: str
  configs: dict[str, Any]
  scheduler_config: dict[str, Any]
  params: dict[str, types.Params]
  tokenizer_folders: tuple[pathlib.Path, ...]
  force_zeros_for_empty_prompt: bool = False
  requires_aesthetics_score: bool = False


def load(
  folder: str | pathlib.Path,
  *,
  without: Collection[str] = (),
  variant: str = '',
  place: diffusers_maps.PlaceFn | None = None,
  dtype: str | Mapping[str, str] = 'float32',
) -> Pipeline:
  """Reads a pipeline folder, weights and all.

  Of components named in `without` only the config.json is read, and `params`
  lacks them. `variant` and `place` are as for load_component; `dtype` is that
  of the parameters, or component names to it where that is not float32. All
  configs are checked before any weights are read.

  Raises:
    ValueError: one line naming the file and what is wrong with it.
  """
  folder = pathlib.Path(folder)
  index = model_index.read(folder)
  _check_names('without', without)
  dtypes = dict.fromkeys(index.components, 'float32')
  if isinstance(dtype, str):
    dtypes = dict.fromkeys(index.components, dtype)
  else:
    _check_names('dtype', dtype)
    dtypes |= dtype
  scheduler = json_files.read(folder / 'scheduler' / SCHEDULER_CONFIG)
  configs = {
    name: diffusers_maps.read_config(name, folder / name)
    for name in index.components
  }
  model_index.check_parts(folder, index, configs)
  for name in index.tokenizers:
    _check_tokenizer(folder / name)
  params = {}
  for name in index.components:
    if name not in without:
      _, params[name] = diffusers_maps.load_component(
        name, folder / name, variant=variant, place=place, dtype=dtypes[name]
      )
  return Pipeline(
    folder=folder,
    class_name=index.class_name,
    configs=configs,
    scheduler_config=scheduler,
    params=params,
    tokenizer_folders=tuple(folder / name for name in index.tokenizers),
    **index.flags,
  )


def save(
  out: str | pathlib.Path,
  *,
  base: str | pathlib.Path,
  params: Mapping[str, types.Params],
  dtype: str = 'float32',
  variant: str = '',
  changed: Collection[str] | None = None,
  base_name: str = '',
  notes: str = '',
) -> None:
  """Writes `base` again with the weights of the components in `params`.

  All else is copied from `base`. Of the components that are not in `params`,
  the weights that load(base, variant=variant) reads get the plain file names.
  For the model card: `changed` names the components whose weights are new
  (default: all in `params`), `base_name` is the base's name (default: its
  folder's), `notes` are added. The folder appears at once or not at all, and
  replaces an earlier pipeline there.

  Raises:
    ValueError: `out` is `base` or another kind of folder, an unknown component
      or dtype, or parameters that do not fit the component's config.json.
  """
  changed = tuple(params) if changed is None else tuple(changed)
  out, base = pathlib.Path(out), pathlib.Path(base)
  index = model_index.read(base)
  _check_names('params', params, index.components)
  _check_names('changed', changed, tuple(params))
  if out.resolve() == base.resolve():
    raise ValueError(f'{out}: is the base pipeline; choose another folder')
  for name in params:
    diffusers_maps.read_config(name, base / name)
  with drafts.replacing(out, mark=model_index.NAME) as draft:
    shutil.copyfile(base / model_index.NAME, draft / model_index.NAME)
    for path in model_card.licence_files(base):
      shutil.copyfile(path, draft / path.name)
    for name in index.folders:
      if name in params:
        _copy_without_weights(base / name, draft / name)
        _write_weights(draft / name, name, params[name], dtype)
      elif (base / name).is_dir():
        shutil.copytree(base / name, draft / name)
        component = diffusers_maps.COMPONENTS.get(name)
        stem = component.stem if component else 'model'
        weight_files.make_plain(draft / name, stem, variant=variant)
    missing = _missing(draft, index)
    model_card.write(
      draft,
      name=out.name,
      class_name=index.class_name,
      base=base_name or base.resolve().name,
      changed=changed,
      written=tuple(params),
      copied=tuple(
        name for name in index.components if name not in (*params, *missing)
      ),
      missing=missing,
      dtype=dtype,
      notes=notes,
    )


def create(
  out: str | pathlib.Path,
  *,
  unet: Mapping[str, Any],
  scheduler: Mapping[str, Any],
  params: Mapping[str, types.Params],
  vae: Mapping[str, Any] | None = None,
  text_encoder: Mapping[str, Any] | None = None,
  text_encoder_2: Mapping[str, Any] | None = None,
  tokenizer_dir: str | pathlib.Path | None = None,
  tokenizer_2_dir: str | pathlib.Path | None = None,
  class_name: str = 'StableDiffusionPipeline',
  flags: Mapping[str, bool] | None = None,
  dtype: str = 'float32',
  notes: str = '',
) -> None:
  """Writes a new pipeline folder from dicts and parameters.

  `unet`, `vae` and the text encoders are the contents of their config.json
  (of a pixel model the first alone, with its `_class_name`),
  `scheduler` that of scheduler_config.json with its `_class_name`; each text
  encoder has a tokenizer; `params` has every component. `flags` are options of
  the class in model_index.json, such as force_zeros_for_empty_prompt. Appears
  at once or not at all.

  Raises:
    ValueError: unsupported options, components that are missing, not of the
      class, or do not fit each other, parameters that do not fit, no
      `_class_name` of the scheduler, no tokenizer.
  """
  out = pathlib.Path(out)
  given = _present(
    unet=unet,
    vae=vae,
    text_encoder=text_encoder,
    text_encoder_2=text_encoder_2,
  )
  tokenizers = _present(tokenizer=tokenizer_dir, tokenizer_2=tokenizer_2_dir)
  tokenizers = {name: pathlib.Path(path) for name, path in tokenizers.items()}
  index = model_index.make(class_name, components=tuple(given), flags=flags)
  _check_given(out, index, params, tokenizers, scheduler)
  configs = {
    name: diffusers_maps.COMPONENTS[name].make_config(values)
    for name, values in given.items()
  }
  model_index.check_parts(out, index, configs)
  with drafts.replacing(out, mark=model_index.NAME) as draft:
    _write_new(draft, index, given, tokenizers, scheduler)
    for name in given:
      _write_weights(draft / name, name, params[name], dtype)
    model_card.write(
      draft,
      name=out.name,
      class_name=class_name,
      changed=tuple(given),
      written=tuple(given),
      dtype=dtype,
      notes=notes,
    )


def _present(**values: Any) -> dict[str, Any]:
  return {name: value for name, value in values.items() if value is not None}


def _write_new(
  draft: pathlib.Path,
  index: model_index.ModelIndex,
  configs: Mapping[str, Mapping[str, Any]],
  tokenizers: Mapping[str, pathlib.Path],
  scheduler: Mapping[str, Any],
) -> None:
  """All of a new folder but the weights and the card."""
  for name, path in tokenizers.items():
    shutil.copytree(path, draft / name)
  (draft / 'scheduler').mkdir()
  json_files.write(draft / 'scheduler' / SCHEDULER_CONFIG, scheduler)
  for name, values in configs.items():
    (draft / name).mkdir()
    values = {**_identity(diffusers_maps.COMPONENTS[name]), **values}
    json_files.write(draft / name / 'config.json', values)
  entries = model_index.to_json(
    index,
    scheduler_class=scheduler['_class_name'],
    tokenizer_classes={
      name: _tokenizer_class(path) for name, path in tokenizers.items()
    },
  )
  json_files.write(draft / model_index.NAME, entries)


def _check_names(
  argument: str,
  names: Collection[str],
  allowed: Collection[str] = tuple(diffusers_maps.COMPONENTS),
) -> None:
  for name in names:
    if name not in allowed:
      raise ValueError(
        f'{argument} has an unknown component {name!r}; allowed:'
        f' {", ".join(allowed)}'
      )


def _missing(
  folder: pathlib.Path, index: model_index.ModelIndex
) -> tuple[str, ...]:
  """Components without weights, whose base had configs only."""
  return tuple(
    name
    for name in index.components
    if not weight_files.exist(
      folder / name, diffusers_maps.COMPONENTS[name].stem
    )
  )


def _check_given(
  out: pathlib.Path,
  index: model_index.ModelIndex,
  params: Mapping[str, types.Params],
  tokenizers: Mapping[str, pathlib.Path],
  scheduler: Mapping[str, Any],
) -> None:
  _check_names('params', params, index.components)
  missing = [name for name in index.components if name not in params]
  if missing:
    raise ValueError(f'{out}: no parameters for {", ".join(missing)}')
  if '_class_name' not in scheduler:
    raise ValueError(f"{out}: the scheduler's config has no '_class_name'")
  if tokenizers.keys() != set(index.tokenizers):
    raise ValueError(
      f'{out}: tokenizers given: {", ".join(tokenizers) or "none"}; needed:'
      f' {", ".join(index.tokenizers)}'
    )
  for path in tokenizers.values():
    _check_tokenizer(path)


def _check_tokenizer(folder: pathlib.Path) -> None:
  names = {path.name for path in folder.glob('*')}
  if not ({'vocab.json', 'merges.txt'} <= names or 'tokenizer.json' in names):
    raise ValueError(
      f'{folder}: no tokenizer: neither vocab.json with merges.txt nor'
      ' tokenizer.json'
    )


def _tokenizer_class(folder: pathlib.Path) -> str:
  path = folder / 'tokenizer_config.json'
  values = json_files.read(path) if path.is_file() else {}
  return values.get('tokenizer_class', 'CLIPTokenizer')


def _write_weights(
  folder: pathlib.Path,
  name: str,
  params: types.Params,
  dtype: str,
) -> None:
  values = diffusers_maps.load_config(folder)
  config = diffusers_maps.COMPONENTS[name].make_config(values)
  diffusers_maps.save_component(
    name, folder, config=config, params=params, dtype=dtype
  )
  # transformers opens a model in the dtype that its config.json names.
  stale = {key: dtype for key in ('dtype', 'torch_dtype') if key in values}
  if stale:
    json_files.write(folder / 'config.json', {**values, **stale})


def _copy_without_weights(source: pathlib.Path, target: pathlib.Path) -> None:
  def ignore(_, names):
    return [
      name
      for name in names
      if pathlib.PurePath(name).suffix in WEIGHT_SUFFIXES
      or ('.index.' in name and name.endswith('.json'))
    ]

  shutil.copytree(source, target, ignore=ignore)


def _identity(component: diffusers_maps.Component) -> dict[str, Any]:
  if component.library == 'transformers':
    return {
      'architectures': [component.class_name],
      'model_type': 'clip_text_model',
    }
  return {'_class_name': component.class_name}
