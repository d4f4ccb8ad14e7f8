"""Whether a picture can be trained on, and why not."""

import dataclasses
import io
import os
import pathlib
import stat
import threading

from PIL import Image

from dpo_jax.data import images as images_lib
from dpo_jax.data.formats import rows as rows_lib

# Decoding takes up to 20 bytes a pixel (transparency, 16 bits): 320 MB.
MAX_PIXELS = 1 << 24
# A picture is scaled by its shorter side before it is cut to a square: of
# 4000 x 1 pixels, at 512, a strip of 3 GB.
MAX_ASPECT = 16
# Above this one picture is decoded at a time.
_LARGE_PIXELS = 1 << 22
MAX_BYTES = 64 << 20
JPEG_QUALITY = 95

# What an error's text holds -> the reason that is counted.
_REASONS = {
  'cannot identify': 'not a picture',
  'truncated': 'truncated',
  'no known range': 'pixels without a known range',
  'pixels, at most': 'too many pixels',
  'decompression bomb': 'too many pixels',
}


class UnreadableError(ValueError):
  """A picture that is not kept; the text is a reason out of a few."""


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture that decodes; height and width as displayed, as it came.

  `digest` is of the bytes as they came; `data` may be a smaller picture.
  """

  data: bytes
  digest: str
  height: int
  width: int


class PictureCheck:
  """Reads and decodes pictures; safe to share by threads."""

  def __init__(self, size: int | None):
    """`size`: a longer shorter side is scaled to it, and written as JPEG."""
    self._size = size
    self._lock = threading.Lock()

  def __call__(self, given: bytes | pathlib.Path | None) -> Picture:
    """The picture; raises UnreadableError with the reason."""
    data = _read(given)
    try:
      with Image.open(io.BytesIO(data), formats=images_lib.FORMATS) as image:
        size = image.size
    except Exception as error:
      raise UnreadableError(_reason(error)) from error
    pixels = size[0] * size[1]
    if pixels > MAX_PIXELS:
      raise UnreadableError('too many pixels')
    if max(size) > MAX_ASPECT * min(size):
      raise UnreadableError('too narrow')
    if pixels <= _LARGE_PIXELS:
      return self._decode(data)
    with self._lock:
      return self._decode(data)

  def _decode(self, data: bytes) -> Picture:
    try:
      decoded = images_lib.decode(data)
    except ValueError as error:
      raise UnreadableError(_reason(error)) from error
    digest = rows_lib.hash_image(data)
    height, width = decoded.shape[:2]
    if self._size and min(height, width) > self._size:
      scaled = images_lib.resize_shorter(decoded, self._size)
      buffer = io.BytesIO()
      # Full colour resolution: the picture has been a JPEG once already.
      Image.fromarray(scaled).save(
        buffer, 'JPEG', quality=JPEG_QUALITY, subsampling=0
      )
      data = buffer.getvalue()
    return Picture(data, digest, height, width)


def _read(given: bytes | pathlib.Path | None) -> bytes:
  """The encoded bytes; UnreadableError if there are none, or too many."""
  if isinstance(given, pathlib.Path):
    try:
      given = _read_file(given)
    except (FileNotFoundError, NotADirectoryError) as error:
      raise UnreadableError('no such file') from error
    except OSError as error:
      raise UnreadableError('a file that cannot be read') from error
  if not given:
    raise UnreadableError('no bytes')
  if len(given) > MAX_BYTES:
    raise UnreadableError(f'more than {MAX_BYTES} bytes')
  return given


def _read_file(path: pathlib.Path) -> bytes:
  """The file's bytes, one above MAX_BYTES at most."""
  # Without waiting, should it be a pipe.
  handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
  try:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
      raise UnreadableError('no plain file')
    with open(handle, 'rb', closefd=False) as file:
      return file.read(MAX_BYTES + 1)
  finally:
    os.close(handle)


def _reason(error: Exception) -> str:
  """One of a few reasons, whatever the decoder says of its bytes."""
  text = str(error)
  for part, reason in _REASONS.items():
    if part in text:
      return reason
  return 'damaged'
