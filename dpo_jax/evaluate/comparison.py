"""Two folders of pictures of the same prompts and seeds, side by side.

Only paired differences at fixed prompts, seeds and sampling mean anything:
scores of one model differ between papers by more than most gains. So the
folders must agree in everything but the model and what steers it.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dpo_jax.evaluate import manifest, prompts, stats

# What the two sides are compared for, and may differ in.
_FREE = (
  'model',
  'unet_sha256',
  'weights',
  'lora',
  'refiner',
  'negative_weights',
  'reward',
)
# What names a picture in both folders.
_SAME = ('file', 'id', 'image', 'prompt', 'negative_prompt', 'seed')


class Pair(NamedTuple):
  """A prompt's two pictures: their files, and what the prompt is."""

  a: pathlib.Path
  b: pathlib.Path
  prompt: str
  prompt_id: str


def is_pictures(folder: str) -> bool:
  """Whether tools.generate made this folder."""
  path = pathlib.Path(folder)
  return (path / manifest.SETTINGS).is_file()


def is_guided(folder: str | os.PathLike) -> bool:
  """Whether a reward's gradients led the pictures of a folder.

  False for a folder that tools.generate did not make. Models trained on such
  pictures as winners were seen to collapse: they are no winners.
  """
  path = pathlib.Path(folder)
  if not is_pictures(str(path)):
    return False
  reward = _read_settings(path).get('reward') or {}
  return bool(reward.get('scale') or reward.get('backward_steps'))


def open_pairs(a: str, b: str) -> list[Pair]:
  """The pictures of two folders of tools.generate, prompt by prompt.

  Raises ValueError naming the first setting, prompt or seed in which they
  differ, for a folder that is not complete, and for two times the same.
  """
  folders = [pathlib.Path(folder) for folder in (a, b)]
  first, second = (_read_settings(folder) for folder in folders)
  different = [
    f'{key}: {first.get(key)!r} and {second.get(key)!r}'
    for key in sorted(first.keys() | second.keys())
    if key not in _FREE and first.get(key) != second.get(key)
  ]
  if different:
    raise ValueError(
      f'{a} and {b} were made otherwise ({"; ".join(different)}); what differs '
      'besides the model decides who wins: generate both with the same flags'
    )
  entries, others = (read_entries(folder) for folder in folders)
  if len(entries) != len(others):
    raise ValueError(
      f'{a} has {len(entries)} pictures, {b} {len(others)}; finish both with '
      'the same prompts'
    )
  for one, other in zip(entries, others, strict=True):
    for key in _SAME:
      if one[key] != other[key]:
        raise ValueError(
          f'{a} and {b}: {one["file"]} has {key} {one[key]!r} and '
          f'{other[key]!r}; generate both from the same prompts and seeds'
        )
  return [
    Pair(
      folders[0] / one['file'],
      folders[1] / one['file'],
      one['prompt'],
      one['id'],
    )
    for one in entries
  ]


def _read_settings(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / manifest.SETTINGS
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(
      f'{path}: cannot be read; give a folder that python -m '
      'dpo_jax.tools.generate made'
    ) from error


def read_entries(folder: pathlib.Path) -> list[dict[str, Any]]:
  """What tools.generate says of each picture; ValueError where not whole."""
  path = folder / manifest.MANIFEST
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
      for key in (*_SAME, 'sha256'):
        entry[key]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path}: cannot be read; run its generate command again, which '
      'completes the folder'
    ) from error
  if not entries:
    raise ValueError(f'{path}: names no pictures')
  for entry in entries:
    name = entry['file']
    plain = isinstance(name, str) and pathlib.PurePath(name).name == name
    if not plain or not name:
      raise ValueError(f'{path}: {name!r} is no name of a file in this folder')
  missing = [e['file'] for e in entries if not (folder / e['file']).is_file()]
  if missing:
    raise ValueError(
      f'{folder}: {len(missing)} pictures are missing, {missing[0]} first; run '
      'its generate command again'
    )
  return entries


def read_prompts(folder: str) -> dict[str, str]:
  """The prompt of each picture of a folder of tools.generate, by its file."""
  entries = read_entries(pathlib.Path(folder))
  return {entry['file']: entry['prompt'] for entry in entries}


def by_prompt(
  values: Float[np.ndarray, ' n'], pairs: Sequence[Pair]
) -> tuple[list[str], Float[np.ndarray, ' p']]:
  """(ids of the prompts in their order, means over each one's pictures)."""
  found: dict[str, list[float]] = {}
  for pair, value in zip(pairs, values, strict=True):
    found.setdefault(pair.prompt_id, []).append(float(value))
  return list(found), np.array([np.mean(some) for some in found.values()])


def compare(
  a: Float[np.ndarray, ' n'],
  b: Float[np.ndarray, ' n'],
  pairs: Sequence[Pair],
  *,
  groups: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
  """How often b wins over a by a scorer, prompt by prompt.

  A prompt's outcome is the mean over its pictures of 1 (b scores higher), 0 or
  0.5 (a tie); the win rate is their mean. Returns value, low, high, n
  (bootstrap over prompts), wins, losses, ties and p_value (sign test: prompts
  above and below one half), median_a, median_b, difference (mean of b - a with
  its bootstrap interval), and `groups`: kind of group to group to value, low,
  high, n. groups: prompt id to {kind: group}.

  Raises ValueError as stats.wins does.
  """
  names, outcomes = by_prompt(stats.wins(b, a), pairs)
  won, lost = int((outcomes > 0.5).sum()), int((outcomes < 0.5).sum())
  differences = by_prompt(np.asarray(b) - np.asarray(a), pairs)[1]
  return {
    **stats.bootstrap(outcomes),
    'wins': won,
    'losses': lost,
    'ties': len(outcomes) - won - lost,
    'p_value': stats.sign_test(won, lost),
    'median_a': float(np.median(a)),
    'median_b': float(np.median(b)),
    'difference': _interval(differences),
    'groups': _by_group(names, outcomes, groups or {}),
  }


def _interval(values: np.ndarray) -> dict[str, Any]:
  if values.min() == values.max():
    # There is no spread to resample.
    value = float(values[0])
    return {'value': value, 'low': value, 'high': value, 'n': len(values)}
  return stats.bootstrap(values)


def _by_group(names, outcomes, groups):
  found: dict[str, dict[str, list[float]]] = {}
  for name, outcome in zip(names, outcomes, strict=True):
    for kind, group in groups.get(name, {}).items():
      found.setdefault(kind, {}).setdefault(group, []).append(outcome)
  return {
    kind: {
      group: stats.bootstrap(np.array(values))
      for group, values in sorted(some.items())
    }
    for kind, some in found.items()
  }


def read_groups(path: str) -> dict[str, Mapping[str, str]]:
  """Prompt id to {kind: group} of a prompt set."""
  return {prompt.id: prompt.groups for prompt in prompts.read(path)}
