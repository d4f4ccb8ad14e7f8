"""Decoding every kind of picture, and what a pair's augmentation shares."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpo_jax.data import images, loader


def to_bytes(image, kind='PNG', **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


GRADIENT = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


def test_rgb_is_exact():
  got = images.decode(to_bytes(Image.fromarray(GRADIENT)))
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, GRADIENT)


def test_transparent_is_laid_on_white():
  rgba = np.zeros((2, 2, 4), np.uint8)
  rgba[0, 0] = [10, 20, 30, 255]
  rgba[0, 1] = [0, 0, 0, 51]
  got = images.decode(to_bytes(Image.fromarray(rgba)))
  assert got[0, 0].tolist() == [10, 20, 30]
  assert got[0, 1].tolist() == [204, 204, 204]
  assert got[1, 1].tolist() == [255, 255, 255]


def test_palette_with_a_transparent_entry():
  image = Image.new('P', (2, 1))
  image.putpalette([9, 9, 9, 70, 80, 90])
  image.putdata([0, 1])
  got = images.decode(to_bytes(image, transparency=0))
  assert got[0].tolist() == [[255, 255, 255], [70, 80, 90]]


def test_grey_of_8_and_16_bits_and_bilevel():
  grey = np.array([[0, 128, 255]], np.uint8)
  got = images.decode(to_bytes(Image.fromarray(grey)))
  assert got[0, :, 0].tolist() == [0, 128, 255]
  deep = np.array([[0, 1000, 65535]], np.uint16)
  got = images.decode(to_bytes(Image.fromarray(deep)))
  assert got[0].tolist() == [[0] * 3, [3] * 3, [255] * 3]
  got = images.decode(to_bytes(Image.fromarray(grey > 100)))
  assert got[0, :, 0].tolist() == [0, 255, 255]


def test_cmyk_jpeg():
  cmyk = Image.new('CMYK', (16, 16), (255, 0, 0, 0))
  got = images.decode(to_bytes(cmyk, 'JPEG', quality=95))
  assert got.shape == (16, 16, 3)
  np.testing.assert_allclose(got[8, 8], [0, 255, 255], atol=4)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(orientation):
  """Each stored picture is what a camera held that way would have kept."""
  upright = np.zeros((4, 6, 3), np.uint8)
  upright[0, :] = 255
  upright[:, 0] = 128
  upright[0, 0] = 60
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.transpose(1, 0, 2),
    6: np.rot90(upright),
    7: upright[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(upright, -1),
  }[orientation]
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = to_bytes(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
  np.testing.assert_array_equal(images.decode(data), upright)


def png_header(width, height):
  """A PNG that announces a size and holds no pixels."""

  def chunk(kind, body):
    crc = zlib.crc32(kind + body)
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', crc)

  head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', b'')


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_bombs_are_refused_unread():
  with pytest.raises(ValueError, match='9000 x 9000 pixels, at most'):
    images.decode(png_header(9000, 9000))
  with pytest.raises(ValueError, match='decompression bomb'):
    images.decode(png_header(60000, 60000))


def test_damaged_bytes():
  whole = to_bytes(Image.fromarray(GRADIENT))
  for data in (b'', b'hello', whole[:-30], whole[:20], png_header(4, 4)):
    with pytest.raises(ValueError, match='cannot decode image') as error:
      images.decode(data)
    assert '\n' not in str(error.value) and '0x' not in str(error.value)


def test_formats_outside_the_list_are_refused():
  data = to_bytes(Image.fromarray(GRADIENT), 'PPM')
  with pytest.raises(ValueError, match='cannot decode image'):
    images.decode(data)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(0, 255))
def test_any_flipped_byte_decodes_or_is_a_value_error(position, value):
  data = bytearray(to_bytes(Image.fromarray(GRADIENT), 'JPEG'))
  data[position % len(data)] = value
  try:
    got = images.decode(bytes(data))
  except ValueError:
    return
  assert got.ndim == 3
  assert got.shape[2] == 3


@pytest.mark.parametrize('shape', [(6, 8), (8, 6), (1, 9), (40, 41), (4, 4)])
def test_resize_shorter(shape):
  got = images.resize_shorter(np.full((*shape, 3), 7, np.uint8), 4)
  assert min(got.shape[:2]) == 4
  ratio = max(shape) / min(shape)
  assert max(got.shape[:2]) == round(4 * ratio)
  assert (got == 7).all()


def cut(pictures, size, augmentation):
  """The pictures of a pair as loaders put them into a batch."""
  out = np.empty((2, size, size, 3), np.uint8)
  pictures = [images.resize_shorter(picture, size) for picture in pictures]
  loader.augment(pictures, [(9, 9)] * 2, size, augmentation, out)
  return out


def test_pair_shares_crop_and_flip():
  """Two equal pictures stay equal under every draw, and draws do differ."""
  picture = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
  crops = set()
  for example in range(40):
    drawn = images.draw_augmentation(1, example, 0, random_crop=True, flip=True)
    both = cut([picture, picture.copy()], 8, drawn)
    np.testing.assert_array_equal(both[0], both[1])
    crops.add(both[0].tobytes())
  # 9 offsets times 2 flips.
  assert 10 <= len(crops) <= 18


def test_crop_of_different_sizes_shows_the_same_part():
  """A picture and its double keep the same region, mirrored or not."""
  small = np.zeros((4, 8, 3), np.uint8)
  small[:, 6:] = 255
  large = small.repeat(2, 0).repeat(2, 1)
  right = images.Augmentation(top=0.0, left=1.0, flip=True)
  both = cut([small, large], 4, right)
  assert both[0, 0, :, 0].tolist() == [255, 255, 0, 0]
  assert (np.abs(both[0].astype(int) - both[1]) < 40).all()


def test_augmentation_hangs_on_seed_id_and_epoch():
  def draw(*place):
    return images.draw_augmentation(*place, random_crop=True, flip=True)

  assert draw(1, 2, 3) == draw(1, 2, 3)
  places = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (12, 3, 3), (1, 23, 3)]
  assert len({draw(*place).left for place in places}) == len(places)


def test_augmentation_switches():
  draws = [
    images.draw_augmentation(0, i, 0, random_crop=False, flip=True)
    for i in range(200)
  ]
  assert {(d.top, d.left) for d in draws} == {(0.5, 0.5)}
  assert 70 < sum(d.flip for d in draws) < 130
  draws = [
    images.draw_augmentation(0, i, 0, random_crop=True, flip=False)
    for i in range(200)
  ]
  assert not any(d.flip for d in draws)
  assert 0.4 < np.mean([d.top for d in draws]) < 0.6
  assert all(0 <= d.left <= 1 for d in draws)
