"""Checks a prepared data set, record by record.

  python -m dpo_jax.tools.verify --data=DIR [--json]

Metadata, the list of shards, their sizes and SHA-256, every record's checksum
and fields, every picture, and what the fields say of one another. Names
exactly the damaged records. Exit code 0: all is good; 1: damage was found;
2: there is no data set, or its metadata are refused.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence

from dpo_jax.data import checks
from dpo_jax.evaluate import captions
from dpo_jax.tools import arguments, ticker

DAMAGED = 1


def describe(report: checks.Report) -> str:
  """The report for a terminal; runs of records in one line."""
  lines = [
    f'{report.files} shards, {report.records} records, {report.images} pictures'
    ' checked'
  ]
  for first, last in _runs(report.problems):
    place = first.file
    if first.record is not None:
      span = f'{first.record}'
      if last is not first:
        span = f'{first.record} to {last.record}'
      place += f': record {span} (number {first.index} of the split)'
    lines.append(captions.shorten(f'{place}: {first.reason}', 600))
  count = len(report.damaged)
  if not report.problems:
    lines.append('all is good')
  else:
    lines.append(
      f'{len(report.problems)} problems, {count} damaged records; prepare the '
      'named shards again'
    )
  return '\n'.join(lines)


def _runs(
  problems: Sequence[checks.Problem],
) -> Iterator[tuple[checks.Problem, checks.Problem]]:
  """(first, last) of neighbouring records with the same reason."""
  start = last = None
  for problem in problems:
    follows = (
      last is not None
      and problem.record is not None
      and last.record is not None
      and (problem.file, problem.reason) == (last.file, last.reason)
      and problem.record == last.record + 1
    )
    if not follows and start is not None:
      yield start, last
    if not follows:
      start = problem
    last = problem
  if start is not None:
    yield start, last


def _as_json(report: checks.Report) -> str:
  return json.dumps(
    {
      'good': not report.problems,
      'files': report.files,
      'records': report.records,
      'images': report.images,
      'damaged': [
        {'file': file, 'record': record} for file, record in report.damaged
      ],
      'problems': [problem._asdict() for problem in report.problems],
    },
    indent=2,
  )


def main(argv: Sequence[str]) -> checks.Report:
  """Checks and prints; ValueError says what is wrong with the input."""
  parser = arguments.Parser('dpo_jax.tools.verify', __doc__)
  parser.add_argument('--data', required=True, help='a prepared folder')
  parser.add_argument('--json', action='store_true', help='print JSON')
  values = parser.parse(argv)
  folder = checks.Folder(values.data)
  with ticker.Ticker(folder.total, label='records') as bar:
    report = folder.check(threads=os.cpu_count() or 1, on_progress=bar.update)
  print(_as_json(report) if values.json else describe(report))
  return report


def run(argv: Sequence[str]) -> int:
  """Exit code: 0 good, 1 damage, 2 wrong input."""
  problems = []
  code = arguments.run(lambda a: problems.extend(main(a).problems), argv)
  return code or (DAMAGED if problems else 0)


if __name__ == '__main__':
  sys.exit(run(sys.argv[1:]))
