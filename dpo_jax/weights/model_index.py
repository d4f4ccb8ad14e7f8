"""model_index.json: which pipeline a folder holds, and do its parts fit."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from dpo_jax.models import pixels
from dpo_jax.weights import diffusers_maps, json_files

NAME = 'model_index.json'


@dataclasses.dataclass(frozen=True)
class PipelineClass:
  """One class of diffusers.

  Attributes:
    components: those of COMPONENTS that it must have.
    optional: those that it may have.
    flags: its options in model_index.json and their defaults.
    unet: the class of its UNet.
    task: the tag of its model card.
    nulls: further parts, which a new pipeline goes without.
  """

  components: tuple[str, ...]
  optional: tuple[str, ...] = ()
  flags: tuple[tuple[str, bool], ...] = ()
  unet: str = diffusers_maps.CONDITIONAL
  task: str = 'text-to-image'
  nulls: tuple[str, ...] = ('feature_extractor', 'image_encoder')


# Unconditional, in pixels: all else is in the scheduler.
_PIXELS = PipelineClass(
  ('unet',),
  unet=diffusers_maps.UNCONDITIONAL,
  task='unconditional-image-generation',
  nulls=(),
)
ZEROS, AESTHETICS = 'force_zeros_for_empty_prompt', 'requires_aesthetics_score'
CLASSES = {
  'StableDiffusionPipeline': PipelineClass(
    ('unet', 'vae', 'text_encoder'),
    nulls=('safety_checker', 'feature_extractor', 'image_encoder'),
  ),
  'StableDiffusionXLPipeline': PipelineClass(
    ('unet', 'vae', 'text_encoder', 'text_encoder_2'),
    flags=((ZEROS, True),),
  ),
  # The refiner has the second text encoder only.
  'StableDiffusionXLImg2ImgPipeline': PipelineClass(
    ('unet', 'vae', 'text_encoder_2'),
    optional=('text_encoder',),
    flags=((ZEROS, True), (AESTHETICS, False)),
    task='image-to-image',
  ),
  'DDPMPipeline': _PIXELS,
  'DDIMPipeline': _PIXELS,
}
TOKENIZERS = {'text_encoder': 'tokenizer', 'text_encoder_2': 'tokenizer_2'}
# Copied with the folder, never loaded.
COPIED = ('safety_checker', 'feature_extractor', 'image_encoder')
HARMLESS = ('requires_safety_checker', 'add_watermarker')
ABSENT = (None, [None, None])


@dataclasses.dataclass(frozen=True)
class ModelIndex:
  """What model_index.json says.

  Attributes:
    components: names of the parts with weights, in the order of COMPONENTS.
    flags: the options of the class, defaults filled in.
  """

  class_name: str
  components: tuple[str, ...]
  flags: dict[str, bool]

  @property
  def text_encoders(self) -> tuple[str, ...]:
    """Names of the text encoders, in order."""
    return tuple(name for name in self.components if name in TOKENIZERS)

  @property
  def tokenizers(self) -> tuple[str, ...]:
    """Names of the tokenizers' folders, one per text encoder."""
    return tuple(TOKENIZERS[name] for name in self.text_encoders)

  @property
  def folders(self) -> tuple[str, ...]:
    """Names of all sub-folders that may be there."""
    return (*self.components, *self.tokenizers, 'scheduler', *COPIED)


def read(folder: pathlib.Path) -> ModelIndex:
  """Reads model_index.json of a pipeline's folder.

  Raises:
    ValueError: another class, another kind of component, or an entry that this
      package does not know.
  """
  path = folder / NAME
  values = json_files.read(path)
  class_name = values.get('_class_name')
  if class_name not in CLASSES:
    raise ValueError(
      f'{path}: _class_name={class_name!r} is not supported; allowed:'
      f' {", ".join(CLASSES)}'
    )
  kind = CLASSES[class_name]
  components = tuple(
    name
    for name in diffusers_maps.COMPONENTS
    if name in kind.components
    or (name in kind.optional and values.get(name) not in ABSENT)
  )
  for name in components:
    _check_component(path, kind, name, values.get(name))
  index = ModelIndex(
    class_name=class_name,
    components=components,
    flags={
      name: _read_flag(path, values, name, default)
      for name, default in kind.flags
    },
  )
  for name in ('scheduler', *index.tokenizers):
    if not _is_class(values.get(name)):
      raise ValueError(
        f'{path}: {name}={values.get(name)!r} is not supported; allowed: a'
        " list of a library's and a class's name"
      )
  allowed = {*index.folders, *HARMLESS, *index.flags}
  for name, value in values.items():
    if name in allowed or name.startswith('_') or value in ABSENT:
      continue
    raise ValueError(
      f'{path}: {name}={value!r} is not supported with {class_name}; set it to'
      ' null if the model does not need it'
    )
  return index


def make(
  class_name: str,
  *,
  components: Collection[str],
  flags: Mapping[str, bool] | None = None,
) -> ModelIndex:
  """A new index; ValueError where components or flags are not the class's."""
  if class_name not in CLASSES:
    raise ValueError(
      f'class_name={class_name!r} is not supported; allowed:'
      f' {", ".join(CLASSES)}'
    )
  kind = CLASSES[class_name]
  missing = [name for name in kind.components if name not in components]
  if missing:
    raise ValueError(f'{class_name} needs {", ".join(missing)}')
  for name in components:
    if name not in kind.components + kind.optional:
      raise ValueError(f'{class_name} has no {name}')
  known = dict(kind.flags)
  for name in flags or {}:
    if name not in known:
      raise ValueError(
        f'{class_name} has no option {name!r}; allowed:'
        f' {", ".join(known) or "none"}'
      )
  ordered = [name for name in diffusers_maps.COMPONENTS if name in components]
  return ModelIndex(class_name, tuple(ordered), {**known, **(flags or {})})


def to_json(
  index: ModelIndex,
  *,
  scheduler_class: str,
  tokenizer_classes: Mapping[str, str],
) -> dict[str, Any]:
  """The content of model_index.json.

  `tokenizer_classes` maps the tokenizers' folders to their classes.
  """
  kind = CLASSES[index.class_name]
  absent = [name for name in kind.optional if name not in index.components]
  absent += [TOKENIZERS[name] for name in absent]
  return {
    '_class_name': index.class_name,
    # Without this diffusers warns that a safety checker is missing.
    **(
      {'requires_safety_checker': False}
      if 'safety_checker' in kind.nulls
      else {}
    ),
    **index.flags,
    **{name: [None, None] for name in (*kind.nulls, *absent)},
    'scheduler': ['diffusers', scheduler_class],
    **{
      name: ['transformers', class_name]
      for name, class_name in tokenizer_classes.items()
    },
    **{name: _library_and_class(kind, name) for name in index.components},
  }


def check_parts(
  folder: pathlib.Path, index: ModelIndex, configs: Mapping[str, Any]
) -> None:
  """Do the networks fit each other and the pipeline's class?

  Raises:
    ValueError: naming the options of the UNet, VAE and text encoders that
      differ.
  """
  wanted = CLASSES[index.class_name].unet
  if not isinstance(configs['unet'], diffusers_maps.UNET_CONFIGS[wanted]):
    raise ValueError(
      f'{folder}: {index.class_name} needs a UNet whose config.json has '
      f'_class_name={wanted!r}'
    )
  if 'vae' in configs:
    _check_latents(folder, index, configs)
  else:
    _check_pixels(folder, configs['unet'])


def _check_pixels(folder: pathlib.Path, unet: Any) -> None:
  for option in ('in_channels', 'out_channels'):
    value = getattr(unet, option)
    if value not in pixels.CHANNELS or value != unet.in_channels:
      raise ValueError(
        f'{folder}: the UNet has {option}={value}; without a VAE in_channels '
        'and out_channels must both be 1 (grey pictures) or both 3'
      )


def _check_latents(
  folder: pathlib.Path, index: ModelIndex, configs: Mapping[str, Any]
) -> None:
  unet, vae = configs['unet'], configs['vae']
  for option in ('in_channels', 'out_channels'):
    if getattr(unet, option) != vae.latent_channels:
      raise ValueError(
        f'{folder}: the UNet has {option}={getattr(unet, option)} but the VAE'
        f' has latent_channels={vae.latent_channels}'
      )
  widths = [configs[name].hidden_size for name in index.text_encoders]
  if unet.cross_attention_dim != sum(widths):
    shown = ' + '.join(map(str, widths))
    raise ValueError(
      f'{folder}: the UNet has cross_attention_dim={unet.cross_attention_dim}'
      f' but {" and ".join(index.text_encoders)} have hidden_size={shown}'
    )
  _check_addition(folder, index, configs)


def _check_addition(
  folder: pathlib.Path, index: ModelIndex, configs: Mapping[str, Any]
) -> None:
  unet = configs['unet']
  needed = 'text_time' if 'text_encoder_2' in configs else None
  if unet.addition_embed_type != needed:
    raise ValueError(
      f'{folder}: the UNet has addition_embed_type='
      f'{unet.addition_embed_type!r} but {index.class_name} needs {needed!r}'
    )
  if needed is None:
    return
  # SDXL's micro-conditioning: three sizes; with a score, two and a number.
  numbers = 5 if index.flags.get(AESTHETICS) else 6
  pooled = configs['text_encoder_2'].projection_dim
  total = pooled + numbers * unet.addition_time_embed_dim
  if unet.projection_class_embeddings_input_dim != total:
    raise ValueError(
      f'{folder}: the UNet has projection_class_embeddings_input_dim='
      f'{unet.projection_class_embeddings_input_dim}, should be {total}:'
      f' projection_dim={pooled} of text_encoder_2 + {numbers} *'
      f' addition_time_embed_dim={unet.addition_time_embed_dim}'
    )


def _library_and_class(kind: PipelineClass, name: str) -> list[str]:
  component = diffusers_maps.COMPONENTS[name]
  class_name = kind.unet if name == 'unet' else component.class_name
  return [component.library, class_name]


def _check_component(
  path: pathlib.Path, kind: PipelineClass, name: str, value: Any
) -> None:
  expected = _library_and_class(kind, name)
  if value != expected:
    raise ValueError(
      f'{path}: {name}={value!r} is not supported; allowed: {expected!r}'
    )


def _read_flag(
  path: pathlib.Path, values: Mapping[str, Any], name: str, default: bool
) -> bool:
  value = values.get(name, default)
  if not isinstance(value, bool):
    raise ValueError(f'{path}: {name}={value!r}; allowed: true or false')
  return value


def _is_class(value: Any) -> bool:
  return (
    isinstance(value, list)
    and len(value) == 2
    and all(isinstance(word, str) for word in value)
  )
