"""Captions are hostile text: how they are shown to a reader."""

import unicodedata

# Joiners carry meaning in Persian, Indic scripts and emoji sequences.
_KEPT = frozenset('\n\t\u200c\u200d')
# Controls, formats (bidi overrides among them), surrogates, private use,
# unassigned, line and paragraph separators.
_HIDDEN = frozenset(['Cc', 'Cf', 'Cs', 'Co', 'Cn', 'Zl', 'Zp'])


def printable(text: str) -> str:
  r"""Text with every invisible or reordering character as its \u escape.

  The result encodes to UTF-8, reads in storage order and holds no terminal
  escapes; letters of any script, newlines, tabs and joiners stay. It is not
  escaped for HTML: that is the template's part.
  """
  return ''.join(map(_visible, text))


def shorten(text: str, limit: int) -> str:
  """One printable line of at most `limit` characters, cut with an ellipsis.

  Raises ValueError for a limit that leaves no room for a character.
  """
  if limit < 2:
    raise ValueError(f'limit: got {limit}; give at least 2')
  # Captions reach 100 kB: cut first, as each character may become an escape.
  line = printable(' '.join(text[: 4 * limit].split()))
  if len(line) <= limit and len(text) <= 4 * limit:
    return line
  return line[: limit - 1].rstrip() + '\u2026'


def _visible(character: str) -> str:
  if character in _KEPT or unicodedata.category(character) not in _HIDDEN:
    return character
  return character.encode('unicode_escape', 'backslashreplace').decode('ascii')
