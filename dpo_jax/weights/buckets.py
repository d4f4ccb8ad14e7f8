"""Copies a model from a bucket, gs:// or another URL that fsspec opens."""

import hashlib
import os
import pathlib
import re
import secrets
from typing import Any

from dpo_jax.weights import needed

CACHE_VARIABLE = 'DPO_JAX_CACHE'


def fetch(url: str, *, variant: str = '') -> tuple[pathlib.Path, str]:
  """(local path, digest of what was there) of a pipeline or one file.

  Of a pipeline only `needed.needed_files` are copied. They go to a folder of
  $DPO_JAX_CACHE (~/.cache/dpo_jax) that is named by the listing's digest: what
  has changed there is fetched anew, and what was fetched is not fetched again.
  Each file appears whole or not at all, so an interrupted copy goes on.

  Raises:
    ValueError: one line: a package that is missing, nothing there, not a
      pipeline, a copy that failed.
  """
  url = url.rstrip('/')
  fs, root = _open_filesystem(url)
  infos, is_file = _list_files(fs, root, url)
  if is_file and not url.endswith('.safetensors'):
    raise ValueError(
      f'{url}: a file of another kind; allowed: a pipeline folder or a'
      ' .safetensors file'
    )
  if not is_file:
    names = _choose(fs, root, url, infos, variant)
    infos = {name: infos[name] for name in names}
  listing = [(name, sorted(map(repr, i.items()))) for name, i in infos.items()]
  digest = hashlib.sha256(f'{url}\n{listing}'.encode()).hexdigest()[:16]
  stem = re.sub(r'[^\w-]', '_', pathlib.PurePosixPath(root).stem) or 'model'
  folder = cache_folder() / f'{stem}-{digest}'
  for name, info in infos.items():
    _fetch_file(fs, info, folder / name, url=f'{url}/{name}')
  return folder / next(iter(infos)) if is_file else folder, digest


def _open_filesystem(url: str) -> tuple[Any, str]:
  protocol = url.partition('://')[0]
  try:
    import fsspec  # An optional extra.

    fs, root = fsspec.core.url_to_fs(url)
  except ImportError as error:
    hint = "pip install 'dpo_jax[gcs]'"
    if protocol not in ('gs', 'gcs'):
      hint = f'install fsspec and its package for {protocol}://'
    raise ValueError(f'{url}: {_brief(error)}; to open it: {hint}') from error
  # What a file system needs, an account say, it asks for in its own words.
  except Exception as error:
    raise ValueError(
      f'{url}: cannot be opened: {_brief(error)}; allowed: gs://bucket/folder'
    ) from error
  return fs, root.rstrip('/')


def _list_files(
  fs: Any, root: str, url: str
) -> tuple[dict[str, dict[str, Any]], bool]:
  """What fsspec knows of each file below `root`, or of `root` if it is one."""
  try:
    fs.invalidate_cache()
    is_file = fs.isfile(root)
    if is_file:
      parent, _, _ = root.rpartition('/')
      infos = {root: fs.info(root)}
    else:
      parent, infos = root, fs.find(root, detail=True)
  except Exception as error:
    raise ValueError(f'{url}: cannot be listed: {_brief(error)}') from error
  if not infos:
    raise ValueError(f'{url}: no such file or folder, or an empty one')
  found = {}
  for path, info in infos.items():
    name = path[len(parent) + 1 :]
    if '..' in name.split('/') or not isinstance(info.get('size'), int):
      raise ValueError(f'{url}: has {path!r}, outside of it or without a size')
    found[name] = info
  return found, is_file


def _choose(
  fs: Any, root: str, url: str, infos: dict[str, dict], variant: str
) -> list[str]:
  index = needed.INDEX
  if index not in infos:
    raise ValueError(f'{url}: no {index} there; not a pipeline folder')
  try:
    text = fs.cat_file(f'{root}/{index}')
  except Exception as error:
    raise ValueError(f'{url}/{index}: not fetched: {_brief(error)}') from error
  components = needed.listed_components(text, f'{url}/{index}')
  try:
    return needed.needed_files(infos, variant=variant, components=components)
  except ValueError as error:
    raise ValueError(f'{url}: {error}') from error


def _fetch_file(fs: Any, info: dict, target: pathlib.Path, *, url: str) -> None:
  """One file, whole or not at all, unless it is there."""
  if target.is_file() and target.stat().st_size == info['size']:
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  draft = target.with_name(f'.{target.name}.{secrets.token_hex(4)}')
  try:
    try:
      fs.get_file(info['name'], str(draft))
    except Exception as error:
      raise ValueError(f'{url}: not fetched: {_brief(error)}') from error
    size = draft.stat().st_size
    if size != info['size']:
      raise ValueError(
        f'{url}: fetched {size} of {info["size"]} bytes; try again'
      )
    draft.replace(target)
  finally:
    draft.unlink(missing_ok=True)


def cache_folder() -> pathlib.Path:
  """$DPO_JAX_CACHE, or ~/.cache/dpo_jax."""
  folder = os.environ.get(CACHE_VARIABLE) or '~/.cache/dpo_jax'
  return pathlib.Path(folder).expanduser()


def _brief(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text[:200]}'
