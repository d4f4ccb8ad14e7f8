"""Line and bar charts as inline SVG that follows the page's colours.

Colours come from the page (classes `series-0`, `series-1`, `grid`, ...), so
one drawing serves light and dark. No scripts: values show as tooltips.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import markupsafe
import numpy as np

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 30
MAX_POINTS = 400


class Series(NamedTuple):
  """One curve: x and y of the same length; y may hold NaN."""

  label: str
  x: Sequence[float]
  y: Sequence[float]


def line_chart(
  series: Sequence[Series],
  *,
  reference: tuple[float, str] | None = None,
  x_label: str = 'step',
  smoothing: float = 0.05,
) -> markupsafe.Markup:
  """Curves, each a faint raw line under its moving average.

  smoothing: radius of the average as a share of the curve; 0 shows it as is.
  reference: a dashed horizontal line (value, label). Values that are not
  finite leave no mark. Raises ValueError when nothing finite is left.
  """
  cleaned = []
  for one in series:
    x, y = np.asarray(one.x, float), np.asarray(one.y, float)
    keep = np.isfinite(x) & np.isfinite(y)
    if keep.any():
      cleaned.append(Series(one.label, x[keep], y[keep]))
  if not cleaned:
    raise ValueError('line_chart: no finite value to draw')
  values = [one.y for one in cleaned]
  if reference:
    values = [*values, [reference[0]]]
  y_scale = _Scale.around(np.concatenate(values), HEIGHT - BOTTOM, TOP)
  x_scale = _Scale.around(
    np.concatenate([one.x for one in cleaned]), LEFT, WIDTH - RIGHT, pad=0.0
  )
  parts = _frame(x_scale, y_scale, x_label)
  if reference:
    parts.append(_reference(y_scale, *reference))
  for i, one in enumerate(cleaned):
    x, y = _thin(one.x, one.y)
    smooth = _moving_average(y, round(smoothing * len(y)))
    if len(y) == 1:
      parts.append(
        f'<circle class="dot series-{i}" r="3" cx="{x_scale(x[0]):.1f}" '
        f'cy="{y_scale(y[0]):.1f}"/>'
      )
      continue
    raw, mean = (_points(x_scale(x), y_scale(v)) for v in (y, smooth))
    parts.append(f'<polyline class="raw series-{i}" points="{raw}"/>')
    last = f'{one.label}: {smooth[-1]:.4g} at {x_label} {x[-1]:g}'
    parts.append(
      f'<polyline class="mean series-{i}" points="{mean}">'
      f'<title>{markupsafe.escape(last)}</title></polyline>'
    )
  return _svg(parts)


def bar_chart(
  labels: Sequence[str],
  values: Sequence[float],
  *,
  limits: tuple[float, float] | None = None,
  reference: tuple[float, str] | None = None,
  x_label: str = '',
) -> markupsafe.Markup:
  """One bar a label; a value that is not finite leaves a gap.

  limits: fixed (low, high) of the value axis. Raises ValueError when labels
  and values differ in number or nothing finite is left.
  """
  values = np.asarray(values, float)
  finite = values[np.isfinite(values)]
  if len(labels) != len(values) or not finite.size:
    raise ValueError(f'{len(labels)} labels for {finite.size} finite values')
  spread = [*finite, 0.0] if limits is None else limits
  pad = 0.08 if limits is None else 0.0
  y_scale = _Scale.around(np.asarray(spread), HEIGHT - BOTTOM, TOP, pad=pad)
  parts = _frame(None, y_scale, x_label)
  slot = (WIDTH - LEFT - RIGHT) / len(labels)
  zero = y_scale(np.clip(0.0, y_scale.low, y_scale.high))
  for i, (label, value) in enumerate(zip(labels, values, strict=True)):
    middle = LEFT + (i + 0.5) * slot
    name = markupsafe.escape(label)
    parts.append(
      f'<text class="tick" text-anchor="middle" x="{middle:.1f}" '
      f'y="{HEIGHT - BOTTOM + 13}">{name}</text>'
    )
    if not math.isfinite(value):
      continue
    end = y_scale(np.clip(value, y_scale.low, y_scale.high))
    parts.append(
      f'<rect class="bar" x="{middle - 0.36 * slot:.1f}" '
      f'y="{min(zero, end):.1f}" width="{0.72 * slot:.1f}" rx="2" '
      f'height="{max(abs(zero - end), 0.5):.1f}">'
      f'<title>{name}: {value:.4g}</title></rect>'
    )
  if reference:
    parts.append(_reference(y_scale, *reference))
  return _svg(parts)


class _Scale:
  """A linear map of values onto the drawing, with round ticks."""

  def __init__(self, low, high, start, end):
    self.low, self.high, self.start, self.end = low, high, start, end

  @classmethod
  def around(cls, values, start, end, pad=0.08):
    low, high = float(np.min(values)), float(np.max(values))
    if high - low <= 1e-9 * max(abs(low), abs(high)):
      # A flat line sits in the middle of a range of its own size.
      room = abs(low) or 1.0
      low, high = low - 0.5 * room, high + 0.5 * room
    room = pad * (high - low)
    return cls(low - room, high + room, start, end)

  def __call__(self, value):
    share = (value - self.low) / (self.high - self.low)
    return self.start + share * (self.end - self.start)

  def ticks(self):
    raw = (self.high - self.low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(self.low / step - 1e-9)
    last = math.floor(self.high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _frame(x_scale, y_scale, x_label):
  parts = []
  for tick in y_scale.ticks():
    y = y_scale(tick)
    parts.append(
      f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
      f'y2="{y:.1f}"/><text class="tick" text-anchor="end" x="{LEFT - 7}" '
      f'y="{y + 3.5:.1f}">{_number(tick)}</text>'
    )
  for tick in x_scale.ticks() if x_scale else []:
    parts.append(
      f'<text class="tick" text-anchor="middle" x="{x_scale(tick):.1f}" '
      f'y="{HEIGHT - BOTTOM + 14}">{_number(tick)}</text>'
    )
  parts.append(
    f'<text class="axis" text-anchor="end" x="{WIDTH - RIGHT}" '
    f'y="{HEIGHT - 2}">{markupsafe.escape(x_label)}</text>'
  )
  return parts


def _reference(y_scale, value, label):
  y = y_scale(value)
  above = y - 5 if y > TOP + 16 else y + 13
  return (
    f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
    f'y1="{y:.1f}" y2="{y:.1f}"/><text class="reference-label" '
    f'text-anchor="end" x="{WIDTH - RIGHT - 2}" y="{above:.1f}">'
    f'{markupsafe.escape(label)}</text>'
  )


def _svg(parts):
  return markupsafe.Markup(
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
  )


def _points(x, y):
  return ' '.join(f'{a:.1f},{b:.1f}' for a, b in zip(x, y, strict=True))


def _thin(x, y):
  """At most MAX_POINTS points, each the mean of its neighbourhood."""
  if len(x) <= MAX_POINTS:
    return x, y
  edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)[:-1]
  counts = np.diff(np.append(edges, len(x)))
  return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def _moving_average(y, radius):
  # Near the start a window shrinks on both sides, so that the curve begins
  # where it was logged: a loss at ln 2, not below. At the end it keeps its
  # left half, as a single noisy value would look like a turn.
  place = np.arange(len(y))
  back = np.minimum(radius, place)
  ahead = np.minimum(back, place[::-1])
  sums = np.concatenate([[0.0], np.cumsum(y)])
  return (sums[place + ahead + 1] - sums[place - back]) / (back + ahead + 1)


def _number(value):
  return f'{value:.4g}'.replace('e-0', 'e-').replace('e+0', 'e')
