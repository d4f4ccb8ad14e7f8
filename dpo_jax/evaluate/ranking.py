"""A model's own pictures of a prompt, ranked by a judge, as pairs.

Wallace et al. 2024, section 5.4, let a judge choose between pictures that were
there; here the policy draws them itself, so that later rounds compare what the
model has become.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dpo_jax.evaluate import comparison, pages

# extremes: a prompt's best picture against its worst; all: every two.
MODES = ('extremes', 'all')
SCORES, PAIRS, REPORT = 'scores-{}.jsonl', 'pairs.jsonl', 'ranking.json'


class Group(NamedTuple):
  """A prompt's pictures: their files' names and their SHA-256."""

  prompt: str
  files: tuple[str, ...]
  digests: tuple[str, ...]


def read_groups(folder: str) -> list[Group]:
  """The pictures of a folder of tools.generate, by prompt.

  Raises ValueError for a folder that is not complete or that a reward guided,
  and where a prompt has one picture, or fewer than others have.
  """
  if comparison.is_guided(folder):
    raise ValueError(
      f'{folder}: a reward guided these pictures, and models trained on such '
      'winners collapse; generate without --reward_scale and --backward_steps'
    )
  found: dict[str, list[dict[str, Any]]] = {}
  for entry in comparison.read_entries(pathlib.Path(folder)):
    found.setdefault(entry['id'], []).append(entry)
  counts = {len(entries) for entries in found.values()}
  if counts == {1} or len(counts) > 1:
    raise ValueError(
      f'{folder}: has {min(counts)} to {max(counts)} pictures a prompt; ranking'
      ' needs as many of each, two at least: generate with '
      '--images_per_prompt=4'
    )
  return [
    Group(
      entries[0]['prompt'],
      tuple(entry['file'] for entry in entries),
      tuple(entry['sha256'] for entry in entries),
    )
    for entries in found.values()
  ]


class ScoreLog:
  """Scores of pictures, appended to a file beside them as they are made."""

  def __init__(self, folder: str, name: str, source: Mapping[str, str]):
    """Opens FOLDER/scores-NAME.jsonl, or begins it; drops a torn last line.

    Raises ValueError where other weights than `source` gave its scores.
    """
    self.path = pathlib.Path(folder) / SCORES.format(name)
    self._scores: dict[tuple[str, str], float] = {}
    head = {'scorer': name, 'source': dict(source)}
    if not self.path.is_file():
      pages.write_whole(self.path, json.dumps(head) + '\n')
      return
    lines = self.path.read_text(encoding='utf-8').splitlines()
    found = _parse(lines[0]) if lines else {}
    if found != head:
      theirs = found.get('source', {}).get('name', 'an unknown judge')
      raise ValueError(
        f'{self.path}: scores of {theirs} and not of {source["name"]}, or of '
        'other weights; remove the file to score again'
      )
    kept = [record for line in lines[1:] if (record := _parse(line))]
    self._scores = {
      (record['file'], record['sha256']): record['score'] for record in kept
    }
    # A torn last line would stick to the next one.
    text = ''.join(json.dumps(record) + '\n' for record in [head, *kept])
    pages.write_whole(self.path, text)

  def missing(self, groups: Sequence[Group]) -> list[Group]:
    """Those with a picture that has no score."""
    known = self._scores.keys()
    return [group for group in groups if not known >= {*_keys(group)}]

  def add(
    self, groups: Sequence[Group], scores: Float[np.ndarray, 'n k']
  ) -> None:
    """Enters scores, which are on the disk before this returns."""
    lines = []
    for group, row in zip(groups, scores, strict=True):
      for key, score in zip(_keys(group), row.tolist(), strict=True):
        self._scores[key] = score
        record = {'file': key[0], 'sha256': key[1], 'score': score}
        lines.append(json.dumps(record) + '\n')
    with self.path.open('a', encoding='utf-8') as file:
      file.write(''.join(lines))
      file.flush()
      os.fsync(file.fileno())

  def read(self, groups: Sequence[Group]) -> Float[np.ndarray, 'n k']:
    """Their scores."""
    return np.array(
      [[self._scores[key] for key in _keys(group)] for group in groups]
    )


def _keys(group: Group) -> list[tuple[str, str]]:
  """What its pictures' scores are known by."""
  return list(zip(group.files, group.digests, strict=True))


def _parse(line: str) -> dict[str, Any]:
  try:
    record = json.loads(line)
  except ValueError:
    return {}
  return record if isinstance(record, dict) else {}


def make_pairs(
  groups: Sequence[Group],
  scores: Float[np.ndarray, 'n k'],
  *,
  mode: str = 'extremes',
  min_gap: float = 0.0,
  generator: str = '',
) -> tuple[list[dict[str, str]], dict[str, int]]:
  """(lines for tools.prepare --format=jsonl, counts).

  A pair whose scores are equal, or differ by less than `min_gap`, is left out.
  generator: what drew the pictures, for the record.
  """
  if mode not in MODES:
    raise ValueError(f'pairs {mode!r}: must be one of {", ".join(MODES)}')
  lines, counts = [], {'kept': 0, 'ties': 0, 'below_min_gap': 0}
  for group, row in zip(groups, scores, strict=True):
    # Best first; equal ones in the order of their numbers.
    order = np.argsort(-row, kind='stable')
    choices = [(order[0], order[-1])]
    if mode == 'all':
      choices = [(i, j) for a, i in enumerate(order) for j in order[a + 1 :]]
    for better, worse in choices:
      gap = row[better] - row[worse]
      if gap == 0 or gap < min_gap:
        counts['below_min_gap' if gap else 'ties'] += 1
        continue
      counts['kept'] += 1
      lines.append(
        {
          'caption': group.prompt,
          'winner': group.files[better],
          'loser': group.files[worse],
          'winner_generator': generator,
          'loser_generator': generator,
        }
      )
  return lines, counts


def write(
  folder: str, lines: Sequence[Mapping[str, str]], report: Mapping[str, Any]
) -> pathlib.Path:
  """Writes FOLDER/pairs.jsonl, which is returned, and ranking.json."""
  path = pathlib.Path(folder)
  pages.write_whole(
    path / PAIRS, ''.join(json.dumps(line) + '\n' for line in lines)
  )
  text = json.dumps(pages.plain(dict(report)), indent=2) + '\n'
  pages.write_whole(path / REPORT, text)
  return path / PAIRS
