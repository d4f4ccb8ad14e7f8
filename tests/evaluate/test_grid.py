import unicodedata

import numpy as np
import pytest
from PIL import Image

from dpo_jax.evaluate import captions, grid

HOSTILE = [
  '<script>alert(1)</script>',
  '{{7*7}}',
  'a\u202egnp.exe',
  '\x1b[31mred\x00',
  'lone \ud800 surrogate',
  'two\nlines\u2028three',
  '../../x',
  'caf\u00e9 \u65e5\u672c\u8a9e \U0001f389',
  'x' * 100_000,
  '',
]


def _images(n, height=32, width=32, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(-1, 1, (n, height, width, 3)).astype(np.float32)


def _contains(page, pixels):
  """Does the page hold these pixels somewhere, exactly?"""
  h, w = pixels.shape[:2]
  corners = (page[: -h + 1, : -w + 1] == pixels[0, 0]).all(-1)
  return any(
    (page[y : y + h, x : x + w] == pixels).all()
    for y, x in zip(*np.nonzero(corners), strict=True)
  )


def test_base_left_aligned_right_enlarged_exactly(tmp_path):
  base, aligned = _images(2), _images(2, seed=1)
  [path] = grid.save_pair_grid(tmp_path / 'a.png', base, aligned, ['x', 'y'])
  page = np.asarray(Image.open(path))
  for left, right in zip(
    grid.to_pixels(base), grid.to_pixels(aligned), strict=True
  ):
    tripled = [i.repeat(3, 0).repeat(3, 1) for i in (left, right)]
    gap = np.broadcast_to(page[0, 0], (96, grid.INNER_GAP, 3))
    assert _contains(page, np.concatenate([tripled[0], gap, tripled[1]], 1))


@pytest.mark.parametrize(
  'size, shown',
  [
    ((32, 32), (96, 96)),
    ((64, 64), (128, 128)),
    ((96, 96), (96, 96)),
    ((512, 512), (320, 320)),
    ((1024, 512), (320, 160)),
    ((8, 512), (5, 320)),
  ],
)
def test_display_size(size, shown):
  assert grid.display_size(*size) == shown


@pytest.mark.parametrize('n, pages', [(1, 1), (4, 1), (5, 2), (9, 3)])
def test_pages(tmp_path, n, pages):
  paths = grid.save_pair_grid(
    tmp_path / 'new' / 'grid.png',
    _images(n),
    _images(n),
    ['p'] * n,
    per_page=4,
    title='title',
  )
  assert len(paths) == pages
  assert sorted((tmp_path / 'new').iterdir()) == paths
  assert paths[0].name == ('grid.png' if pages == 1 else 'grid-01.png')


@pytest.mark.parametrize('height, width', [(512, 512), (1, 1), (256, 128)])
def test_any_resolution_keeps_to_the_screen(tmp_path, height, width):
  images = _images(7, height, width)
  [path] = grid.save_pair_grid(tmp_path / 'g.png', images, images, 'abcdefg')
  assert Image.open(path).width <= 1440


def test_outcomes_are_marked(tmp_path):
  images = _images(3)
  [path] = grid.save_pair_grid(
    tmp_path / 'g.png', images, images, ['a', 'b', 'c'], outcomes=[1, 0, 0.5]
  )
  colours = set(map(tuple, np.asarray(Image.open(path)).reshape(-1, 3)))
  wanted = [
    tuple(bytes.fromhex(c[1:])) for c in (grid.WON, grid.LOST, grid.TIED)
  ]
  assert colours.issuperset(wanted)


def test_hostile_captions_draw(tmp_path):
  n = len(HOSTILE)
  [path] = grid.save_pair_grid(
    tmp_path / 'g.png', _images(n), _images(n), HOSTILE
  )
  assert sorted(tmp_path.iterdir()) == [path]


def test_pixels_round_and_clip():
  images = np.array([-2, -1, -0.999, 0, 0.5, 1, 3], np.float32)
  images = np.broadcast_to(images[:, None, None, None], (7, 1, 1, 3))
  assert grid.to_pixels(images)[:, 0, 0, 0].tolist() == [
    *(0, 0, 0, 128, 191, 255, 255)
  ]


@pytest.mark.parametrize(
  'change, named',
  [
    ({'prompts': ['a']}, '2 image pairs for 1 prompts'),
    ({'prompts': [], 'base': _images(0), 'aligned': _images(0)}, '0 image'),
    ({'aligned': _images(3)}, 'one resolution'),
    ({'outcomes': [1.0]}, '1 outcomes for 2 prompts'),
    ({'columns': 0}, 'columns=0'),
    ({'base': np.full((2, 32, 32, 3), np.nan)}, r'NaN in \[0, 1\] of 2'),
  ],
)
def test_bad_input_is_refused(tmp_path, change, named):
  arguments = {
    'base': _images(2),
    'aligned': _images(2),
    'prompts': ['a', 'b'],
    **change,
  }
  with pytest.raises(ValueError, match=named):
    grid.save_pair_grid(tmp_path / 'g.png', **arguments)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text', HOSTILE)
def test_printable_text_is_inert(text):
  shown = captions.printable(text)
  shown.encode('utf-8')
  left = {unicodedata.category(c) for c in shown} - {'Cc'}
  assert not left & {'Cf', 'Cs', 'Co', 'Cn', 'Zl', 'Zp'}
  assert '\x1b' not in shown and '\x00' not in shown
  assert len(captions.shorten(text, 30)) <= 30


def test_printable_keeps_letters_and_names_the_rest():
  assert captions.printable('caf\u00e9 \u65e5') == 'caf\u00e9 \u65e5'
  assert captions.printable('a\u202eb\x1b\ud800') == 'a\\u202eb\\x1b\\ud800'
  assert captions.printable('\u202e') == '\\u202e'


def test_shorten():
  assert captions.shorten('a  b\nc', 10) == 'a b c'
  assert captions.shorten('abcdefghij', 10) == 'abcdefghij'
  assert captions.shorten('abcdefghijk', 10) == 'abcdefghi\u2026'
  assert captions.shorten(' ' * 1000 + 'a', 10) == '\u2026'
  with pytest.raises(ValueError, match='limit: got 1'):
    captions.shorten('abc', 1)
