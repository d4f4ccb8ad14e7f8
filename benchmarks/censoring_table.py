"""The table of benchmarks/censoring.py: shares, distances, costs, a picture.

The malign rate is the labeller's and the share of sevens ccexam's, both with
Wilson's 95% interval over the pictures of all label draws together, each draw's
malign rate beside it (pictures of one draw share its networks, so the pooled
interval is too narrow where draws differ). The distance is Frechet's in
ccexam's last hidden layer, of all pictures to the real sevens that are not
crossed, its interval the 2.5% and 97.5% of resampled pictures moved onto the
value (a distance of resampled rows is biased upwards).
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import censoring_parts as parts
from benchmarks import methods_table

RESAMPLES = 100


class Row(NamedTuple):
  """An arm: shares and the distance as (value, low, high), cost over plain."""

  arm: str
  draws: int
  n: int
  malign: methods_table.Interval
  sevens: methods_table.Interval
  distance: methods_table.Interval
  seconds: float
  calls: float


def distance(
  features: np.ndarray, real: np.ndarray, *, seed: int = 0
) -> methods_table.Interval:
  """Frechet's distance of features [n d] to real [m d], with its interval."""
  rng, n = np.random.default_rng(seed), len(features)
  value = parts.frechet(features, real)
  others = [
    parts.frechet(features[rng.integers(0, n, n)], real)
    for _ in range(RESAMPLES)
  ]
  low, high = np.quantile(others, [0.025, 0.975]) - np.mean(others) + value
  return methods_table.Interval(value, float(low), float(high), ())


def floor(real: np.ndarray, *, seed: int = 0, times: int = 20) -> float:
  """Mean distance of one random half of the real pictures to the other."""
  rng, half = np.random.default_rng(seed), len(real) // 2
  found = []
  for _ in range(times):
    order = rng.permutation(len(real))
    found.append(
      parts.frechet(real[order[:half]], real[order[half : 2 * half]])
    )
  return float(np.mean(found))


def summarise(
  records: Sequence[dict[str, Any]],
  features: dict[str, np.ndarray],
  real: np.ndarray,
  arms: Sequence[str],
) -> list[Row]:
  """A row for each arm with records, in their order.

  features: of all pictures of an arm, [n d]. Seconds and calls are relative to
  those of 'none' a picture (NaN without it). Raises ValueError where there is
  no record.
  """
  rows = []
  plain = _per_picture([r for r in records if r['method'] == 'none'])
  for arm in arms:
    own = [record for record in records if record['method'] == arm]
    if not own:
      continue
    counts = [record['n'] for record in own]
    rows.append(
      Row(
        arm=arm,
        draws=len(own),
        n=sum(counts),
        malign=methods_table.pool([r['malign'] for r in own], counts),
        sevens=methods_table.pool([r['sevens'] for r in own], counts),
        distance=distance(features[arm], real),
        seconds=_per_picture(own) / plain,
        calls=own[0]['calls'],
      )
    )
  if not rows:
    raise ValueError('no finished arm of these; run without --table first')
  return rows


def _per_picture(records):
  total = sum(record['n'] for record in records)
  if not total:
    return float('nan')
  return sum(record['sampling_seconds'] for record in records) / total


def _percent(found: methods_table.Interval) -> str:
  value, low, high = (100 * number for number in found[:3])
  return f'{value:.1f} [{low:.1f}, {high:.1f}]'


def markdown(rows: Sequence[Row]) -> str:
  """The table."""
  lines = [
    '| arm | draws | pictures | malign, % | each draw | still a seven, % '
    '| distance | UNet calls | time |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    value, low, high = row.distance[:3]
    cells = [
      row.arm,
      f'{row.draws}',
      f'{row.n}',
      _percent(row.malign),
      ', '.join(f'{100 * each:.1f}' for each in row.malign.each),
      _percent(row.sevens),
      f'{value:.1f} [{low:.1f}, {high:.1f}]',
      f'{row.calls:.2f}x',
      f'{row.seconds:.2f}x',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def grid(
  panels: dict[str, tuple[parts.Pictures, np.ndarray]],
  path: pathlib.Path,
  *,
  columns: int = 14,
  lines: int = 6,
) -> None:
  """Pictures of several arms side by side, malign ones framed in red.

  panels: title -> (pictures, malign [n] booleans); equal places have equal
  noise. Writes a PNG.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  edge = parts.SIDE + 2
  figure, axes = pyplot.subplots(
    1, len(panels), figsize=(5 * len(panels), 2.6), dpi=90, squeeze=False
  )
  for axis, (title, (pictures, malign)) in zip(
    axes[0], panels.items(), strict=True
  ):
    sheet = np.zeros((lines * edge, columns * edge, 3), np.uint8)
    for i in range(min(len(pictures), lines * columns)):
      y, x = (edge * place for place in divmod(i, columns))
      tile = sheet[y : y + edge, x : x + edge]
      tile[:] = (220, 40, 40) if malign[i] else (40, 40, 40)
      tile[1:-1, 1:-1] = pictures[i][..., None]
    axis.imshow(sheet, interpolation='nearest')
    axis.set_title(title, fontsize=9)
    axis.axis('off')
  figure.tight_layout()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
  pyplot.close(figure)
