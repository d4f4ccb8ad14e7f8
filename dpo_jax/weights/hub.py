"""Fetches a pipeline from the Hugging Face hub, or finds it in the cache."""

import glob
import pathlib
from typing import Any

from dpo_jax.weights import needed

WANTED = (
  f'{needed.INDEX} and, of each component that it lists, the .json, .txt and'
  ' one set of .safetensors files'
)


def fetch(name: str, *, revision: str = '', variant: str = '') -> pathlib.Path:
  """The folder of `org/name` in huggingface_hub's cache; its name is a commit.

  `revision` is a branch, tag or commit; '' is the main branch. Only
  `needed.needed_files` are fetched. Without a network a cache that has them
  will do; a branch is then the commit that it was when last fetched.

  Raises:
    ValueError: one line: what to install, to log in to, or to fetch by hand
      and where to put it.
  """
  here = f'{name!r}: no folder here ({pathlib.Path(name).absolute()})'
  try:
    import huggingface_hub  # An optional extra.
  except ImportError as error:
    raise ValueError(
      f"{here}; to read it as a hub id: pip install 'dpo_jax[hub]'"
    ) from error
  folder = _find_commit(huggingface_hub, here, name, revision)
  index = folder / needed.INDEX
  if not index.is_file():
    raise ValueError(f'{name!r}: no {needed.INDEX} on the hub; not a pipeline')
  components = needed.listed_components(index.read_bytes(), str(index))
  try:
    names = huggingface_hub.HfApi().list_repo_files(name, revision=folder.name)
  # The errors of a network share no class over the package's releases.
  except Exception as error:
    gap = _find_gap(folder, components, variant)
    if gap:
      here = f'{here}, only a part of it in the cache ({gap})'
      raise _unreachable(here, name, error) from error
    return folder
  try:
    files = needed.needed_files(names, variant=variant, components=components)
  except ValueError as error:
    raise ValueError(f'{name!r} on the hub: {error}') from error
  patterns = [glob.escape(file) for file in files]
  try:
    huggingface_hub.snapshot_download(
      name, revision=folder.name, allow_patterns=patterns
    )
  except Exception as error:
    raise _unreachable(here, name, error) from error
  return folder


def _find_commit(hub: Any, here: str, name: str, revision: str) -> pathlib.Path:
  """The folder of the commit, where model_index.json lies then."""
  try:
    folder = hub.snapshot_download(
      name, revision=revision or None, allow_patterns=[needed.INDEX]
    )
  except hub.errors.GatedRepoError as error:
    raise ValueError(
      f'{name!r}: gated on the hub; accept its licence there and log in (hf'
      ' auth login)'
    ) from error
  except hub.errors.RepositoryNotFoundError as error:
    raise ValueError(
      f'{here}, and no model of that name on the hub, or a private one (hf auth'
      ' login)'
    ) from error
  except hub.errors.RevisionNotFoundError as error:
    raise ValueError(
      f'{name!r}: the hub has no revision {revision!r} of it; allowed: a'
      ' branch, a tag or a commit hash'
    ) from error
  except Exception as error:
    raise _unreachable(here, name, error) from error
  return pathlib.Path(folder)


def _find_gap(folder: pathlib.Path, components: list[str], variant: str) -> str:
  """What the cache lacks, '' if nothing."""
  paths = [path for path in folder.rglob('*') if path.is_file()]
  names = [path.relative_to(folder).as_posix() for path in paths]
  try:
    needed.needed_files(names, variant=variant, components=components)
  except ValueError as error:
    return str(error)
  absent = [name for name in components if not (folder / name).is_dir()]
  return f'{", ".join(absent)} missing' if absent else ''


def _unreachable(here: str, name: str, error: Exception) -> ValueError:
  text = ' '.join(str(error).split())
  return ValueError(
    f'{here}, and the hub gave nothing ({type(error).__name__}: {text[:200]});'
    f' where there is a network, download {WANTED} of {name} into a folder (hf'
    f' download {name} --local-dir FOLDER gets them and more), then give that'
    ' folder'
  )
