"""What became of the rows of a source: build_report.json and .txt."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from dpo_jax.data.formats import rows as rows_lib

NAME = 'build_report.json'
# Of every example exactly one of these is true.
_FATES = (
  'kept',
  'ties',
  'unlabelled',
  'without_caption',
  'identical',
  'unreadable',
)
_TEXTS = {
  'rows': 'rows read',
  'examples': '{kind} in them',
  'kept': 'kept',
  'ties': 'ties',
  'unlabelled': 'without a label',
  'without_caption': 'without a caption',
  'identical': 'the same image on both sides',
  'unreadable': 'with an unreadable image',
  'duplicates': 'kept that repeat a kept one (same caption and images)',
  'images': 'images decoded',
  'images_unreadable': 'unreadable images',
  'captions_repaired': 'captions that were no valid Unicode, repaired',
  'over_token_limit': 'kept with a caption over {limit} tokens, which is cut',
}


def make(
  kind: str,
  counts: Mapping[str, int],
  reasons: Mapping[str, int],
  *,
  settings: Mapping[str, Any],
) -> dict[str, Any]:
  """The report; captions are counted as too long only with a tokenizer.

  Raises AssertionError when the counts do not add up.
  """
  assert counts['examples'] == sum(counts[name] for name in _FATES), counts
  numbers = {name: counts[name] for name in _TEXTS}
  if settings.get('token_limit') is None:
    del numbers['over_token_limit']
  return {
    'kind': kind,
    'counts': numbers,
    'unreadable_images': dict(sorted(reasons.items())),
    'settings': dict(settings),
  }


def write(folder: pathlib.Path, report: Mapping[str, Any]) -> None:
  """Writes both files; of equal reports the bytes are equal."""
  text = json.dumps(report, indent=1, sort_keys=True)
  (folder / NAME).write_text(text + '\n')
  (folder / 'build_report.txt').write_text(to_text(report))


def to_text(report: Mapping[str, Any]) -> str:
  """The report for people."""
  settings = report['settings']
  lines = []
  for name, text in _TEXTS.items():
    if name in report['counts']:
      label = text.format(
        kind=report['kind'], limit=settings.get('token_limit')
      )
      lines.append(f'{report["counts"][name]:>12,}  {label}')
      if name == 'images_unreadable':
        lines += [
          f'{count:>16,}  {reason}'
          for reason, count in report['unreadable_images'].items()
        ]
  if 'over_token_limit' not in report['counts']:
    lines.append('Long captions were not counted: no --tokenizer, no --model.')
  lines.append('')
  lines.append(
    f'split {settings["split"]}, {settings["shards"]} shards, format '
    f'{settings["format"]}, '
    + (
      f'shorter side at most {settings["size"]}'
      if settings['size']
      else 'images as they came'
    )
  )
  lines += [
    f'{rows_lib.describe(file["name"])}: {file["rows"]} rows, '
    f'{file["bytes"]} bytes'
    for file in settings['files']
  ]
  return '\n'.join(lines) + '\n'


def in_one_line(kind: str, counts: Mapping[str, int]) -> str:
  """The fates of the examples, for a message."""
  fates = ', '.join(
    f'{counts[name]} {_TEXTS[name]}' for name in _FATES if counts.get(name)
  )
  return f'{counts.get("examples", 0)} {kind} ({fates or "no rows"})'
