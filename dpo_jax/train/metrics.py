"""Metrics of a run: JSON Lines always, TensorBoard beside it."""

import json
import math
import pathlib
from collections import defaultdict

import jax
import tensorboardX


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


def trim(path: pathlib.Path, step: int) -> None:
  """Drops lines after `step` and a torn last line from a metrics.jsonl.

  A run that was interrupted continues from its checkpoint, and its file must
  then hold each logged step once.
  """
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      continue
    if record.get('step', 0) <= step:
      kept.append(line)
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(f'{line}\n' for line in kept))
  temporary.replace(path)


class Writer:
  """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard/`."""

  def __init__(self, workdir: pathlib.Path, *, step: int):
    """Continues after `step`; later lines of an interrupted run go.

    Only process 0 writes; the others may call it all the same.
    """
    self._on = jax.process_index() == 0
    if not self._on:
      return
    path = pathlib.Path(workdir) / 'metrics.jsonl'
    trim(path, step)
    self._file = path.open('a', encoding='utf-8')
    self._board = tensorboardX.SummaryWriter(
      str(pathlib.Path(workdir) / 'tensorboard'), purge_step=step + 1
    )

  def write(self, step: int, values: dict[str, float]) -> None:
    """One JSON object on a line of its own, flushed."""
    if not self._on:
      return
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes both."""
    if self._on:
      self._file.close()
      self._board.close()
