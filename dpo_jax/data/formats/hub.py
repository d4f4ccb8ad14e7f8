"""Fetches the parquet files of a data set on the Hugging Face hub."""

import glob
import pathlib
import re

from dpo_jax.data.formats import paths as paths_lib

_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[\w.-]+', re.ASCII)


def is_id(source: str) -> bool:
  """Whether a source that is no local path could be a hub id."""
  return _ID.fullmatch(source) is not None


def fetch(
  name: str, *, split: str, revision: str = ''
) -> tuple[pathlib.Path, list[str]]:
  """(the commit's folder in huggingface_hub's cache, parquet files below it).

  Those of one split, where their names tell splits. `revision` is a branch,
  tag or commit; '' is the main branch. Raises ValueError with one line on what
  to install, or to fetch by hand.
  """
  place = pathlib.Path(name).absolute()
  here = f'{name!r}: no such file or folder here ({place})'
  try:
    import huggingface_hub  # An optional extra.
  except ImportError as error:
    raise ValueError(
      f"{here}; to read it as a hub id: pip install 'dpo_jax[hub]'"
    ) from error
  hub = huggingface_hub.HfApi()
  try:
    commit = hub.dataset_info(name, revision=revision or None).sha
    names = hub.list_repo_files(name, repo_type='dataset', revision=commit)
  # The errors of a network share no class over the package's releases.
  except Exception as error:
    raise _unreachable(here, name, error) from error
  files = sorted(n for n in names if n.endswith('.parquet'))
  if not files:
    raise ValueError(f'{name!r} on the hub: holds no .parquet file')
  files = paths_lib.choose_split(files, split)
  try:
    folder = huggingface_hub.snapshot_download(
      name,
      repo_type='dataset',
      revision=commit,
      allow_patterns=[glob.escape(file) for file in files],
    )
  except Exception as error:
    raise _unreachable(here, name, error) from error
  return pathlib.Path(folder), [f'{folder}/{file}' for file in files]


def _unreachable(here: str, name: str, error: Exception) -> ValueError:
  text = ' '.join(str(error).split())
  return ValueError(
    f'{here}, and the hub gave nothing ({type(error).__name__}: {text[:200]}); '
    f'where there is a network, download it (hf download {name} --repo-type '
    'dataset --local-dir FOLDER), then give that folder'
  )
