"""Pictures as CLIP's image towers want them: cut, scaled and normalised.

The originals work on Pillow's bytes: the shorter side becomes `size` pixels
(bicubic), the middle square is cut out, and bytes become numbers. transformers
and torchvision, which OpenCLIP uses, differ in one thing: where the middle of
an odd rest is. HPSv2 cuts nothing off.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

# Of the pictures that CLIP was trained on; red, green, blue.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Options of transformers' CLIPImageProcessor that are followed for one value.
FIXED = {
  'do_resize': True,
  'do_center_crop': True,
  'do_rescale': True,
  'do_normalize': True,
  'do_convert_rgb': True,
  'resample': 3,
}


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """From a picture to the numbers of a tower.

  Attributes:
    size: side in pixels.
    mean, std: of the channels, of values in [0, 1].
    rounds: an odd rest r begins the square at round(r / 2), halves to even, as
      torchvision has it; otherwise at r // 2, as transformers.
  """

  size: int
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD
  rounds: bool = False

  def __call__(
    self, pixels: UInt8[np.ndarray, 'H W 3']
  ) -> Float32[np.ndarray, 'size size 3']:
    """The middle square, (x / 255 - mean) / std."""
    size = self.size
    height, width = pixels.shape[:2]
    # Both libraries cut off what is behind the point.
    shorter = min(height, width)
    h, w = int(size * height / shorter), int(size * width / shorter)
    if (h, w) != (height, width):
      image = Image.fromarray(pixels)
      pixels = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
    top, left = self._begin(h - size), self._begin(w - size)
    square = pixels[top : top + size, left : left + size]
    mean, std = np.float32(self.mean), np.float32(self.std)
    return (square * np.float32(1 / 255) - mean) / std

  def _begin(self, rest: int) -> int:
    return round(rest / 2) if self.rounds else rest // 2


@dataclasses.dataclass(frozen=True)
class FitPreprocess:
  """HPSv2's: the whole picture, its longer side `size`, on a black square.

  Numbers are scaled, not bytes: they are not rounded and may leave [0, 1]
  (hpsv2 1.2.0, img_score.py; Wu et al. 2023 do not describe it). The original
  leaves it to torchvision whether pictures are smoothed before they become
  smaller; releases from 0.17 on do, which is what this is.
  """

  size: int
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD

  def __call__(
    self, pixels: UInt8[np.ndarray, 'H W 3']
  ) -> Float32[np.ndarray, 'size size 3']:
    """The square with the picture in its middle, (x / 255 - mean) / std."""
    values = np.float32(pixels) / np.float32(255)
    scale = self.size / max(values.shape[:2])
    h, w = (round(side * scale) for side in values.shape[:2])
    if scale != 1:
      channels = [Image.fromarray(x) for x in np.moveaxis(values, -1, 0)]
      values = np.stack(
        [
          np.asarray(x.resize((w, h), Image.Resampling.BICUBIC))
          for x in channels
        ],
        axis=-1,
      )
    square = np.zeros((self.size, self.size, 3), np.float32)
    top, left = (self.size - h) // 2, (self.size - w) // 2
    square[top : top + h, left : left + w] = values
    return (square - np.float32(self.mean)) / np.float32(self.std)


def from_config(values: Mapping[str, Any], *, size: int) -> Preprocess:
  """Reads transformers' preprocessor_config.json, of a tower of `size`.

  Raises ValueError for an option that is not followed, and another size.
  """
  for name, wanted in FIXED.items():
    if values.get(name, wanted) != wanted:
      raise ValueError(f'{name}={values[name]!r}: only {wanted!r} is followed')
  for name in ('size', 'crop_size'):
    given = values.get(name, size)
    if isinstance(given, Mapping):
      given = set(given.values())
      given = given.pop() if len(given) == 1 else sorted(given)
    if given != size:
      raise ValueError(
        f'{name}={values[name]!r}: the tower takes pictures of {size} pixels'
      )
  return Preprocess(
    size,
    tuple(values.get('image_mean', MEAN)),
    tuple(values.get('image_std', STD)),
  )
