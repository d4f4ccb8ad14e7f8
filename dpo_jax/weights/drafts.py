"""Folders that appear at once or not at all."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(out: pathlib.Path, *, mark: str) -> Iterator[pathlib.Path]:
  """A draft folder that becomes `out` when the block ends without error.

  Raises ValueError if `out` is there and neither empty nor a folder of the same
  kind, which holds a file named `mark`.
  """
  is_ours = (out / mark).is_file()
  if out.exists() and not is_ours and (out.is_file() or any(out.iterdir())):
    raise ValueError(
      f'{out}: exists and is not a pipeline (no {mark}); choose another folder'
    )
  out.parent.mkdir(parents=True, exist_ok=True)
  prefix = f'.{out.name}.'
  with tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as scratch:
    draft, old = pathlib.Path(scratch) / 'new', pathlib.Path(scratch) / 'old'
    draft.mkdir()
    yield draft
    if out.exists():
      out.rename(old)
    draft.rename(out)
