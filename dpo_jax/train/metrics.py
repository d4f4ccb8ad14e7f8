"""Metrics of a run: JSON Lines always, TensorBoard beside it."""

import contextlib
import json
import math
import os
from collections import defaultdict

import tensorboardX

from dpo_jax import distributed, folders


class Window:
  """Mean of each metric over what was added."""

  def __init__(self):
    """Holds nothing yet."""
    self._values = defaultdict(list)

  def add(self, metrics: dict[str, float]) -> None:
    """Adds one value of each; NaN (the metric is absent) is left out."""
    for name, value in metrics.items():
      if not math.isnan(value):
        self._values[name].append(value)

  def take(self) -> dict[str, float]:
    """Means so far, sorted by name; the window is empty afterwards."""
    means = {
      name: sum(values) / len(values)
      for name, values in sorted(self._values.items())
    }
    self._values.clear()
    return means


def trim(text: str, step: int) -> str:
  """A metrics.jsonl without the lines after `step` and a torn last line.

  A run that was interrupted continues from its checkpoint, and its file must
  then hold each logged step once.
  """
  kept = []
  for line in text.splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      continue
    if record.get('step', 0) <= step:
      kept.append(line)
  return ''.join(f'{line}\n' for line in kept)


class Writer:
  """Writes `workdir/metrics.jsonl` and `workdir/tensorboard/`.

  TensorBoard's files cannot grow in a bucket either, so they are copied there
  when the run ends; metrics.jsonl has the same numbers all along.
  """

  def __init__(self, workdir: str | os.PathLike, *, step: int):
    """Continues after `step`; later lines of an interrupted run go.

    Only process 0 writes; the others may call it all the same.
    """
    self._on = distributed.is_primary()
    if not self._on:
      return
    folder = folders.to_path(workdir)
    path, board = folder / 'metrics.jsonl', folder / 'tensorboard'
    text = folders.read_text(path) or ''
    self._lines = folders.Lines(path, trim(text, step))
    if folders.is_bucket(folder):
      distributed.say(f'{board}: copied there when the run ends or stops')
    self._stack = contextlib.ExitStack()
    place = self._stack.enter_context(folders.on_disk(board))
    self._board = tensorboardX.SummaryWriter(str(place), purge_step=step + 1)

  def write(self, step: int, values: dict[str, float]) -> None:
    """One JSON object on a line of its own, written when this returns."""
    if not self._on:
      return
    self._lines.add(json.dumps({'step': step, **values}))
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes both."""
    if self._on:
      self._lines.close()
      self._board.close()
      self._stack.close()
