"""Opens a --source in its format: a file, a folder, a glob or a hub id."""

import glob
import pathlib

from dpo_jax.data.formats import hpd, hub, jsonl, pickapic
from dpo_jax.data.formats import paths as paths_lib
from dpo_jax.data.formats import rows as rows_lib

FORMATS = ('pickapic', 'hpd', 'folder', 'jsonl')
_SUFFIXES = {'pickapic': '.parquet', 'hpd': '.json', 'jsonl': '.jsonl'}


def open_source(
  source: str, layout: str, *, split: str = 'train', revision: str = ''
) -> rows_lib.Source:
  """The checked rows of a source in one of FORMATS.

  Of files that are named by splits those of `split` are read. Raises
  ValueError naming the file and the row of what cannot be right.
  """
  there = pathlib.Path(source).exists() or glob.glob(source)
  if not there and hub.is_id(source):
    if layout != 'pickapic':
      raise ValueError(
        f'{source!r}: no such file or folder here; only pickapic is read by a '
        'hub id'
      )
    root, files = hub.fetch(source, split=split, revision=revision)
    return pickapic.open_source(files, root)
  if revision:
    raise ValueError(
      f'--revision={revision}: {source} is no hub id and has no revisions'
    )
  root = paths_lib.find_root(source)
  if layout == 'folder':
    return _open_folder(pathlib.Path(source))
  files = paths_lib.find_files(source, _SUFFIXES[layout])
  if layout == 'pickapic':
    files = paths_lib.choose_split(files, split)
    return pickapic.open_source(files, root)
  if layout == 'hpd':
    return hpd.open_source(files, root)
  return jsonl.open_source(files, root)


def _open_folder(folder: pathlib.Path) -> rows_lib.Source:
  """A folder of pictures with JSON Lines of pairs at its top."""
  files = sorted(folder.glob('*.jsonl'))
  if not files:
    raise ValueError(
      f'{folder}: no folder with a .jsonl of {{"caption", "winner", "loser"}} '
      'in it'
    )
  source = jsonl.open_source([str(file) for file in files], folder)
  if source.kind != 'pairs':
    raise ValueError(
      f'{folder}: its rows are {source.kind}, not pairs; give '
      f'--format=jsonl --source={files[0]}'
    )
  return source
