"""Where models come from: a local path, a bucket (gs://) or the hub."""

import dataclasses
import pathlib
import re

from dpo_jax.weights import buckets, hub, safetensors_io

HUB_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')
FILE_SUFFIXES = safetensors_io.PICKLE_SUFFIXES | {'.safetensors'}


@dataclasses.dataclass(frozen=True)
class Source:
  """A model that lies on this machine.

  Attributes:
    path: a pipeline folder, or a safetensors file of the original layout.
    kind: 'folder' or 'file'.
    name: as it was asked for.
    revision: what exactly was fetched, to be recorded: the hub's commit hash,
      or a digest of the listing for a bucket; '' for a local path.
  """

  path: pathlib.Path
  kind: str
  name: str
  revision: str


def resolve(name: str, *, revision: str = '', variant: str = '') -> Source:
  """Finds a model by path, URL or hub id, and fetches it if it is not here.

  - A local folder or .safetensors file is taken as it is, before all else.
  - `gs://bucket/folder` (or any URL that fsspec opens), a folder or one
    .safetensors file, is fetched as `buckets.fetch` says.
  - `org/name` is a model on the hub, fetched as `hub.fetch` says; `revision`
    is a branch, tag or commit there.

  `variant`, such as 'fp16', says which weights to fetch: see `needed`. For a
  local folder it is up to who reads it.

  Raises:
    ValueError: one line: nothing of that name, what to install, to fetch by
      hand or to log in to; a revision or variant where there can be none.
  """
  path = pathlib.Path(name).expanduser()
  is_url = '://' in name
  if revision and (is_url or path.exists()):
    raise ValueError(
      f'{name!r}: revision={revision!r} is for hub ids only; leave it empty'
    )
  if is_url:
    _check_file(name, variant)
    path, digest = buckets.fetch(name, variant=variant)
    return Source(path, 'file' if path.is_file() else 'folder', name, digest)
  if path.is_dir():
    return Source(path, 'folder', name, '')
  if path.exists():
    _check_file(name, variant)
    if path.suffix != '.safetensors':
      raise ValueError(
        f'{name!r}: a file of another kind; allowed: a pipeline folder or a'
        ' .safetensors file'
      )
    return Source(path, 'file', name, '')
  if is_remote(name):
    path = hub.fetch(name, revision=revision, variant=variant)
    return Source(path, 'folder', name, path.name)
  raise ValueError(
    f'{name!r}: no such file or folder ({path.absolute()}); allowed: a pipeline'
    ' folder, a .safetensors file, gs://bucket/folder, or a hub id, org/name'
  )


def is_remote(name: str) -> bool:
  """Whether a name that is no local path could be a URL or a hub id."""
  if '://' in name:
    return True
  suffix = pathlib.PurePosixPath(name).suffix
  return bool(HUB_ID.fullmatch(name)) and suffix not in FILE_SUFFIXES


def _check_file(name: str, variant: str) -> None:
  suffix = pathlib.PurePosixPath(name).suffix
  if suffix in safetensors_io.PICKLE_SUFFIXES:
    raise ValueError(f'{name!r}: refused: {safetensors_io.HINT}')
  if suffix == '.safetensors' and variant:
    raise ValueError(
      f'{name!r}: variant={variant!r} is for pipeline folders, this is one'
      ' file; leave it empty'
    )
