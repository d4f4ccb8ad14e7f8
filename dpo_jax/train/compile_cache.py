"""Compiled programs that are kept: a run that goes on need not wait again."""

import os

import jax

_SETTING = 'jax_compilation_cache_dir'


def choose(
  folder: str, *, workdir: str | os.PathLike, platform: str
) -> str | None:
  """Where to keep them; None leaves JAX as it is.

  'auto' is `workdir/compiled` on an accelerator, unless JAX was told a folder
  already (JAX_COMPILATION_CACHE_DIR). A CPU's programs are for that very kind
  of processor and quickly made: there a folder must be named. '' is none.
  """
  if folder != 'auto':
    return folder or None
  if platform == 'cpu' or getattr(jax.config, _SETTING):
    return None
  return f'{os.fspath(workdir)}/compiled'


def start(folder: str, *, workdir: str | os.PathLike) -> None:
  """Keeps what takes more than a second to compile, where `choose` says."""
  platform = jax.devices()[0].platform
  chosen = choose(folder, workdir=workdir, platform=platform)
  if chosen is not None:
    jax.config.update(_SETTING, chosen)
