"""Does a picture show its caption? Retrieval in a fixed feature space.

A generated picture counts as right when the nearest picture of a gallery of
real ones carries its caption. Nothing here is learned, so the judge cannot
have seen the generator's training. It knows pictures, not concepts: a new
drawing of the same thing may well lie nearer to another caption.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

CELLS = 8
# Rec. 601 luma, and its colour differences at twice their usual scale: among
# the spaces tried on degraded emoji (RGB, CIELAB, luma and chroma, gradient
# histograms; 4 to 32 cells; standardised or not) this one, at 8 x 8 cells
# without standardising, was the most robust of those with one kind of
# feature. Dividing by the deviation of a feature favours empty corners.
TO_FEATURES = np.array(
  [
    [0.299, -0.337, 1.000],
    [0.587, -0.662, -0.837],
    [0.114, 1.000, -0.163],
  ],
  np.float32,
)


def features(
  images: Float[np.ndarray, 'n H W 3'],
) -> Float[np.ndarray, 'n d']:
  """Luma and doubled chroma of images in [-1, 1], averaged over 8 x 8 cells.

  Returns [n, 192] float32: 64 cells of (Y, 2 Cb, 2 Cr). Raises ValueError
  for another shape, sides that 8 does not divide, and NaN.
  """
  images = np.asarray(images, np.float32)
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f'images: got shape {images.shape}; give [n, H, W, 3]')
  n, height, width, _ = images.shape
  if not n or height % CELLS or width % CELLS or not height or not width:
    raise ValueError(
      f'images: got shape {images.shape}; at least one image, and sides '
      f'divisible by {CELLS}'
    )
  if np.isnan(images).any():
    raise ValueError('images: NaN; look at the sampler first')
  cells = images.reshape(
    n, CELLS, height // CELLS, CELLS, width // CELLS, 3
  ).mean((2, 4))
  return (cells @ TO_FEATURES).reshape(n, -1)


def nearest(
  images: Float[np.ndarray, 'n H W 3'],
  gallery_images: Float[np.ndarray, 'm H W 3'],
) -> Int[np.ndarray, ' n']:
  """Index of the gallery picture with the largest cosine to each image.

  Cosine of `features` minus their mean over the gallery, so that what all
  pictures share (a white ground) does not count as likeness. The images and
  the gallery may differ in resolution. The first of equals is taken.
  """
  gallery = features(gallery_images)
  mean = gallery.mean(0)
  return np.argmax(_unit(features(images) - mean) @ _unit(gallery - mean).T, 1)


def retrieval_accuracy(
  generated: Float[np.ndarray, 'n H W 3'],
  captions: Sequence[str],
  gallery_images: Float[np.ndarray, 'm H W 3'],
  gallery_captions: Sequence[str],
) -> float:
  """Share of generated pictures whose `nearest` real one has their caption.

  Several gallery pictures may share a caption (two styles): any of them is
  right. Chance is about one over the number of gallery captions. Raises
  ValueError when lengths disagree or a caption is not in the gallery.
  """
  if len(generated) != len(captions):
    raise ValueError(f'{len(generated)} images for {len(captions)} captions')
  if len(gallery_images) != len(gallery_captions):
    raise ValueError(
      f'{len(gallery_images)} gallery images for {len(gallery_captions)} '
      'captions'
    )
  absent = sorted(set(captions) - set(gallery_captions))
  if absent:
    raise ValueError(
      f'captions: {len(absent)} not in the gallery, {absent[0][:80]!r} first; '
      'they could never be found'
    )
  found = nearest(generated, gallery_images)
  hits = [
    gallery_captions[i] == caption
    for i, caption in zip(found.tolist(), captions, strict=True)
  ]
  return float(np.mean(hits))


def _unit(vectors):
  norms = np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors / np.maximum(norms, np.finfo(np.float32).tiny)
