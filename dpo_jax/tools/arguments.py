"""Command lines of the tools: flags, clear errors, exit codes."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
  """argparse whose errors are one line and suggest the nearest flag."""

  def __init__(self, module: str, description: str):
    """`module`: what follows `python -m`; `description`: for --help."""
    super().__init__(
      prog=f'python -m {module}',
      description=description,
      allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )

  def error(self, message: str) -> NoReturn:
    """Raises ValueError instead of leaving the process."""
    raise ValueError(message)

  def parse(self, argv: Sequence[str]) -> argparse.Namespace:
    """The flags; ValueError for what is unknown, missing or mistyped."""
    values, unknown = self.parse_known_args(list(argv))
    if unknown:
      word = unknown[0].partition('=')[0]
      near = difflib.get_close_matches(
        word, self._option_string_actions, n=1, cutoff=0.0
      )
      hint = f'; did you mean {near[0]}?' if near else ''
      raise ValueError(f'{word}: there is no such flag{hint}')
    return values


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
  """Exit code of a tool: 0, or 2 with one line when the input is wrong."""
  try:
    main(argv)
  except (ValueError, OSError) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return USAGE_ERROR
  return 0


def size(text: str) -> tuple[int, int]:
  """(height, width) of 'HxW' or of one number for both."""
  match = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
  if not match or not int(match[1]) or not int(match[2] or 1):
    raise argparse.ArgumentTypeError(
      f'{text!r}: give height and width in pixels, 768x1024, or one number'
    )
  return int(match[1]), int(match[2] or match[1])


def number(
  kind: type, *, low: float, high: float = float('inf')
) -> Callable[[str], float]:
  """A parser of numbers in [low, high]."""

  def parse(text: str):
    try:
      value = kind(text)
    except ValueError:
      value = None
    if value is None or not low <= value <= high:
      top = '' if high == float('inf') else f' and at most {high}'
      raise argparse.ArgumentTypeError(
        f'{text!r}: give {"an integer" if kind is int else "a number"}, at '
        f'least {low}{top}'
      )
    return value

  return parse


def switch(text: str) -> bool:
  """true or false."""
  if text.lower() not in ('true', 'false'):
    raise argparse.ArgumentTypeError(f'{text!r}: give true or false')
  return text.lower() == 'true'
