"""Perceptual hashes, and the search for those that are near."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.sparse import csgraph

from dpo_jax.data import images, perceptual


def _picture(kind, height=48, width=64):
  y, x = np.mgrid[:height, :width].astype(float)
  grey = {
    'ramp': 4 * x,
    'rings': 127 + 120 * np.sin((x - 20) ** 2 / 40 + (y - 10) ** 2 / 90),
    'blocks': 255 * ((x // 9 + y // 7) % 2),
    'flat': 0 * x + 90,
  }[kind]
  channels = np.stack([grey, 255 - grey, grey / 2], axis=-1)
  return channels.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
  ('kind', 'wanted'),
  [
    # imagehash.phash of ImageHash 4.3.2 with Pillow 13.
    ('ramp', 0xD500000000000000),
    ('rings', 0xB83839C7F83813C7),
    ('blocks', 0xAB0AAB0AABABFF00),
    ('flat', 0x8000000000000000),
  ],
)
def test_equals_the_hash_of_imagehash(kind, wanted):
  assert perceptual.hash_pixels(_picture(kind)) == wanted


def test_another_encoding_is_near_another_picture_is_not():
  rings = _picture('rings', 96, 96)
  buffer = io.BytesIO()
  Image.fromarray(rings).resize((64, 64)).save(buffer, 'JPEG', quality=70)
  again = images.decode(buffer.getvalue())
  hashes = [
    perceptual.hash_pixels(pixels)
    for pixels in (rings, again, _picture('blocks'), rings[:, ::-1])
  ]
  apart = [(hashes[0] ^ one).bit_count() for one in hashes]
  assert apart[1] <= perceptual.DISTANCE
  assert min(apart[2:]) > 10
  found = perceptual.find_clusters(np.array(hashes, np.uint64))
  assert found.labels.tolist() == [0, 0, 2, 3] and found.complete


def _hashes(rng, count=240):
  """Random hashes, some of them a few bits from others, some equal."""
  hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
  for i in range(count // 3, count):
    bits = rng.choice(64, rng.integers(0, 9), replace=False)
    near = int(hashes[rng.integers(0, i)])
    hashes[i] = near ^ sum(1 << int(bit) for bit in bits)
  return hashes


@pytest.mark.parametrize('distance', range(perceptual.MAX_DISTANCE + 1))
def test_clusters_are_those_of_all_with_all(distance, monkeypatch):
  # Links are merged into clusters again and again.
  monkeypatch.setattr(perceptual, '_MAX_LINKS', 0)
  hashes = _hashes(np.random.default_rng(distance))
  apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
  _, wanted = csgraph.connected_components(apart <= distance)
  _, first, group = np.unique(wanted, return_index=True, return_inverse=True)
  found = perceptual.find_clusters(hashes, distance=distance)
  np.testing.assert_array_equal(found.labels, first[group])
  assert found.complete
  assert len(set(wanted)) < len(hashes)


def test_a_bucket_that_is_too_full_is_told(monkeypatch):
  monkeypatch.setattr(perceptual, 'MAX_NEIGHBOURS', 2)
  hashes = np.arange(40, dtype=np.uint64) << np.uint64(8)
  assert not perceptual.find_clusters(hashes).complete


def test_nothing_and_an_impossible_distance():
  nothing = perceptual.find_clusters(np.zeros(0, np.uint64))
  assert nothing.labels.shape == (0,) and nothing.complete
  with pytest.raises(ValueError, match='distance 7: must be 0 to 6'):
    perceptual.find_clusters(np.zeros(1, np.uint64), distance=7)
