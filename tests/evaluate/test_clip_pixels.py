"""Preprocessing of CLIP's pictures, against transformers' own."""

import numpy as np
import pytest

from dpo_jax.evaluate import clip_pixels

SHAPES = [(32, 32), (33, 57), (90, 41), (16, 16), (224, 225), (31, 35), (8, 90)]


def noise(shape, seed=0):
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (*shape, 3), np.uint8)
  coarse[: shape[0] // 2] = 255
  return coarse


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('size', [16, 32])
def test_is_what_transformers_makes(shape, size):
  pytest.importorskip('torch')
  module = pytest.importorskip(
    'transformers.models.clip.image_processing_pil_clip'
  )
  theirs = module.CLIPImageProcessorPil(
    size={'shortest_edge': size}, crop_size={'height': size, 'width': size}
  )
  pixels = noise(shape)
  wanted = theirs(pixels, return_tensors='np')['pixel_values'][0]
  found = clip_pixels.Preprocess(size)(pixels)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, wanted.transpose(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize(
  'rest, begin', [(0, 0), (1, 0), (2, 1), (3, 2), (5, 2)]
)
def test_torchvision_rounds_the_middle_of_an_odd_rest(rest, begin):
  # int(round(rest / 2.0)) of torchvision's center_crop: halves to even.
  row = np.arange(16 + rest, dtype=np.uint8)
  pixels = np.repeat(np.tile(row, (16, 1))[..., None], 3, axis=-1)
  plain = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
  found = clip_pixels.Preprocess(16, rounds=True, **plain)(pixels)
  np.testing.assert_allclose(found[0, :, 0] * 255, row[begin : begin + 16])
  found = clip_pixels.Preprocess(16, **plain)(pixels)
  assert round(float(found[0, 0, 0] * 255)) == rest // 2


def test_options_of_the_file():
  values = {
    'size': {'shortest_edge': 32},
    'crop_size': {'height': 32, 'width': 32},
    'resample': 3,
    'image_mean': [0.5, 0.5, 0.5],
    'image_std': [0.25, 0.25, 0.25],
    'feature_extractor_type': 'CLIPFeatureExtractor',
  }
  found = clip_pixels.from_config(values, size=32)
  assert found.mean == (0.5,) * 3 and found.std == (0.25,) * 3
  assert clip_pixels.from_config({'size': 32}, size=32).mean == clip_pixels.MEAN
  for change, words in (
    ({'resample': 2}, 'resample=2: only 3'),
    ({'do_center_crop': False}, 'do_center_crop=False'),
    ({'size': 64}, 'size=64: the tower takes pictures of 32'),
    ({'crop_size': {'height': 32, 'width': 48}}, 'crop_size='),
  ):
    with pytest.raises(ValueError, match=words):
      clip_pixels.from_config(values | change, size=32)
