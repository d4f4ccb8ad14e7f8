"""Advice from a run's log: a collapse, or nothing learnt."""

import collections
import math
from collections.abc import Mapping

# Log windows that are looked at together.
WINDOWS = 12
# Share of the reference's error that both deltas must be above.
SHARE = 0.1
# The rise over the windows, in scatters around it: a Student's t of 8.7 with
# 10 degrees of freedom, which white noise reaches 3 times in a million, as
# winner and loser share their draws and are no two witnesses.
SPREADS = 8.0
# Both errors that have doubled, in so many windows in a row, are a collapse
# however unevenly they rise: one that goes fast is no straight line.
DOUBLED, DOUBLED_WINDOWS = 1.0, 3
# Flat: |margin| below this (ln 2 - loss is then under 0.005) in each of the
# windows. Accuracy does not tell: margins of a millionth may all be positive.
MARGIN = 0.01
# Flat only after so many times the warmup's steps.
WARMUPS = 2

_COLLAPSE = (
  'step {step}: the errors of winner and loser both rise away from the '
  'reference ({win:+.0%} and {lose:+.0%}): the model gets worse while the '
  'margin grows; raise objective.numbers.beta, lower optim.lr, or turn on '
  'objective.safeguard or objective.sft_weight'
)
_FLAT = (
  'step {step}: nothing is learnt (accuracy {accuracy:.3f}, margin '
  '{margin:+.4f} long after the warmup); raise optim.lr, or '
  'objective.numbers.beta'
)


class Collapse:
  """Looks at the means of each log window and says each advice once.

  A collapse: err/delta_win and err/delta_lose are both above SHARE of the
  reference's error in each of the last WINDOWS windows, and a straight line
  through each of them rises by more than SPREADS times their scatter around
  it; or both are above DOUBLED in each of the last DOUBLED_WINDOWS. A healthy
  run has a falling or level delta_win; a loser that gets worse alone is what
  the loss asks for. Flat: reward/margin stays at 0 for as many windows, after
  WARMUPS warmups.
  """

  def __init__(self, *, warmup_steps: int):
    """warmup_steps: of the learning rate."""
    self._warm = WARMUPS * warmup_steps
    self._collapse = collections.deque(maxlen=WINDOWS)
    self._flat = collections.deque(maxlen=WINDOWS)
    self._said = set()

  def look(self, step: int, values: Mapping[str, float]) -> str | None:
    """One line of advice, the first time there is reason for it; else None.

    values: metrics of the window that ends with `step`. A window that lacks
    a number, or in which it is not finite, is passed over.
    """
    return self._look_for_collapse(step, values) or self._look_for_flat(
      step, values
    )

  def _look_for_collapse(self, step, values):
    found = _shares(values)
    if found is None or 'collapse' in self._said:
      return None
    self._collapse.append(found)
    wins, loses = zip(*self._collapse, strict=True)
    if not (_are_doubled(wins, loses) or _rise_together(wins, loses)):
      return None
    self._said.add('collapse')
    return _COLLAPSE.format(step=step, win=wins[-1], lose=loses[-1])

  def _look_for_flat(self, step, values):
    names = ('reward/accuracy', 'reward/margin')
    found = _take(values, names)
    if found is None or step <= self._warm or 'flat' in self._said:
      return None
    accuracy, margin = found
    self._flat.append(abs(margin) < MARGIN)
    if len(self._flat) < WINDOWS or not all(self._flat):
      return None
    self._said.add('flat')
    return _FLAT.format(step=step, accuracy=accuracy, margin=margin)


def _take(values, names):
  """The named values, or None where one is absent or not finite."""
  found = [values.get(name, math.nan) for name in names]
  return found if all(map(math.isfinite, found)) else None


def _shares(values):
  """Both deltas as shares of the reference's errors."""
  sides = ('win', 'lose')
  names = [f'err/{what}_{side}' for what in ('delta', 'ref') for side in sides]
  found = _take(values, names)
  if found is None or min(found[2:]) <= 0:
    return None
  win, lose, ref_win, ref_lose = found
  return win / ref_win, lose / ref_lose


def _are_doubled(*rows):
  return len(rows[0]) >= DOUBLED_WINDOWS and all(
    min(row[-DOUBLED_WINDOWS:]) > DOUBLED for row in rows
  )


def _rise_together(*rows):
  return len(rows[0]) == WINDOWS and all(
    min(row) > SHARE and _rises(row) for row in rows
  )


def _rises(row):
  """Whether a least-squares line rises clear of the scatter around it."""
  middle = (len(row) - 1) / 2
  mean = sum(row) / len(row)
  places = [i - middle for i in range(len(row))]
  slope = sum(i * y for i, y in zip(places, row, strict=True))
  slope /= sum(i * i for i in places)
  rest = [y - mean - slope * i for i, y in zip(places, row, strict=True)]
  scatter = math.sqrt(sum(r * r for r in rest) / (len(row) - 2))
  return slope * (len(row) - 1) > SPREADS * scatter and slope > 0
