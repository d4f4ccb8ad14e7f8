"""Copies of a few labelled pictures, each changed a little, once for all."""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from dpo_jax import types


@dataclasses.dataclass(frozen=True)
class Copies:
  """How many there are of a picture, and how far they differ from it.

  Attributes:
    count: of all, the first being the picture as it is.
    rotation: degrees at most, to either side.
    crop: share of the side that is cut off at most; the rest is enlarged.
    colour: brightness, contrast and saturation are multiplied by 1 +- this at
      most.
  """

  count: int = 1
  rotation: float = 0.0
  crop: float = 0.0
  colour: float = 0.0


def change(
  pixels: UInt8[np.ndarray, 'H W 3'],
  copies: Copies,
  *,
  seed: int,
  name: str,
  copy: int,
) -> UInt8[np.ndarray, 'H W 3']:
  """Copy number `copy` of a picture; 0 is itself.

  A function of (pixels, copies, seed, name, copy) alone. What comes into the
  frame by a rotation has the median colour of the picture's border.
  """
  if not copy:
    return pixels
  text = f'copy/{seed}/{name}/{copy}'.encode()
  digest = hashlib.blake2b(text, digest_size=8).digest()
  rng = np.random.default_rng(int.from_bytes(digest, 'big'))
  # All are drawn, so that none hangs on which others are used.
  turn, size, top, left, *light = rng.uniform(size=7)
  height, width = pixels.shape[:2]
  image = Image.fromarray(pixels)
  if copies.rotation:
    image = image.rotate(
      copies.rotation * (2 * turn - 1),
      resample=Image.Resampling.BILINEAR,
      fillcolor=_border(pixels),
    )
  if copies.crop:
    kept = 1 - copies.crop * size
    box = np.array([left * width, top * height] * 2) * (1 - kept)
    box[2:] += kept * np.array([width, height])
    image = image.resize(
      (width, height), Image.Resampling.BICUBIC, box=tuple(box)
    )
  if copies.colour:
    enhance = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for kind, amount in zip(enhance, light, strict=True):
      image = kind(image).enhance(1 + copies.colour * (2 * amount - 1))
  return np.asarray(image)


def _border(pixels: types.PixelImages) -> tuple[int, ...]:
  edges = pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]
  return tuple(map(int, np.median(np.concatenate(edges), axis=0)))
