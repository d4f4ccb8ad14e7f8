"""Picture grids: base beside aligned for the same prompts and seeds."""

import math
import os
import pathlib
from collections.abc import Sequence

import matplotlib.font_manager
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from dpo_jax.evaluate import captions

MARGIN, PAIR_GAP, ROW_GAP, INNER_GAP = 24, 28, 14, 4
HEADER_HEIGHT, TITLE_HEIGHT, LINE_HEIGHT, CAPTION_LINES = 26, 34, 16, 2
PAPER, INK, FAINT = '#f1f3f5', '#1b1f24', '#6b7280'
WON, LOST, TIED = '#1a7f4b', '#c2413b', '#9aa1ab'


def to_pixels(images: Float[np.ndarray, 'n H W 3']) -> np.ndarray:
  """uint8 pixels of images in [-1, 1]; values beyond the range are clipped.

  Raises ValueError for another shape, and for NaN naming the image.
  """
  images = np.asarray(images, np.float32)
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f'images: got shape {images.shape}; give [n, H, W, 3]')
  broken = np.flatnonzero(np.isnan(images).any(axis=(1, 2, 3)))
  if broken.size:
    raise ValueError(f'images: NaN in {broken[:5].tolist()} of {len(images)}')
  return np.round((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def save_pair_grid(
  path: str | os.PathLike,
  base: Float[np.ndarray, 'n H W 3'],
  aligned: Float[np.ndarray, 'n H W 3'],
  prompts: Sequence[str],
  *,
  labels: tuple[str, str] = ('base', 'aligned'),
  outcomes: Sequence[float] | None = None,
  title: str = '',
  columns: int = 6,
  per_page: int = 48,
) -> list[pathlib.Path]:
  """Writes PNG pages of pairs (base left, aligned right); returns their paths.

  base, aligned: images [n H W 3] in [-1, 1], entry i of one prompt and seed.
  outcomes: 1 aligned won, 0 lost, 0.5 tied (`stats.wins`): a coloured mark.
  columns: pairs in a row at most; fewer where large images need the room.
  One page takes `path` itself, more pages `NAME-01.png` and so on. Pages
  appear whole or not at all. Raises ValueError when lengths disagree.
  """
  check_pairs(base, aligned, prompts, outcomes)
  return _save_pages(
    path,
    (to_pixels(base), to_pixels(aligned)),
    prompts,
    outcomes,
    per_page=per_page,
    labels=labels,
    title=title,
    columns=columns,
  )


def save_contact_sheet(
  path: str | os.PathLike,
  images: UInt8[np.ndarray, 'n H W 3'],
  prompts: Sequence[str],
  *,
  title: str = '',
  columns: int = 8,
  per_page: int = 64,
) -> list[pathlib.Path]:
  """Writes PNG pages of single images; names and errors as above."""
  check_pairs(images, images, prompts)
  return _save_pages(
    path,
    (images,),
    prompts,
    None,
    per_page=per_page,
    labels=(),
    title=title,
    columns=columns,
  )


def save_columns(
  path: str | os.PathLike,
  panels: Sequence[UInt8[np.ndarray, 'n H W 3']],
  prompts: Sequence[str],
  *,
  labels: Sequence[str],
  title: str = '',
  columns: int = 4,
  per_page: int = 48,
) -> list[pathlib.Path]:
  """Writes PNG pages of any number of models side by side, as save_pair_grid.

  panels: pictures of each model, entry i of one prompt and seed. Raises
  ValueError when lengths disagree.
  """
  for panel in panels[1:]:
    check_pairs(panels[0], panel, prompts)
  if len(labels) != len(panels):
    raise ValueError(f'{len(labels)} labels for {len(panels)} models')
  return _save_pages(
    path,
    tuple(panels),
    prompts,
    None,
    per_page=per_page,
    labels=tuple(labels),
    title=title,
    columns=columns,
  )


def _save_pages(path, panels, prompts, outcomes, *, per_page, title, **options):
  if options['columns'] < 1 or per_page < 1:
    raise ValueError(
      f'columns={options["columns"]}, per_page={per_page}: give 1 or more'
    )
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  pages = math.ceil(len(prompts) / per_page)
  written = []
  for page in range(pages):
    part = slice(page * per_page, (page + 1) * per_page)
    sheet = _draw_page(
      [images[part] for images in panels],
      prompts[part],
      None if outcomes is None else outcomes[part],
      title=title + (f'  ({page + 1} of {pages})' if pages > 1 else ''),
      **options,
    )
    name = f'{path.stem}-{page + 1:02d}.png' if pages > 1 else path.name
    _save_whole(sheet, path.with_name(name))
    written.append(path.with_name(name))
  return written


def check_pairs(base, aligned, prompts, outcomes=None) -> None:
  """Raises ValueError unless images, prompts and outcomes agree in number."""
  if np.shape(base) != np.shape(aligned):
    raise ValueError(
      f'base has shape {np.shape(base)}, aligned {np.shape(aligned)}; '
      'compare the same prompts at one resolution'
    )
  if not len(prompts) or len(prompts) != len(base):
    raise ValueError(f'{len(base)} image pairs for {len(prompts)} prompts')
  if outcomes is not None and len(outcomes) != len(prompts):
    raise ValueError(f'{len(outcomes)} outcomes for {len(prompts)} prompts')
  if outcomes is not None and not np.isin(outcomes, (0.0, 0.5, 1.0)).all():
    raise ValueError('outcomes: give 1 (aligned won), 0 (lost) or 0.5 (tie)')


def display_size(height: int, width: int) -> tuple[int, int]:
  """(height, width) to show an image at: tiny ones times a whole number.

  The short side reaches at least 96 pixels, so 32 becomes 96 without any
  blur; the long side is at most 320.
  """
  if min(height, width) < 96:
    factor = math.ceil(96 / min(height, width))
    if factor * max(height, width) <= 320:
      return factor * height, factor * width
  scale = min(1.0, 320 / max(height, width))
  return max(1, round(scale * height)), max(1, round(scale * width))


def _draw_page(panels, prompts, outcomes, *, labels, title, columns):
  height, width = display_size(*panels[0].shape[1:3])
  block = len(panels) * (width + INNER_GAP) - INNER_GAP
  # About a screen's width, whatever the resolution.
  columns = min(columns, len(prompts), max(1, 1360 // (block + PAIR_GAP)))
  rows = math.ceil(len(prompts) / columns)
  top = MARGIN + (TITLE_HEIGHT if title else 0)
  header = HEADER_HEIGHT if labels else 0
  row_height = height + 6 + CAPTION_LINES * LINE_HEIGHT + ROW_GAP
  sheet = Image.new(
    'RGB',
    (
      2 * MARGIN + columns * block + (columns - 1) * PAIR_GAP,
      top + header + rows * row_height + MARGIN - ROW_GAP,
    ),
    PAPER,
  )
  draw = ImageDraw.Draw(sheet)
  small, bold, large = _font(12), _font(13, 'bold'), _font(18, 'bold')
  if title:
    limit = sheet.width - 2 * MARGIN
    for line in _wrap(title, large, limit, lines=1):
      draw.text((MARGIN, MARGIN - 6), line, INK, large)
  for column in range(columns):
    for side, label in enumerate(labels):
      x = MARGIN + column * (block + PAIR_GAP) + side * (width + INNER_GAP)
      for line in _wrap(label, bold, width, lines=1):
        draw.text((x, top), line, INK if side else FAINT, bold)
  for i, prompt in enumerate(prompts):
    row, column = divmod(i, columns)
    x = MARGIN + column * (block + PAIR_GAP)
    y = top + header + row * row_height
    for side, image in enumerate(panel[i] for panel in panels):
      place = (x + side * (width + INNER_GAP), y)
      sheet.paste(_resize(image, height, width), place)
    indent = 0
    if outcomes is not None:
      indent = 15
      _mark(draw, x, y + height + 9, outcomes[i])
    lines = _wrap(prompt, small, block - indent, lines=CAPTION_LINES)
    for j, line in enumerate(lines):
      spot = (x + indent, y + height + 6 + j * LINE_HEIGHT)
      draw.text(spot, line, INK, small)
  return sheet


def _mark(draw, x, y, outcome):
  """A triangle up, a triangle down, or a bar: not by colour alone."""
  if outcome > 0.5:
    draw.polygon([(x, y + 8), (x + 9, y + 8), (x + 4.5, y)], WON)
  elif outcome < 0.5:
    draw.polygon([(x, y), (x + 9, y), (x + 4.5, y + 8)], LOST)
  else:
    draw.rectangle([x, y + 3, x + 9, y + 5], TIED)


def _resize(pixels: UInt8[np.ndarray, 'H W 3'], height, width):
  enlarged = height >= pixels.shape[0]
  method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
  return Image.fromarray(pixels).resize((width, height), method)


def _font(size, weight='normal'):
  # matplotlib ships DejaVu Sans: the same page on every machine.
  properties = matplotlib.font_manager.FontProperties(
    family='DejaVu Sans', weight=weight
  )
  return ImageFont.truetype(matplotlib.font_manager.findfont(properties), size)


def _wrap(text, font, width, *, lines):
  """At most `lines` lines of at most `width` pixels, cut with an ellipsis."""
  rest = captions.shorten(text, 400)
  result = []
  while rest and len(result) < lines:
    taken = _fitting(rest, font, width)
    if taken < len(rest):
      if len(result) == lines - 1:
        taken = _fitting(rest, font, width - font.getlength('\u2026'))
        result.append(rest[:taken].rstrip() + '\u2026')
        break
      space = rest.rfind(' ', 0, taken + 1)
      taken = space if space > 0 else taken
    result.append(rest[:taken])
    rest = rest[taken:].lstrip()
  return result


def _fitting(text, font, width):
  count = 0
  while count < len(text) and font.getlength(text[: count + 1]) <= width:
    count += 1
  return max(count, 1)


def _save_whole(sheet, path):
  partial = path.with_name(path.name + '.partial')
  sheet.save(partial, format='PNG', optimize=True)
  os.replace(partial, path)
