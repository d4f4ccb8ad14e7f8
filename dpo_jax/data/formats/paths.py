"""Which files a --source names, and pictures inside a folder only."""

import glob
import os
import pathlib
import re
from collections.abc import Sequence

Paths = str | os.PathLike | Sequence[str | os.PathLike]

# The files of a data set on a hub: SPLIT-00000-of-00012-HASH.parquet.
_SPLIT = re.compile(r'(?P<split>[a-z][a-z0-9_]*)-\d{5}-of-\d{5}\b.*')


def find_files(paths: Paths, suffix: str = '.parquet') -> list[str]:
  """Returns the files that files, folders or globs name, once each.

  Of a folder those with the suffix, in order of their names. Raises ValueError
  for a path that names none.
  """
  single = isinstance(paths, str | os.PathLike)
  files = []
  for entry in [paths] if single else paths:
    path = pathlib.Path(entry)
    if path.is_file():
      found = [path]
    elif path.is_dir():
      found = sorted(path.rglob(f'*{suffix}'))
    else:
      found = sorted(pathlib.Path(p) for p in glob.glob(str(entry)))
    if not found:
      raise ValueError(
        f'{entry}: no {suffix[1:]} file there; name a file, a folder or a glob'
      )
    files += [str(p) for p in found]
  if not files:
    raise ValueError(f'no {suffix[1:]} file named')
  return list(dict.fromkeys(files))


def find_root(source: str) -> pathlib.Path:
  """The folder that names of files are given relative to."""
  path = pathlib.Path(source)
  if path.is_dir():
    return path
  if path.is_file():
    return path.parent
  parts = []
  for part in path.parts:
    if glob.has_magic(part):
      break
    parts.append(part)
  return pathlib.Path(*parts)


def choose_split(files: Sequence[str], split: str) -> list[str]:
  """The files of one split, where the files' names tell splits.

  Files named SPLIT-00000-of-00012... are of that split; if there are others
  too, or no such names at all, all files are taken. Raises ValueError when
  they name several splits and not this one.
  """
  matches = [_SPLIT.fullmatch(pathlib.Path(file).name) for file in files]
  if not all(matches):
    return list(files)
  splits = [match['split'] for match in matches if match]
  if split not in splits:
    if len(set(splits)) == 1:
      return list(files)
    raise ValueError(
      f'--split={split}: the files are of the splits '
      f'{", ".join(sorted(set(splits)))}; give one of them'
    )
  return [file for file, s in zip(files, splits, strict=True) if s == split]


def resolve_inside(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The file `name` below a folder.

  Raises ValueError for a name that leads out of it, through links too.
  """
  try:
    root = folder.resolve()
    path = (root / name).resolve()
    inside = path.is_relative_to(root) and path != root
  except (OSError, ValueError, RuntimeError) as error:
    # A NUL, a name too long, a loop of links.
    raise ValueError(f'the path {name[:80]!a} is no path') from error
  if not inside or pathlib.PurePath(name).is_absolute():
    raise ValueError(
      f'the path {name[:80]!a} leads out of the folder; give paths inside it'
    )
  return path
