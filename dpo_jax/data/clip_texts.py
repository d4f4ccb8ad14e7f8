"""Captions as OpenCLIP's tokenizer reads them, before it cuts them up."""

import html
import re

import ftfy


def clean(text: str) -> str:
  """Mended Unicode, HTML entities resolved twice, single spaces.

  Radford et al. 2021's `basic_clean` and `whitespace_clean`; lower case is the
  tokenizer's.
  """
  text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return re.sub(r'\s+', ' ', text).strip()
