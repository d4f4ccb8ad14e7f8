"""The step whose pictures a judge likes best: found, kept and written down.

The scores of a run are the lines of its metrics.jsonl, which a run that goes
on cuts at the step it goes on from; so it finds the best step again.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dpo_jax import distributed, folders
from dpo_jax.train import checkpoint as checkpoint_lib
from dpo_jax.train import log as log_lib
from dpo_jax.train import metrics as metrics_lib
from dpo_jax.train import state as state_lib

GROUP = 'eval/score/'
MEDIAN = f'{GROUP}median'


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
  """How the best step of a run is found.

  Attributes:
    score: state -> metrics 'eval/score/...', MEDIAN among them. All processes
      call it and get the same.
    about: who scores what, of JSON types, for best.json.
  """

  score: Callable[[state_lib.TrainState], Mapping[str, float]]
  about: Mapping[str, Any]


def read(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """What best.json of a run says, None where there is none.

  Raises ValueError where it is no JSON object with a step.
  """
  path = folders.to_path(workdir) / checkpoint_lib.BEST
  text = folders.read_text(path)
  if text is None:
    return None
  try:
    record = json.loads(text)
    known = {'step': int(record['step']), 'median': float(record['median'])}
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path}: is damaged; remove it, and the same command finds the best '
      'step again in metrics.jsonl'
    ) from error
  return record | known


class Keeper:
  """Measures steps, and has the checkpoint of the best one kept.

  `best`: what best.json says, or None before there is one.
  """

  def __init__(
    self,
    selection: Selection | None,
    checkpointer: checkpoint_lib.Checkpointer,
    log: log_lib.Log,
    *,
    workdir: str | os.PathLike,
    first: int,
  ):
    """Goes on after step `first`; without `selection` the best stays as it is.

    All processes must call it.
    """
    self._selection, self._log = selection, log
    self._checkpointer = checkpointer
    self.best, self._last = distributed.from_primary(
      _find(workdir, first, checkpointer.steps(), selection)
      if distributed.is_primary()
      else None
    )
    if self.best is not None:
      checkpointer.choose(self.best)

  def catch_up(self, step: int, state: state_lib.TrainState) -> None:
    """Measures a restored step that was stopped before it was measured."""
    if self._last != step:
      self.measure(step, state)

  def measure(self, step: int, state: state_lib.TrainState) -> bool:
    """Logs the scores of a step; whether it is the best and is to be saved.

    Of equal medians the first is the best.
    """
    if self._selection is None:
      return False
    values = dict(self._selection.score(state))
    self._log.write_eval(step, values)
    old = self.best
    is_best = old is None or values[MEDIAN] > old['median']
    if is_best:
      self.best = _describe(step, values, self._selection)
      self._checkpointer.choose(self.best)
    than = '' if old is None else f' (step {old["step"]}: {old["median"]:.6g})'
    distributed.say(
      f'step {step}: median score {values[MEDIAN]:.6g}, '
      f'{"the best so far" if is_best else "not the best"}{than}'
    )
    return is_best


def _describe(step, values, selection) -> dict[str, Any]:
  named = {name.removeprefix(GROUP): value for name, value in values.items()}
  return {'step': step, **named, **selection.about}


def _find(
  workdir: str | os.PathLike,
  first: int,
  saved: Collection[int],
  selection: Selection | None,
) -> tuple[dict[str, Any] | None, int]:
  """(the best of steps to `first` with a checkpoint, last step measured)."""
  text = folders.read_text(folders.to_path(workdir) / 'metrics.jsonl') or ''
  rows = [json.loads(row) for row in metrics_lib.trim(text, first).splitlines()]
  rows = {row['step']: row for row in rows if MEDIAN in row}
  last = max(rows, default=0)
  written = read(workdir)
  if written is not None and written['step'] not in saved:
    distributed.say(
      f'{checkpoint_lib.BEST}: step {written["step"]} has no checkpoint any '
      'more; the best one of those that are there takes its place'
    )
    written = None
  there = [step for step in sorted(rows) if step in saved]
  best = max(there, key=lambda step: rows[step][MEDIAN], default=None)
  if best is None or selection is None:
    return written, last
  if written is not None and written['median'] >= rows[best][MEDIAN]:
    return written, last
  values = {k: v for k, v in rows[best].items() if k.startswith(GROUP)}
  return _describe(best, values, selection), last
