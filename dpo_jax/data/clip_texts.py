"""Captions as OpenCLIP's tokenizer reads them, before it cuts them up."""

import html
import re

import ftfy


def clean(text: str) -> str:
  """Mended Unicode, HTML entities resolved twice, single spaces, lower case.

  Radford et al. 2021's `basic_clean` and `whitespace_clean`. The tokenizer
  would lower letters one by one, which makes another letter of a sigma that
  ends a word.
  """
  text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return re.sub(r'\s+', ' ', text).strip().lower()
