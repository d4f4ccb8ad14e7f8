"""Records of benchmarks/methods.py, their means and intervals, and a picture.

Measures of a record: style_share (pictures in the preferred style, by the
judge) and retrieval (pictures next to their own caption's) over held-out
prompts; implicit_accuracy over held-out pairs; drift, the mean squared
difference of eps_hat to the base's on both pictures of held-out pairs
(dpo_jax/evaluate/drift.py); step_seconds, the median over windows of the log
(in the table the fastest seed's, which other work disturbed the least);
peak_bytes, the compiler's plan of the step.

Intervals, 95%. A share pools its votes over seeds and has Wilson's interval:
three seeds are too few to estimate a spread from (the t interval is 2.5 of
their standard deviations), and what varies between seeds, order and noise of
training and sampling, varies the votes too. Its limit: seeds ask the same
prompts, and a training run moves all of its votes together, so votes are not
independent. Each seed's own share is therefore printed beside it: where they
lie outside the interval it is too narrow. Drift has the t interval over seeds,
having no votes, and none with one seed.
"""

import json
import math
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import scipy.stats

from dpo_jax.evaluate import stats

# A share, and the number of votes in it.
SHARES = {
  'style_share': 'num_prompts',
  'retrieval': 'num_prompts',
  'implicit_accuracy': 'num_pairs',
}
MEANS = ('drift', 'step_seconds')


class Interval(NamedTuple):
  """A mean, its bounds (NaN where there are none), and the seeds' values."""

  value: float
  low: float
  high: float
  each: tuple[float, ...]


class Row(NamedTuple):
  """A method; a measure is None where no run has it."""

  method: str
  seeds: int
  failed: int
  measures: dict[str, Interval | None]
  peak_bytes: int | None


def append(path: pathlib.Path, record: dict[str, Any]) -> None:
  """Adds a line, in one write: others may be adding theirs.

  What a stop has left of a last line is removed first.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  text = path.read_bytes() if path.is_file() else b''
  if text and not text.endswith(b'\n'):
    os.truncate(path, text.rfind(b'\n') + 1)
  line = (json.dumps(record, allow_nan=False) + '\n').encode()
  file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
  try:
    os.write(file, line)
  finally:
    os.close(file)


def read(
  path: pathlib.Path, *, method: str | None = None
) -> list[dict[str, Any]]:
  """Records of the file, none where there is no file; of `method` if given.

  A last line that was cut off is left out; another that is no record raises
  ValueError.
  """
  if not path.is_file():
    return []
  text = path.read_text()
  records = []
  for number, line in enumerate(text.splitlines(keepends=True), 1):
    if not line.endswith('\n'):
      break
    try:
      record = json.loads(line)
      found = record['method'], record['seed'], record['config']
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f'{path}, line {number}: no record of a run ({error}); remove the line'
      ) from error
    if method in (None, found[0]):
      records.append(record)
  return records


def pool(values: Sequence[float], counts: Sequence[int]) -> Interval:
  """Wilson's interval of shares whose votes are put together."""
  won = sum(
    round(value * count) for value, count in zip(values, counts, strict=True)
  )
  votes = [1] * won + [0] * (sum(counts) - won)
  found = stats.share(votes)
  return Interval(found['value'], found['low'], found['high'], tuple(values))


def student(values: Sequence[float]) -> Interval:
  """Mean and its t interval over seeds; no bounds with one."""
  mean, n = statistics.fmean(values), len(values)
  if n < 2:
    return Interval(mean, math.nan, math.nan, tuple(values))
  room = scipy.stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
  return Interval(mean, mean - room, mean + room, tuple(values))


def summarise(
  records: Sequence[dict[str, Any]],
  methods: Sequence[str],
  seeds: Sequence[int],
) -> list[Row]:
  """A row for each method that has a record of these seeds, in their order.

  Raises ValueError where there is none at all.
  """
  rows = []
  for method in methods:
    own = {
      record['seed']: record
      for record in records
      if record['method'] == method and record['seed'] in seeds
    }
    if own:
      rows.append(_row(method, [own[seed] for seed in sorted(own)]))
  if not rows:
    raise ValueError(
      'no finished run of these methods and seeds; run without --table first'
    )
  return rows


def _row(method, own):
  ended = [record for record in own if 'failed' not in record]
  measures: dict[str, Interval | None] = {}
  for name in (*SHARES, *MEANS):
    given = [record for record in ended if name in record]
    values = [record[name] for record in given]
    if not given:
      measures[name] = None
    elif name in SHARES:
      measures[name] = pool(values, [r[SHARES[name]] for r in given])
    else:
      measures[name] = student(values)
  peaks = [r['peak_bytes'] for r in own if 'peak_bytes' in r]
  return Row(
    method=method,
    seeds=len(own),
    failed=len(own) - len(ended),
    measures=measures,
    peak_bytes=peaks[0] if peaks else None,
  )


def _percent(found: Interval | None) -> str:
  if found is None:
    return ''
  value, low, high = (100 * number for number in found[:3])
  return f'{value:.1f} [{low:.1f}, {high:.1f}]'


def _drift(found: Interval | None) -> str:
  if found is None:
    return ''
  text = f'{found.value:.4f}'
  if not math.isnan(found.low):
    text += f' [{max(0.0, found.low):.4f}, {found.high:.4f}]'
  return text


def markdown(rows: Sequence[Row]) -> str:
  """The table."""
  lines = [
    '| | style, % | each seed | retrieval, % | implicit accuracy, % | drift '
    '| step, ms | peak, MiB |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    found = row.measures
    style, step = found['style_share'], found['step_seconds']
    name = row.method
    if row.failed:
      name += f' ({row.failed} of {row.seeds} seeds diverged)'
    cells = [
      name,
      _percent(style),
      ', '.join(f'{100 * value:.1f}' for value in style.each) if style else '',
      _percent(found['retrieval']),
      _percent(found['implicit_accuracy']),
      _drift(found['drift']),
      f'{1e3 * min(step.each):.0f}' if step else '',
      f'{row.peak_bytes / 2**20:.0f}' if row.peak_bytes else '',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def say(record: dict[str, Any]) -> str:
  """A record in a few words."""
  name = f'{record["method"]}, seed {record["seed"]}'
  if 'failed' in record:
    return f'{name}: failed: {record["failed"]}'
  shown = ', '.join(
    f'{key} {record[key]:.4g}' for key in (*SHARES, *MEANS) if key in record
  )
  return f'{name}: {shown} ({record["seconds"]:.0f} s)'


def plot(rows: Sequence[Row], path: str) -> None:
  """Style share over retrieval, and over drift, with error bars, as a PNG."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, panels = pyplot.subplots(1, 2, figsize=(10, 5), dpi=90)
  shown = [row for row in rows if row.measures['style_share'] is not None]
  points: list[list[tuple[str, float, float]]] = [[], []]
  for i, row in enumerate(shown):
    style = _as_percent(row.measures['style_share'])
    places = [_as_percent(row.measures['retrieval']), row.measures['drift']]
    marker = 's' if row.method.endswith('_noisy') else 'o'
    for axes, x, own in zip(panels, places, points, strict=True):
      # The base has no drift.
      if x is None:
        continue
      axes.errorbar(
        x.value,
        style.value,
        xerr=_arms(x),
        yerr=_arms(style),
        fmt=marker,
        markersize=4,
        elinewidth=0.6,
        color=f'C{i % 10}',
      )
      own.append((row.method, x.value, style.value))
  panels[0].set(
    xlabel='retrieval of the own caption, %',
    ylabel='pictures in the preferred style, %',
  )
  panels[1].set(xlabel='drift from the base, mean squared eps_hat')
  panels[1].set_xscale('log')
  panels[1].set_ylim(panels[0].get_ylim())
  for axes, own in zip(panels, points, strict=True):
    axes.grid(alpha=0.3)
    _name(axes, own)
  figure.suptitle('95% intervals; squares: 20% of the labels swapped')
  figure.tight_layout()
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
  pyplot.close(figure)


def _name(axes, points: Sequence[tuple[str, float, float]]) -> None:
  """Writes the names beside the panel, apart from one another."""
  low, high = axes.get_ylim()
  room, below = 0.037 * (high - low), -math.inf
  for name, x, y in sorted(points, key=lambda point: point[2]):
    below = max(y, below + room)
    axes.annotate(
      name,
      (x, y),
      xytext=(1.03, (below - low) / (high - low)),
      textcoords='axes fraction',
      va='center',
      fontsize=7,
      arrowprops={'arrowstyle': '-', 'lw': 0.4, 'color': '0.6'},
    )


def _as_percent(found: Interval) -> Interval:
  value, low, high = (100 * number for number in found[:3])
  return Interval(value, low, high, found.each)


def _arms(found: Interval):
  """What errorbar takes: lengths below and above; none without bounds."""
  if math.isnan(found.low):
    return None
  return [[found.value - found.low], [found.high - found.value]]
