import numpy as np
import pytest

from dpo_jax.evaluate import retrieval


def _gallery(n=40, side=32, seed=0):
  """Smooth random pictures; caption i has the pictures 2i and 2i + 1."""
  rng = np.random.default_rng(seed)
  coarse = rng.uniform(-1, 1, (n, 4, 4, 3)).astype(np.float32)
  images = coarse.repeat(side // 4, 1).repeat(side // 4, 2)
  return images, [f'thing {i // 2}' for i in range(n)]


def test_features_by_hand():
  """Grey has no chroma; Rec. 601 for pure blue and red, doubled."""
  grey, blue = np.full((16, 16, 3), 0.4), np.zeros((16, 16, 3))
  blue[:8, :, 2] = 1.0
  blue[8:, :, 0] = 1.0
  found = retrieval.features(np.stack([grey, blue])).reshape(2, 8, 8, 3)
  np.testing.assert_allclose(
    found[0], np.broadcast_to([0.4, 0, 0], (8, 8, 3)), atol=1e-3
  )
  np.testing.assert_allclose(found[1, 0, 0], [0.114, 1.0, -0.163], atol=1e-3)
  np.testing.assert_allclose(found[1, 7, 3], [0.299, -0.337, 1.0], atol=1e-3)


def test_a_cell_is_an_average():
  image = np.zeros((1, 32, 32, 3))
  image[0, 4:8, 28:32] = np.tile([[1.0], [0.5]], (2, 1))[:, None]
  found = retrieval.features(image).reshape(8, 8, 3)
  assert found[1, 7, 0] == pytest.approx(0.75, abs=1e-6)
  assert np.abs(np.delete(found.reshape(64, 3), 15, 0)).max() == 0


def test_finds_degraded_pictures_and_either_style():
  images, captions = _gallery()
  rng = np.random.default_rng(1)
  worse = images * 0.7 + 0.2 + rng.normal(0, 0.2, images.shape)
  assert retrieval.retrieval_accuracy(worse, captions, images, captions) == 1
  # The neighbour of every picture has the same caption, in the other style.
  swapped = images.reshape(20, 2, 32, 32, 3)[:, ::-1].reshape(images.shape)
  assert retrieval.retrieval_accuracy(swapped, captions, images, captions) == 1


def test_counts_the_misses():
  images, captions = _gallery()
  asked = list(captions)
  asked[0], asked[-1] = asked[-1], asked[0]
  accuracy = retrieval.retrieval_accuracy(images, asked, images, captions)
  assert accuracy == pytest.approx(38 / 40)


def test_the_common_ground_does_not_count():
  """Pictures washed out toward what all share still find their own."""
  images, _ = _gallery(n=12)
  images = 0.6 + 0.3 * images
  images[0] = 0.95 * images.mean(0) + 0.05 * images[0]
  mean = images.mean(0)
  pale = mean + 0.15 * (images - mean)
  np.testing.assert_array_equal(retrieval.nearest(pale, images), np.arange(12))


def test_resolutions_may_differ():
  small, captions = _gallery(side=32)
  large = small.repeat(4, 1).repeat(4, 2)
  assert retrieval.retrieval_accuracy(large, captions, small, captions) == 1


@pytest.mark.parametrize(
  'change, named',
  [
    ({'captions': ['thing 0']}, '40 images for 1 captions'),
    ({'gallery_captions': ['thing 0']}, '40 gallery images for 1'),
    ({'captions': ['unseen'] + ['thing 0'] * 39}, "1 not in the .*'unseen'"),
    ({'generated': np.zeros((40, 32, 32))}, r'\(40, 32, 32\)'),
    ({'generated': np.zeros((40, 30, 32, 3))}, 'divisible by 8'),
    ({'generated': np.full((40, 32, 32, 3), np.nan)}, 'NaN'),
  ],
)
def test_bad_input_is_refused(change, named):
  images, captions = _gallery()
  arguments = {
    'generated': images,
    'captions': captions,
    'gallery_images': images,
    'gallery_captions': captions,
    **change,
  }
  with pytest.raises(ValueError, match=named):
    retrieval.retrieval_accuracy(**arguments)
