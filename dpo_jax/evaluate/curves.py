"""What metrics.jsonl says: reading it, and the charts a reader needs."""

import json
import math
import os
import re
from typing import Any, NamedTuple

import markupsafe
import numpy as np

from dpo_jax.evaluate import charts

# The share of the run, at its end, over which the timestep bins are averaged.
RECENT = 0.25


class Metrics(NamedTuple):
  """Logged rows ordered by step, one a step, and how many lines were lost."""

  rows: list[dict[str, float]]
  damaged: int


class Chart(NamedTuple):
  title: str
  svg: markupsafe.Markup
  legend: list[str]
  note: str


class _Plan(NamedTuple):
  title: str
  curves: list[tuple[str, list[str]]]  # legend, key or its other spellings
  note: str
  reference: tuple[float, str] | None = None
  smoothing: float = 0.05


PLANS = [
  _Plan(
    'Loss',
    [('loss', ['loss'])],
    'Preference losses start at ln 2 and fall.',
  ),
  _Plan(
    'Pairs ranked right',
    [('accuracy', ['reward/accuracy'])],
    'Share of training pairs whose winner has the higher implicit reward.',
    (0.5, 'chance'),
  ),
  _Plan(
    'Reward margin',
    [('margin', ['reward/margin'])],
    'Implicit reward of the winner minus that of the loser; rises from 0.',
    (0.0, ''),
  ),
  _Plan(
    'Implicit rewards',
    [('winner', ['reward/win']), ('loser', ['reward/lose'])],
    'Healthy runs part; both falling far means the model forgets.',
    (0.0, ''),
  ),
  _Plan(
    'Error on winners',
    [
      ('policy', ['err/policy_win']),
      ('reference', ['err/ref_win']),
    ],
    'Denoising error; should stay near the reference, or below.',
  ),
  _Plan(
    'Error on losers',
    [
      ('policy', ['err/policy_lose']),
      ('reference', ['err/ref_lose']),
    ],
    'Denoising error; rises over the reference, slowly.',
  ),
  _Plan(
    'Score of what the model draws',
    [
      ('median', ['eval/score/median']),
      ('start', ['eval/score/start_median']),
    ],
    "Median of the judge's scores; the largest one is the best step.",
    smoothing=0.0,
  ),
  _Plan(
    'Pictures that beat the start',
    [('share', ['eval/score/win_rate_over_start'])],
    "By the judge's score, same prompt and seed; a tie counts one half.",
    (0.5, 'no preference'),
    smoothing=0.0,
  ),
  _Plan(
    'Denoising error',
    [('policy', ['err/policy']), ('reference', ['err/ref'])],
    'Mean over both images of a pair.',
  ),
  _Plan(
    'Gradient norm',
    [('gradients', ['norm/grads'])],
    'Before clipping.',
  ),
  _Plan(
    'Learning rate',
    [('rate', ['learning_rate', 'optim/learning_rate', 'lr', 'optim/lr'])],
    '',
    smoothing=0.0,
  ),
]
_BIN = re.compile(r'(reward/(?:accuracy|margin))_t(\d+)')


def read_metrics(path: str | os.PathLike) -> Metrics:
  """Reads JSON Lines of {'step': int, key: number, ...}.

  A line that is cut short or no object with a step is counted as damaged,
  not raised: a killed run leaves one. Where a step was logged again after a
  restart, the later value of each key counts. Raises OSError when the file
  cannot be read.
  """
  by_step: dict[int, dict[str, float]] = {}
  damaged = 0
  with open(path, encoding='utf-8', errors='replace') as file:
    for line in file:
      if not line.strip():
        continue
      row = _parse(line)
      if row is None:
        damaged += 1
      else:
        by_step.setdefault(int(row['step']), {}).update(row)
  return Metrics([by_step[step] for step in sorted(by_step)], damaged)


def make_charts(rows: list[dict[str, float]]) -> list[Chart]:
  """The curves for which `rows` hold numbers, in PLANS' order."""
  drawn = []
  preference = any('reward/margin' in row for row in rows)
  for plan in PLANS:
    series = []
    for label, keys in plan.curves:
      key = next((k for k in keys if any(k in row for row in rows)), None)
      one = None if key is None else _series(label, key, rows)
      if one is not None:
        series.append(one)
    if not series:
      continue
    reference = plan.reference
    if plan.title == 'Loss' and preference:
      reference = (math.log(2), 'ln 2')
    drawn.append(
      Chart(
        plan.title,
        charts.line_chart(
          series, reference=reference, smoothing=plan.smoothing
        ),
        [one.label for one in series] if len(plan.curves) > 1 else [],
        plan.note,
      )
    )
  return drawn


def timestep_charts(rows: list[dict[str, float]]) -> list[Chart]:
  """Accuracy and margin by timestep bin, averaged over the run's last part.

  A bin that got no example in a step is logged as NaN or left out; such
  steps do not count.
  """
  recent = rows[-max(1, round(RECENT * len(rows))) :] if rows else []
  found: dict[str, dict[int, list[float]]] = {}
  for row in recent:
    for key, value in row.items():
      match = _BIN.fullmatch(key)
      if match and math.isfinite(value):
        bins = found.setdefault(match[1], {})
        bins.setdefault(int(match[2]), []).append(value)
  drawn = []
  for key, title, limits, reference in (
    ('reward/accuracy', 'Ranked right, by timestep', (0, 1), (0.5, 'chance')),
    ('reward/margin', 'Reward margin, by timestep', None, None),
  ):
    if key not in found:
      continue
    bins = found[key]
    count = max(max(bins) + 1, 10)
    values = [np.mean(bins.get(i, [np.nan])) for i in range(count)]
    chart = charts.bar_chart(
      [f't{i}' for i in range(count)],
      values,
      limits=limits,
      reference=reference,
      x_label='little noise to much noise',
    )
    note = f'Mean of the last {len(recent)} logged steps.'
    drawn.append(Chart(title, chart, [], note))
  return drawn


def _parse(line: str) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or not _is_number(row.get('step')):
    return None
  if not math.isfinite(row['step']):
    return None
  return {key: value for key, value in row.items() if _is_number(value)}


def _series(label, key, rows):
  points = [(row['step'], row[key]) for row in rows if key in row]
  if not any(math.isfinite(y) for _, y in points):
    return None
  return charts.Series(label, *zip(*points, strict=True))


def _is_number(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
