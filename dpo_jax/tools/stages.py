"""Commands one after the other, for tools that go on where they stopped."""

import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dpo_jax import folders
from dpo_jax.tools import arguments

RECORD = 'rounds.json'


class Stage(NamedTuple):
  """A command: its name in rounds.json, module and flags.

  `whole`: a folder that is there only when the stage is done; a command that
  was stopped right after it would refuse to make it again.
  """

  name: str
  module: str
  words: tuple[str, ...]
  whole: pathlib.Path | None = None

  @property
  def text(self) -> str:
    """As it would be typed."""
    return shlex.join(['python', '-m', self.module, *self.words])

  def is_made(self) -> bool:
    """Whether what it makes is there."""
    return self.whole is not None and self.whole.exists()


class StageError(RuntimeError):
  """A stage ended with `code`; it has said why itself."""

  def __init__(self, stage: Stage, code: int):
    super().__init__(
      f'{stage.name} ended with exit code {code}; the same command goes on'
    )
    self.code = code


class Record:
  """WORKDIR/rounds.json: stages that are done, and results."""

  def __init__(self, workdir: pathlib.Path):
    """Reads what is there."""
    self._path = workdir / RECORD
    self.values: dict[str, Any] = {'stages': {}}
    if self._path.is_file():
      self.values = json.loads(self._path.read_text())

  def is_done(self, stage: Stage) -> bool:
    """Whether it is; ValueError where it was with other flags."""
    known = self.values['stages'].get(stage.name)
    if known is None:
      return False
    if known['command'] != stage.text:
      raise ValueError(
        f'{self._path}: {stage.name} was done by {known["command"]!r} and not '
        f'by {stage.text!r}; give the same flags, or another --workdir'
      )
    return True

  def add(self, stage: Stage, seconds: float) -> None:
    """Notes that a stage is done."""
    entry = {'command': stage.text, 'seconds': round(seconds, 1)}
    self.values['stages'][stage.name] = entry
    self.write()

  def write(self) -> None:
    """Writes the file whole."""
    self._path.parent.mkdir(parents=True, exist_ok=True)
    folders.write_json(folders.to_path(self._path), self.values)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
  """(other words, those that override a config); ValueError for KEY VALUE."""
  overrides = [word for word in words if word.startswith('--config.')]
  if any('=' not in word for word in overrides):
    raise ValueError('--config.KEY VALUE: write it as --config.KEY=VALUE')
  return [word for word in words if word not in overrides], overrides


def run_missing(
  stages: Sequence[Stage],
  record: Record,
  *,
  is_made: Callable[[Stage], bool] = Stage.is_made,
) -> None:
  """Prints and runs, in their order, the stages that are not done.

  is_made: whether a stage that nobody wrote down needs no command any more.
  Raises StageError where one fails, ValueError where one was done with other
  flags, and what `is_made` raises.
  """
  left = [stage for stage in stages if not record.is_done(stage)]
  for number, stage in enumerate(left, len(stages) - len(left) + 1):
    print(
      f'[{number}/{len(stages)}] {stage.name}: {stage.text}',
      file=sys.stderr,
      flush=True,
    )
    started = time.monotonic()
    if not is_made(stage):
      run(stage)
    record.add(stage, time.monotonic() - started)


def run(stage: Stage) -> None:
  """Runs it to its end; a signal that would stop us stops it first."""
  command = [sys.executable, '-m', stage.module, *stage.words]
  process = subprocess.Popen(command)
  before = signal.signal(
    signal.SIGTERM, lambda number, _: process.send_signal(number)
  )
  try:
    code = process.wait()
  except KeyboardInterrupt:
    # The terminal sends it to both; a training saves its step.
    code = process.wait()
  finally:
    signal.signal(signal.SIGTERM, before)
  if code:
    raise StageError(stage, code if code > 0 else 128 - code)


def exit_code(
  main: Callable[[Sequence[str]], None], argv: Sequence[str]
) -> int:
  """As arguments.run has it, or that of the stage that failed."""
  try:
    return arguments.run(main, argv)
  except StageError as error:
    print(f'error: {error}', file=sys.stderr)
    return error.code
