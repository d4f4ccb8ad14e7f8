"""Finds the weight files of a component: one file or shards, any variant.

The names are those that diffusers and transformers write: STEM.safetensors, or
STEM.safetensors.index.json beside STEM-00001-of-00002.safetensors; with the
variant fp16 STEM.fp16.safetensors, or STEM.safetensors.index.fp16.json (older
diffusers: STEM.safetensors.fp16.index.json).
"""

import pathlib
import re

from dpo_jax.weights import json_files, safetensors_io

# Stands in where a folder has no full precision.
FALLBACK = 'fp16'
VARIANT = re.compile(r'[A-Za-z0-9_]+')


def find(folder: pathlib.Path, stem: str, *, variant: str = '') -> pathlib.Path:
  """The weight file, or the index of the shards, of a component's folder.

  Without a variant it is that of full precision, else the one of float16; a
  variant that is named must be there.

  Raises:
    ValueError: there is none (says what lies there instead), or a file and an
      index, which may disagree.
  """
  found, _ = _search(folder, stem, variant)
  if found is None:
    raise ValueError(_nothing(folder, stem, variant))
  return found


def open_weights(
  folder: pathlib.Path, stem: str, *, variant: str = ''
) -> safetensors_io.TensorFiles:
  """The tensors of the file or the shards that `find` finds.

  Raises:
    ValueError: as `find` and TensorFiles do, and if an index and its shards do
      not agree to the tensor.
  """
  path = find(folder, stem, variant=variant)
  if path.suffix != '.json':
    return safetensors_io.TensorFiles([path])
  weight_map = _read_index(path)
  shards = [path.parent / name for name in dict.fromkeys(weight_map.values())]
  for shard in shards:
    if not shard.is_file():
      raise ValueError(f'{path}: names {shard.name}, which is not there')
  files = safetensors_io.TensorFiles(shards, source=str(path))
  _check_index(path, weight_map, files)
  return files


def exist(folder: pathlib.Path, stem: str) -> bool:
  """Does `find` find weights of full precision or float16?"""
  return _search(folder, stem, '')[0] is not None


def make_plain(folder: pathlib.Path, stem: str, *, variant: str = '') -> None:
  """Renames what `find` finds, if anything, to what readers look for first.

  Shards move with their index; weights that had the plain name are removed.
  """
  found, variant = _search(folder, stem, variant)
  plain = _candidates(folder, stem, '')
  if found is None or not variant:
    return
  for path in plain:
    if path.suffix == '.json' and path.is_file():
      for name in set(_read_index(path).values()):
        (folder / name).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
  if found.suffix != '.json':
    found.rename(plain[0])
    return
  values = json_files.read(found)
  weight_map = _read_index(found)
  # STEM.fp16-00001-of-00002.safetensors; older, ...-of-00002.fp16.safetensors
  names = {
    name: name.replace(f'.{variant}', '', 1) for name in weight_map.values()
  }
  for old, new in names.items():
    (folder / old).rename(folder / new)
  moved = {name: names[file] for name, file in weight_map.items()}
  json_files.write(plain[1], {**values, 'weight_map': moved})
  found.unlink()


def _search(
  folder: pathlib.Path, stem: str, variant: str
) -> tuple[pathlib.Path | None, str]:
  for name in _variants(variant):
    candidates = _candidates(folder, stem, name)
    found = [path for path in candidates if path.is_file()]
    if len(found) > 1:
      raise ValueError(
        f'{folder}: has both {found[0].name} and {found[1].name}, which may'
        ' differ; remove one'
      )
    if found:
      return found[0], name
  return None, ''


def _variants(variant: str) -> tuple[str, ...]:
  if variant and not VARIANT.fullmatch(variant):
    raise ValueError(
      f'variant={variant!r}: not a word such as {FALLBACK!r}, which stands in'
      f' model.{FALLBACK}.safetensors'
    )
  return (variant,) if variant else ('', FALLBACK)


def _candidates(
  folder: pathlib.Path, stem: str, variant: str
) -> list[pathlib.Path]:
  dot = f'.{variant}' if variant else ''
  names = [
    f'{stem}{dot}.safetensors',
    f'{stem}.safetensors.index{dot}.json',
    f'{stem}.safetensors{dot}.index.json',
  ]
  return [folder / name for name in dict.fromkeys(names)]


def _read_index(path: pathlib.Path) -> dict[str, str]:
  weight_map = json_files.read(path).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f'{path}: no weight_map from tensors to files')
  for name, file in weight_map.items():
    # The index comes with the weights: it may not lead out of the folder.
    plain = isinstance(file, str) and re.fullmatch(r'[\w.-]+', file, re.ASCII)
    if not plain or not file.endswith('.safetensors') or file[0] == '.':
      raise ValueError(
        f'{path}: tensor {name!r} is said to be in {file!r}; allowed: the'
        ' plain name of a .safetensors file in the same folder'
      )
  return weight_map


def _check_index(
  path: pathlib.Path,
  weight_map: dict[str, str],
  files: safetensors_io.TensorFiles,
) -> None:
  for name, file in weight_map.items():
    if name not in files.keys():
      raise ValueError(f'{path}: tensor {name!r} is not in {file}')
    if files.path(name).name != file:
      raise ValueError(
        f'{path}: tensor {name!r} is in {files.path(name).name}, not in {file}'
      )
  for name in files.keys():
    if name not in weight_map:
      raise ValueError(
        f'{files.path(name)}: tensor {name!r} is missing from {path.name}'
      )


def _nothing(folder: pathlib.Path, stem: str, variant: str) -> str:
  tried = [
    _candidates(folder, stem, name)[0].name for name in _variants(variant)
  ]
  wanted = f'{folder}: no {" nor ".join(tried)}, nor an index of shards'
  names = sorted(path.name for path in folder.glob('*'))
  pickles = [
    name
    for name in names
    if pathlib.PurePath(name).suffix in safetensors_io.PICKLE_SUFFIXES
  ]
  if pickles:
    return f'{wanted}; {pickles[0]} is refused: {safetensors_io.HINT}'
  others = [name for name in names if '.safetensors' in name]
  if others:
    return f'{wanted}; there is {", ".join(others[:3])}'
  return wanted
