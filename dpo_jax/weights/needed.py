"""Which of a pipeline's files are needed.

A pipeline on the hub holds each weight in several formats and precisions, and
often a second time in one large file. Of those one set of safetensors is used.
"""

import json
import pathlib
import re
from collections.abc import Collection, Iterable

from dpo_jax.weights import safetensors_io

INDEX = 'model_index.json'
# The folders of a pipeline. model_index.json says which of them it has.
COMPONENTS = (
  'feature_extractor',
  'image_encoder',
  'safety_checker',
  'scheduler',
  'text_encoder',
  'text_encoder_2',
  'tokenizer',
  'tokenizer_2',
  'unet',
  'vae',
)
# Those with weights that dpo_jax reads.
MODELS = ('unet', 'vae', 'text_encoder', 'text_encoder_2')
FALLBACK = 'fp16'
PAPERS = ('LICENSE', 'LICENCE', 'NOTICE', 'README')
# The variant stands before the shard's number, and in old files after it.
WEIGHTS = re.compile(
  r'(model|diffusion_pytorch_model)(\.(?P<variant>\w+))?'
  r'(-(?P<part>\d+)-of-(?P<parts>\d+))?(\.(?P<old_variant>\w+))?'
  r'\.safetensors'
)
SHARD_INDEX = re.compile(
  r'(model|diffusion_pytorch_model)\.safetensors(\.(?P<old_variant>\w+))?'
  r'\.index(\.(?P<variant>\w+))?\.json'
)


def listed_components(index: str | bytes, source: str) -> list[str]:
  """The components that the text of a model_index.json has.

  Raises ValueError naming `source` when it is not a JSON object.
  """
  try:
    items = json.loads(index).items()
  except (ValueError, AttributeError) as error:
    raise ValueError(f'{source}: not a JSON object') from error
  # Entries are [library, class], and [null, null] for what was left out.
  return [
    key
    for key, value in items
    if isinstance(value, list) and len(value) == 2 and value[1] is not None
  ]


def needed_files(
  all_names: Iterable[str],
  *,
  variant: str = '',
  components: Collection[str] = COMPONENTS,
) -> list[str]:
  """Those of a pipeline's files that are needed, sorted.

  They are model_index.json, licence and model card, and from the folders of
  `components` the configs and tokenizers and one set of safetensors weights, a
  single file before shards. Pickles, other formats, and the single-file
  checkpoints beside the folders never are.

  The set is the one of full precision, or the fp16 one where that is all there
  is; with `variant` it is that variant's. A safety checker and the like are
  taken too, because an export lists them and diffusers opens no folder that
  lacks a listed component; of theirs the variant may be missing.

  Raises:
    ValueError: no model_index.json; a component with weights but no
      safetensors, or none of that variant; shards that are missing.
  """
  names = sorted(set(all_names))
  if INDEX not in names:
    raise ValueError(f'no {INDEX} among {len(names)} files; not a pipeline')
  folders: dict[str, list[str]] = {}
  chosen = [INDEX]
  for name in names:
    folder, _, file = name.rpartition('/')
    if folder in components:
      folders.setdefault(folder, []).append(file)
    elif not folder and pathlib.PurePath(name).stem.upper() in PAPERS:
      chosen.append(name)
  for folder, files in folders.items():
    small = [file for file in files if _is_small(file)]
    weights = _choose_weights(folder, files, variant)
    chosen += [f'{folder}/{file}' for file in [*small, *weights]]
  return sorted(chosen)


def _is_small(file: str) -> bool:
  suffix = pathlib.PurePath(file).suffix
  return suffix in ('.json', '.txt') and '.index.' not in file


def _choose_weights(folder: str, files: list[str], variant: str) -> list[str]:
  """One set of weights of a component; none if it has no weights at all."""
  singles: dict[str, str] = {}
  shards: dict[str, dict[int, str]] = {}
  counts: dict[str, int] = {}
  indices: dict[str, str] = {}
  for file in files:
    found = WEIGHTS.fullmatch(file) or SHARD_INDEX.fullmatch(file)
    if not found:
      continue
    kind = found['variant'] or found['old_variant'] or ''
    if found.re is SHARD_INDEX:
      indices[kind] = file
    elif found['part']:
      shards.setdefault(kind, {})[int(found['part'])] = file
      counts[kind] = int(found['parts'])
    else:
      singles[kind] = file
  kinds = sorted(singles.keys() | indices.keys())
  if not kinds:
    _check_no_weights(folder, files)
    return []
  kind = _choose_kind(folder, kinds, variant)
  if kind in singles:
    return [singles[kind]]
  count, parts = counts.get(kind, 1), shards.get(kind, {})
  missing = [i for i in range(1, count + 1) if i not in parts]
  if missing:
    raise ValueError(
      f'{folder}: {len(missing)} of {count} shards of {indices[kind]} are'
      f' missing, the first is number {missing[0]}'
    )
  return [indices[kind], *parts.values()]


def _choose_kind(folder: str, kinds: list[str], variant: str) -> str:
  wanted = [variant]
  if not variant:
    wanted.append(FALLBACK)
  elif folder not in MODELS:
    wanted.append('')
  for kind in wanted:
    if kind in kinds:
      return kind
  raise ValueError(
    f'{folder}: no weights of variant={variant!r}; allowed:'
    f' {", ".join(map(repr, kinds))}'
  )


def _check_no_weights(folder: str, files: list[str]) -> None:
  pickles = [
    file
    for file in files
    if pathlib.PurePath(file).suffix in safetensors_io.PICKLE_SUFFIXES
  ]
  if pickles:
    hint = safetensors_io.HINT
    if folder not in MODELS:
      hint += f'; or do without it: "{folder}": [null, null] in {INDEX}'
    raise ValueError(
      f'{folder}: no safetensors; {pickles[0]} is refused: {hint}'
    )
  if folder in MODELS:
    raise ValueError(f'{folder}: no weights among {", ".join(files)}')
