"""Decoding of untrusted image bytes, and augmentation shared inside a pair."""

import dataclasses
import hashlib
import io
import pathlib

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

# A header of a few bytes may announce a picture that fills the memory.
MAX_PIXELS = 1 << 26
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')

# How to undo each value of EXIF's orientation; 1 is upright.
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Where to crop, as fractions of the free rows and columns, and the flip."""

  top: float = 0.5
  left: float = 0.5
  flip: bool = False


def decode(data: bytes) -> UInt8[np.ndarray, 'H W 3']:
  """Returns uint8 [H, W, 3] RGB in display orientation.

  Transparent pictures are laid on white, 16-bit grey is scaled to 8 bits, of
  an animation the first frame is taken. Raises ValueError for bytes that are
  no picture of FORMATS, damaged or above MAX_PIXELS.
  """
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      width, height = image.size
      if width * height > MAX_PIXELS:
        raise ValueError(f'{width} x {height} pixels, at most {MAX_PIXELS}')
      rgb = _to_rgb(image)
      turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
      return np.asarray(rgb if turn is None else rgb.transpose(turn))
  except UnidentifiedImageError as error:
    # Pillow's text holds an address in memory, another one each time.
    raise ValueError(
      f'cannot decode image: cannot identify it as {", ".join(FORMATS)}'
    ) from error
  # Pillow's decoders raise almost anything on damaged bytes.
  except Exception as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise ValueError(f'cannot decode image: {reason}') from error


def load(path: pathlib.Path) -> UInt8[np.ndarray, 'H W 3']:
  """As `decode`, of a file; ValueError names it."""
  try:
    return decode(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def _to_rgb(image: Image.Image) -> Image.Image:
  """Returns the picture in mode RGB, as it is stored."""
  if image.mode == 'F':
    raise ValueError('floating-point pixels have no known range')
  if image.mode.startswith('I'):
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
      raise ValueError('32-bit pixels have no known range')
    return Image.fromarray((grey // 257).astype(np.uint8)).convert('RGB')
  if image.has_transparency_data:
    rgba = image.convert('RGBA')
    white = Image.new('RGBA', rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert('RGB')
  if image.mode == 'RGB':
    # As it is: convert would copy it.
    image.load()
    return image
  return image.convert('RGB')


def resize_shorter(
  pixels: UInt8[np.ndarray, 'H W 3'], size: int
) -> UInt8[np.ndarray, 'h w 3']:
  """Returns the picture with its shorter side `size` pixels long (Lanczos)."""
  h, w = resized_shape(*pixels.shape[:2], size)
  if (h, w) == pixels.shape[:2]:
    return pixels
  image = Image.fromarray(pixels)
  return np.asarray(image.resize((w, h), Image.Resampling.LANCZOS))


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
  """(height, width) after `resize_shorter`."""
  shorter = min(height, width)
  return (
    max(size, round(height * size / shorter)),
    max(size, round(width * size / shorter)),
  )


def draw_augmentation(
  seed: int, example_id: int, epoch: int, *, random_crop: bool, flip: bool
) -> Augmentation:
  """Returns the augmentation of an example in an epoch.

  A hash of (seed, id, epoch) and nothing else, so that it does not depend on
  the row, the batch, the process or on what was drawn before.
  """
  text = f'augment/{seed}/{example_id}/{epoch}'.encode()
  digest = hashlib.blake2b(text, digest_size=9).digest()
  top, left = (
    int.from_bytes(digest[i : i + 4], 'big') / 0xFFFFFFFF for i in (0, 4)
  )
  if not random_crop:
    top = left = 0.5
  return Augmentation(top, left, bool(flip and digest[8] % 2))


def crop_place(
  height: int, width: int, size: int, augmentation: Augmentation
) -> tuple[int, int]:
  """(top, left) of the crop in the resized picture, before a flip."""
  top = round(augmentation.top * (height - size))
  return top, round(augmentation.left * (width - size))


def crop_flip(
  pixels: UInt8[np.ndarray, 'H W 3'], size: int, augmentation: Augmentation
) -> UInt8[np.ndarray, 'size size 3']:
  """Returns a size x size crop of the resized picture, flipped if asked."""
  pixels = resize_shorter(pixels, size)
  height, width = pixels.shape[:2]
  top, left = crop_place(height, width, size, augmentation)
  crop = pixels[top : top + size, left : left + size]
  return _mirror(crop) if augmentation.flip else crop


def _mirror(
  pixels: UInt8[np.ndarray, 'H W 3'],
) -> UInt8[np.ndarray, 'H W 3']:
  """Returns the picture with left and right exchanged.

  A channel at a time, since copying a reversed picture goes three bytes at a
  time and takes as long as decoding it.
  """
  mirrored = np.empty_like(pixels)
  for channel in range(3):
    mirrored[..., channel] = pixels[:, ::-1, channel]
  return mirrored


def cover(
  pixels: UInt8[np.ndarray, 'H W 3'], size: tuple[int, int]
) -> UInt8[np.ndarray, 'h w 3']:
  """Returns the middle (height, width) of the picture scaled to cover it."""
  height, width = size
  factor = max(height / pixels.shape[0], width / pixels.shape[1])
  # At least the size asked for, whatever rounding does.
  h = max(height, round(pixels.shape[0] * factor))
  w = max(width, round(pixels.shape[1] * factor))
  if (h, w) != pixels.shape[:2]:
    image = Image.fromarray(pixels)
    pixels = np.asarray(image.resize((w, h), Image.Resampling.LANCZOS))
  top, left = (h - height) // 2, (w - width) // 2
  return pixels[top : top + height, left : left + width]


def size_conditioning(
  original: tuple[int, int],
  resized: tuple[int, int],
  size: int,
  augmentation: Augmentation,
) -> tuple[int, int, int, int]:
  """(height, width, top, left) of SDXL's micro-conditioning.

  The original size, and the crop's place in the resized picture as it is
  seen: of a flipped picture the left edge is counted after the flip.
  Podell et al., 2023, section 2.2.
  """
  top, left = crop_place(*resized, size, augmentation)
  if augmentation.flip:
    left = resized[1] - size - left
  return *original, top, left
