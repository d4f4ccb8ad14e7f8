"""The command line: config file, overrides, workdir, and clear errors."""

import difflib
import pathlib
from collections.abc import Iterator, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags


def _leaves(config: ml_collections.ConfigDict, prefix='') -> Iterator[str]:
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from _leaves(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}'


def _override_keys(argv: Sequence[str]) -> list[tuple[str, str | None]]:
  """(key, value) of each `--config.key=value` or `--config.key value`."""
  found = []
  for i, word in enumerate(argv):
    name, equals, value = word.lstrip('-').partition('=')
    if word.startswith('-') and name.startswith('config.'):
      following = argv[i + 1] if i + 1 < len(argv) else None
      key = name.removeprefix('config.')
      found.append((key, value if equals else following))
  return found


def _unknown(key: str, known: Sequence[str]) -> str:
  near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
  hint = f'; did you mean {near[0]}?' if near else ''
  return f'--config.{key}: there is no such key{hint}'


def _check_types(
  config: ml_collections.ConfigDict, overrides: Sequence[tuple]
) -> list[str]:
  """Problems of overrides whose text is not of the field's type."""
  problems = []
  for key, text in overrides:
    *path, last = key.split('.')
    node = config
    for name in path:
      node = node[name]
    kind = node.get_type(last)
    parsers = {int: int, float: float}
    if kind in parsers:
      try:
        parsers[kind](text)
      except (TypeError, ValueError):
        problems.append(
          f'--config.{key}={text}: must be {kind.__name__}, like the default '
          f'{node[last]!r}'
        )
    elif kind is bool and str(text).lower() not in ('true', 'false'):
      problems.append(f'--config.{key}={text}: must be true or false')
  return problems


def _parse(argv: Sequence[str]) -> flags.FlagValues:
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Recipe, for instance configs/sd15.py.',
    flag_values=values,
    sys_argv=list(argv),
  )
  flags.DEFINE_string('workdir', None, 'Output folder.', flag_values=values)
  values(list(argv))
  return values


def _tidy(error: Exception) -> str:
  """The message on one line, without the traceback absl puts into it."""
  text = ' '.join(str(error).split())
  if 'Traceback' in text:
    text = f'--config: {text.rsplit("Error: ", 1)[-1]}'
  return text


def _check_recipe(argv: Sequence[str]) -> None:
  """Raises ValueError when the named config file is not there."""
  for i, word in enumerate(argv):
    name, equals, value = word.lstrip('-').partition('=')
    if word.startswith('-') and name == 'config':
      value = value if equals else ' '.join(argv[i + 1 : i + 2])
      path = value.partition(':')[0]
      if not pathlib.Path(path).is_file():
        raise ValueError(f'--config={value}: there is no file {path!r}')


def parse(argv: Sequence[str]) -> tuple[ml_collections.ConfigDict, str]:
  """(locked config with overrides applied, workdir) of a command line.

  Raises ValueError listing every misspelt or mistyped key, with the nearest
  key there is.
  """
  overrides = _override_keys(argv)
  plain = [
    word
    for i, word in enumerate(argv)
    if not word.lstrip('-').startswith('config.')
    # The value of an override that was written without an equals sign.
    and not (
      i
      and argv[i - 1].lstrip('-').startswith('config.')
      and '=' not in argv[i - 1]
    )
  ]
  _check_recipe(argv)
  try:
    values = _parse(plain)
  except (flags.Error, OSError, ImportError, AttributeError) as error:
    raise ValueError(_tidy(error)) from error
  if values.config is None:
    raise ValueError('--config is missing: name a recipe in configs/')
  if not values.workdir:
    raise ValueError('--workdir is missing: name the output folder')
  known = sorted(_leaves(values.config))
  problems = [_unknown(k, known) for k, _ in overrides if k not in known]
  good = [(k, v) for k, v in overrides if k in known]
  problems += _check_types(values.config, good)
  if problems:
    raise ValueError('; '.join(problems))
  try:
    values = _parse(argv)
  except (flags.Error, TypeError, ValueError) as error:
    raise ValueError(_tidy(error)) from error
  return values.config.lock(), values.workdir
