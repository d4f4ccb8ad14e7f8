"""Pages that stand alone: Jinja2 for hostile text, pictures inline."""

import base64
import functools
import io
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
import markupsafe
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dpo_jax.evaluate import captions


@functools.cache
def environment() -> jinja2.Environment:
  """Templates whose every value is escaped and printable."""
  made = jinja2.Environment(
    loader=jinja2.PackageLoader('dpo_jax.evaluate'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    # Every text that reaches the page, not only captions: a config, too,
    # can hold a bidi override or half a surrogate pair.
    finalize=_inert,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  made.filters.update(
    percent=percent,
    duration=duration,
    words=words,
    figure=figure,
    pretty=_pretty,
  )
  return made


def data_uri(pixels: UInt8[np.ndarray, 'H W 3']) -> str:
  """An image for the page: exact PNG when small, else a 384 pixel JPEG."""
  image, buffer = Image.fromarray(pixels), io.BytesIO()
  if max(image.size) <= 128:
    kind = 'png'
    image.save(buffer, format='PNG', optimize=True)
  else:
    kind = 'jpeg'
    image.thumbnail((384, 384))
    image.save(buffer, format='JPEG', quality=90)
  code = base64.b64encode(buffer.getvalue()).decode('ascii')
  return f'data:image/{kind};base64,{code}'


def _inert(value):
  if isinstance(value, markupsafe.Markup) or not isinstance(value, str):
    return value
  return captions.printable(value)


def percent(value: float) -> str:
  """A share as '12.3%'."""
  return f'{100 * value:.1f}%'


def duration(seconds: float) -> str:
  """Seconds as '4.0 s', '3 min 5 s' or '2 h 07 min'."""
  if seconds < 60:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min' if hours else f'{minutes} min {rest} s'


def words(key: str) -> str:
  """A key as a reader's words."""
  return key.removesuffix('_bytes').replace('_', ' ')


def figure(value: Any, key: str = '') -> str:
  """A value of a table, in a reader's units."""
  if isinstance(value, bool) or value is None:
    return {True: 'yes', False: 'no', None: 'unknown'}[value]
  if not isinstance(value, (int, float)):
    return str(value)
  if key.endswith('_bytes'):
    scale, unit = (30, 'GiB') if value >= 2**30 else (20, 'MiB')
    return f'{value / 2**scale:.2f} {unit}'
  if key.endswith('seconds') or key == 'seconds':
    return duration(value)
  return f'{value:,}' if isinstance(value, int) else f'{value:,.4g}'


def _pretty(value: Any) -> str:
  return json.dumps(value, indent=2, ensure_ascii=False)


def plain(value: Any) -> Any:
  """JSON's own types; numbers JSON cannot hold become their names."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if isinstance(value, (str, bool)) or value is None:
    return value
  if hasattr(value, '__array__') and not isinstance(value, type):
    return plain(np.asarray(value).tolist())
  if isinstance(value, int):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else str(value)
  return str(value)


def write_whole(path: str | os.PathLike, text: str) -> pathlib.Path:
  """Writes a text file that appears whole or not at all."""
  path = pathlib.Path(path)
  partial = path.with_name(path.name + '.partial')
  partial.write_bytes(text.encode('utf-8', 'backslashreplace'))
  os.replace(partial, path)
  return path
