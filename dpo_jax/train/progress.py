"""Progress with an ETA: a bar on a terminal, plain lines elsewhere."""

import sys
import time

import jax
from rich import console as rich_console
from rich import progress as rich_progress

SHOWN = ('loss', 'reward/margin', 'reward/accuracy')


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'


class Progress:
  """Context manager; only process 0 prints."""

  def __init__(self, first: int, total: int, *, label: str = 'train'):
    """Counts from `first` (after a resume) to `total` steps."""
    self._first, self._total, self._label = first, total, label
    self._on = jax.process_index() == 0
    self._bar = None
    self._started = time.monotonic()

  def __enter__(self):
    """Shows the bar when standard error is a terminal."""
    if self._on and sys.stderr.isatty():
      self._bar = rich_progress.Progress(
        rich_progress.TextColumn('{task.description}'),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn('ETA'),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn('{task.fields[shown]}'),
        console=rich_console.Console(stderr=True),
      )
      self._bar.start()
      self._task = self._bar.add_task(
        self._label, total=self._total, completed=self._first, shown=''
      )
    return self

  def __exit__(self, *unused):
    """Leaves the finished bar on the screen."""
    if self._bar is not None:
      self._bar.stop()

  def update(self, step: int, values: dict[str, float]) -> None:
    """Moves to `step` and shows the main numbers."""
    if not self._on:
      return
    shown = '  '.join(
      f'{name} {values[name]:.4g}' for name in SHOWN if name in values
    )
    if self._bar is not None:
      self._bar.update(self._task, completed=step, shown=shown)
      return
    spent = time.monotonic() - self._started
    left = spent / max(1, step - self._first) * (self._total - step)
    print(
      f'{self._label} {step}/{self._total}  elapsed {_duration(spent)}  '
      f'ETA {_duration(left)}  {shown}',
      file=sys.stderr,
      flush=True,
    )
