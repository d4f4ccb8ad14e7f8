"""Writes a diffusers folder without weights for a single-file checkpoint."""

import pathlib
import shutil

from dpo_jax.weights import (
  diffusers_maps,
  json_files,
  model_index,
  needed,
  released,
)

TOKENIZER_FILES = ('vocab.json', 'merges.txt')


def write(
  out: pathlib.Path, family: str, configs: pathlib.Path, prediction_type: str
) -> None:
  """Writes the new folder `out`; see `single_file.write_base`."""
  if (configs / needed.INDEX).is_file():
    if prediction_type:
      raise ValueError(
        f'{configs}: its scheduler says the prediction type; leave'
        f' prediction_type={prediction_type!r} empty'
      )
    _copy_configs(family, configs, out)
    return
  if not all((configs / name).is_file() for name in TOKENIZER_FILES):
    raise ValueError(
      f'{configs}: neither a diffusers pipeline ({needed.INDEX}) nor a CLIP'
      f' tokenizer ({" and ".join(TOKENIZER_FILES)})'
    )
  allowed = ', '.join(released.PREDICTION_TYPES)
  if family == 'sd2' and not prediction_type:
    raise ValueError(
      f"prediction_type='' for SD 2.x, whose file does not tell; allowed:"
      f' {allowed} (trained at 512, at 768 pixels)'
    )
  prediction_type = prediction_type or 'epsilon'
  if prediction_type not in released.PREDICTION_TYPES:
    raise ValueError(f'prediction_type={prediction_type!r}; allowed: {allowed}')
  _write_released(family, configs, out, prediction_type)


def _copy_configs(
  family: str, configs: pathlib.Path, out: pathlib.Path
) -> None:
  index = model_index.read(configs)
  components = released.components(family)
  if set(index.components) != set(components):
    raise ValueError(
      f'{configs}: a {index.class_name} of {", ".join(index.components)}, but'
      f' the file is of the family {family!r}, which has'
      f' {", ".join(components)}'
    )
  values = json_files.read(configs / needed.INDEX)
  # The file has no weights for these, and diffusers does without them.
  absent = {name: [None, None] for name in model_index.COPIED if name in values}
  if 'requires_safety_checker' in values or 'safety_checker' in values:
    absent['requires_safety_checker'] = False
  out.mkdir()
  json_files.write(out / needed.INDEX, {**values, **absent})
  for name in ('scheduler', *index.components, *index.tokenizers):
    if not (configs / name).is_dir():
      raise ValueError(f'{configs / name}: no such folder')
    (out / name).mkdir()
    for file in sorted((configs / name).iterdir()):
      if file.suffix in ('.json', '.txt') and '.index.' not in file.name:
        shutil.copyfile(file, out / name / file.name)


def _write_released(
  family: str, configs: pathlib.Path, out: pathlib.Path, prediction_type: str
) -> None:
  words = len(json_files.read(configs / 'vocab.json'))
  if words != released.VOCABULARY:
    raise ValueError(
      f'{configs / "vocab.json"}: {words} words, not the'
      f" {released.VOCABULARY} of CLIP's"
    )
  out.mkdir()
  pads = released.PAD_TOKENS[family]
  for name, pad in pads.items():
    (out / name).mkdir()
    for file in TOKENIZER_FILES:
      shutil.copyfile(configs / file, out / name / file)
    values = released.tokenizer_config(pad)
    json_files.write(out / name / 'tokenizer_config.json', values)
  for name, values in released.model_configs(family, prediction_type).items():
    (out / name).mkdir()
    class_name = diffusers_maps.COMPONENTS[name].class_name
    key = 'architectures' if name in model_index.TOKENIZERS else '_class_name'
    named = [class_name] if key == 'architectures' else class_name
    json_files.write(out / name / 'config.json', {key: named, **values})
  scheduler = released.scheduler_config(family, prediction_type)
  (out / 'scheduler').mkdir()
  json_files.write(out / 'scheduler' / 'scheduler_config.json', scheduler)
  index = model_index.make(
    released.CLASS_NAMES[family],
    components=released.components(family),
    flags=released.FLAGS[family],
  )
  values = model_index.to_json(
    index,
    scheduler_class=scheduler['_class_name'],
    tokenizer_classes=dict.fromkeys(pads, 'CLIPTokenizer'),
  )
  json_files.write(out / needed.INDEX, values)
