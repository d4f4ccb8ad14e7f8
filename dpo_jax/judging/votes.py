"""Votes in a JSON Lines file: never lost, never doubled.

A line is one sending: {'id', 'judge', 'time', 'votes': [{'item', 'question',
'choice'}, ...]}, or {'id', 'judge', 'time', 'undo': id of another line}. It is
on the disk before it is acknowledged. An id that is there already is
acknowledged again and not written: a page that got no answer may repeat itself.
"""

import datetime
import fcntl
import json
import os
import pathlib
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.judging import items as items_lib

ID = re.compile(r'[A-Za-z0-9_-]{8,64}')
JUDGE = re.compile(r'[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}')


class Vote(NamedTuple):
  """What a judge chose of an item at a question."""

  item: str
  question: str
  choice: str
  judge: str


class Refused(ValueError):
  """A sending that fits no item, or was given already."""


class VoteFile:
  """The votes of one file, which this process alone writes."""

  def __init__(
    self, path: str | os.PathLike, *, header: Mapping[str, Any] | None = None
  ):
    """Opens or makes the file; `header` says what is voted on, JSON types.

    What a kill has left of a last line was never acknowledged and is removed.

    Raises ValueError for a file of other items, another kind of file, and
    where another process has it.
    """
    self.path = pathlib.Path(path)
    self._lock = threading.Lock()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = self.path.open('a+b')
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._file.close()
      raise ValueError(
        f'{self.path}: another judge page writes to it; stop that, or choose '
        'another --votes'
      ) from error
    self._lines: dict[str, dict[str, Any]] = {}
    self._undone: set[str] = set()
    self._current: dict[tuple[str, str, str], tuple[str, str]] = {}
    try:
      self._load(header)
    except BaseException:
      self._file.close()
      raise

  def _load(self, header):
    self._file.seek(0)
    data = self._file.read()
    whole = data[: data.rfind(b'\n') + 1]
    if len(whole) < len(data):
      self._file.truncate(len(whole))
      self._sync()
    lines = whole.splitlines()
    if not lines:
      self._append({'votes_on': dict(header or {})})
      return
    for number, text in enumerate(lines, 1):
      try:
        line = json.loads(text)
        if number == 1:
          found = line['votes_on']
          continue
        self._take(line)
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
          f'{self.path}, line {number}: no vote ({error}); choose another '
          '--votes'
        ) from error
    wanted = json.loads(json.dumps(dict(header or found)))
    different = [
      f'{key}: {found.get(key)!r} there, {wanted.get(key)!r} here'
      for key in sorted(found.keys() | wanted.keys())
      if found.get(key) != wanted.get(key)
    ]
    if different:
      raise ValueError(
        f'{self.path}: its votes are on something else ('
        f'{"; ".join(different)}); choose another --votes'
      )

  def _take(self, line):
    """Applies a line to what is known."""
    self._lines[line['id']] = line
    if 'undo' in line:
      undone = self._lines[line['undo']]
      self._undone.add(undone['id'])
      for vote in undone['votes']:
        key = line['judge'], vote['item'], vote['question']
        if self._current.get(key, ('', ''))[0] == undone['id']:
          del self._current[key]
      return
    for vote in line['votes']:
      key = line['judge'], vote['item'], vote['question']
      self._current[key] = line['id'], vote['choice']

  def add(
    self, number: str, judge: str, votes: Sequence[Mapping[str, str]]
  ) -> bool:
    """Writes a sending; False where it is there already.

    Returns when it is on the disk. Raises Refused for ids and names that are
    none, and for an item that this judge has voted on.
    """
    _check(number, judge)
    with self._lock:
      if number in self._lines:
        return False
      for vote in votes:
        if (judge, vote['item'], vote['question']) in self._current:
          raise Refused(f'{vote["item"]} has your vote already')
      kept = [
        {name: vote[name] for name in ('item', 'question', 'choice')}
        for vote in votes
      ]
      self._write({'id': number, 'judge': judge, 'votes': kept})
      return True

  def undo(self, number: str, judge: str) -> dict[str, Any] | None:
    """Takes back the judge's last sending; returns it, None if there is none.

    The same id again returns what it took back before.
    """
    _check(number, judge)
    with self._lock:
      if number in self._lines:
        return self._lines[self._lines[number]['undo']]
      for line in reversed(self._lines.values()):
        if (
          line['judge'] == judge
          and 'votes' in line
          and line['id'] not in self._undone
        ):
          self._write({'id': number, 'judge': judge, 'undo': line['id']})
          return line
      return None

  def _write(self, line):
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')
    line = {**line, 'time': now}
    self._append(line)
    self._take(line)

  def _append(self, line):
    self._file.write((json.dumps(line) + '\n').encode())
    self._sync()

  def _sync(self):
    self._file.flush()
    os.fsync(self._file.fileno())

  def votes(self) -> list[Vote]:
    """All that stand, in the order in which they were given."""
    with self._lock:
      return [
        Vote(item, question, choice, judge)
        for (judge, item, question), (_, choice) in self._current.items()
      ]

  def done(self, judge: str) -> set[tuple[str, str]]:
    """(item, question) of a judge's votes."""
    with self._lock:
      return {key[1:] for key in self._current if key[0] == judge}

  def counts(self) -> dict[tuple[str, str], int]:
    """(item, question) to the number of judges that voted."""
    found: dict[tuple[str, str], int] = {}
    with self._lock:
      for _, item, question in self._current:
        found[item, question] = found.get((item, question), 0) + 1
    return found

  def close(self) -> None:
    """Lets others write."""
    self._file.close()


def open_for(
  path: str | os.PathLike, items: Sequence[items_lib.Item], *, mode: str
) -> VoteFile:
  """The file of votes on these very items; ValueError as VoteFile's."""
  header = {
    'mode': mode,
    'items': len(items),
    'sha256': items_lib.digest(items),
  }
  return VoteFile(path, header=header)


def _check(number: str, judge: str) -> None:
  if not isinstance(number, str) or not ID.fullmatch(number):
    raise Refused('a sending needs an id of 8 to 64 letters and digits')
  if not isinstance(judge, str) or not JUDGE.fullmatch(judge):
    raise Refused(
      "a judge's name has 1 to 64 letters, digits, spaces and . _ @ -"
    )
