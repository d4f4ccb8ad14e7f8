"""Scores every picture of a prepared folder once, by one or more judges.

  python -m dpo_jax.tools.label --data=DIR \\
    --scorers=pickscore=PICKSCORE,hpsv2=HPS,aesthetic=CLIP_L [--json]

NAME=FOLDER are judges and their weights; names are pickscore, hpsv2, hpsv21,
clip and aesthetic. Folders hold transformers' CLIPModel (config.json,
model.safetensors) or one .safetensors file of OpenCLIP's names; aesthetic
needs aesthetic.safetensors beside it. --tokenizer names CLIP's vocab.json and
merges.txt for folders that have none.

The scores lie in DIR/scores, a number a picture, beside the records, which are
not touched. The same command goes on after it was killed, and scores nothing
twice. It ends with a report, also in DIR/scores/report.json: how often each
judge agrees with the labels, and the judges with one another.

Several processes, started as those of dpo_jax.main (--coordinator and so on),
share the pictures; process 0 writes.
"""

import functools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax import distributed, folders, scoring, sharding
from dpo_jax.data import images as images_lib
from dpo_jax.data import prepared, records, scan, score_files
from dpo_jax.evaluate import agreement, scorers
from dpo_jax.tools import arguments, ticker


def _parse(argv: Sequence[str]):
  parser = arguments.Parser('dpo_jax.tools.label', __doc__)
  add, whole = parser.add_argument, arguments.number(int, low=1)
  add('--data', required=True, help='a prepared folder')
  add('--split', default='', help="default: the folder's only one")
  add('--scorers', default='', help='NAME=FOLDER,...; none: report only')
  add('--tokenizer', default='', help='folder of vocab.json and merges.txt')
  add('--batch', type=whole, help='pairs at once; default: 8 a device')
  add('--dtype', default='auto', choices=('auto', 'float32', 'bfloat16'))
  add(
    '--chunk', type=whole, default=4096, help='records lost at most by a kill'
  )
  add('--json', action='store_true', help='print JSON')
  return parser.parse(argv)


def main(argv: Sequence[str]) -> None:
  """Scores what is missing; ValueError says what is wrong with the input."""
  values = _parse(distributed.join(argv, os.environ))
  distributed.check_started()
  kinds = prepared.find_kinds(values.data)
  if not kinds:
    raise ValueError(
      f'--data={values.data}: is no prepared folder (python -m '
      'dpo_jax.tools.prepare makes one)'
    )
  kind = kinds[0]
  given = records.open_folder(values.data, kind=kind, split=values.split)
  wanted = scoring.parse(values.scorers) if values.scorers else {}
  mesh = sharding.make_mesh()
  if distributed.is_primary():
    _read_labels(given, kind, values.chunk)
  for name, folder in wanted.items():
    scorer = scoring.open_scorer(
      name,
      folder,
      mesh=mesh,
      tokenizer=values.tokenizer,
      dtype=values.dtype,
      batch_size=values.batch or 0,
    )
    score(given, kind, scorer, chunk=values.chunk)
  if not distributed.is_primary():
    return
  report = make_report(given, kind)
  path = score_files.place(given, kind)
  folders.write_json(path / 'report.json', report)
  print(json.dumps(report, indent=2) if values.json else describe(report))


def score(
  given: records.Records,
  kind: str,
  scorer: scorers.Scorer,
  *,
  chunk: int = 4096,
) -> None:
  """Makes the column of a scorer, or what is missing of it.

  All processes call it. Raises ValueError naming the record whose pictures
  cannot be read.
  """
  name = f'score_{scorer.name}'
  writer, plan = None, None
  if distributed.is_primary():
    writer, plan = _begin(given, kind, name, scorer, chunk)
  plan = distributed.from_primary(plan)
  if plan['error']:
    raise ValueError(plan['error'])
  if plan['is_whole']:
    return
  missing = plan['missing']
  done = len(given) - sum(end - start for start, end in missing)
  with ticker.Ticker(len(given), label=scorer.name, first=done) as bar:
    for start, end in missing:
      made = []
      for scores in scorer.batches(
        range(start, end),
        ask=functools.partial(_question, given, kind),
        read=_decode,
      ):
        made.append(scores)
        done += len(scores)
        bar.update(done)
      column = np.concatenate(made)
      score_files.check_finite(name, start, column)
      if writer is not None:
        writer.add(start, column if kind == 'pairs' else column[:, 0])
  if writer is not None:
    writer.finish()


def _begin(
  given: records.Records,
  kind: str,
  name: str,
  scorer: scorers.Scorer,
  chunk: int,
) -> tuple[score_files.Writer | None, dict[str, Any]]:
  """(writer, what is left to do or the error that all processes raise)."""
  source = {**scorer.source, 'jax': jax.__version__}
  plan = {'error': '', 'is_whole': False, 'missing': []}
  try:
    if name not in score_files.list_names(given, kind):
      writer = score_files.Writer(given, kind, name, source=source, chunk=chunk)
      return writer, plan | {'missing': writer.missing()}
    description, _ = score_files.read(given, kind, name)
  except ValueError as error:
    return None, plan | {'error': str(error)}
  if description.source['sha256'] == source['sha256']:
    return None, plan | {'is_whole': True}
  return None, plan | {
    'error': (
      f'{score_files.place(given, kind) / name}: scores of '
      f'{description.source["name"]}, other weights than '
      f'{source["name"]}; remove {name}.json and .npy to score again'
    )
  }


def _question(given: records.Records, kind: str, row: int) -> scorers.Question:
  record = given[row]
  pictures = [
    (record[side], f'{given.folder}: record {row}, {side}')
    for side in scan.SIDES[kind]
  ]
  if not all(data for data, _ in pictures):
    raise ValueError(
      f'{given.folder}: record {row} has no pictures, only latents; scorers '
      'look at pictures: prepare with --keep_images=true'
    )
  return record['caption'].decode('utf-8', 'replace'), pictures


def _decode(picture: tuple[bytes, str]) -> np.ndarray:
  """uint8 [H W 3] of (bytes, where they are from); ValueError says where."""
  data, place = picture
  try:
    return images_lib.decode(data)
  except ValueError as error:
    raise ValueError(f'{place}: {error}; prepare the folder again') from error


def _read_labels(given: records.Records, kind: str, chunk: int) -> None:
  """Puts the labels beside the scores, unless they are there."""
  folder = score_files.place(given, kind)
  if folders.read_text(folder / f'{score_files.LABEL}.json') is not None:
    return
  writer = score_files.Writer(
    given, kind, score_files.LABEL, source={'name': 'records'}, chunk=chunk
  )
  with ticker.Ticker(len(given), label='labels') as bar:
    for start, end in writer.missing():
      column = [given[row][scan.LABELS[kind]] for row in range(start, end)]
      writer.add(start, np.array(column, np.float32))
      bar.update(end)
  writer.finish()


def make_report(given: records.Records, kind: str) -> dict:
  """What the columns say of the labels and of one another."""
  names = score_files.list_names(given, kind)
  columns, sources = {}, {}
  for name in names:
    description, values = score_files.read(given, kind, name)
    short = name.removeprefix('score_')
    columns[short], sources[short] = values, dict(description.source)
  _, labels = score_files.read(given, kind, score_files.LABEL)
  report = {'records': len(given), 'kind': kind, 'scorers': sources}
  if kind != 'pairs':
    return report | {
      'mean_score': {
        name: {
          'liked': _mean(values[labels > 0.5]),
          'disliked': _mean(values[labels < 0.5]),
        }
        for name, values in columns.items()
      }
    }
  return report | {
    'agreement_with_labels': {
      name: agreement.with_labels(values, labels)
      for name, values in columns.items()
    },
    'agreement_between': agreement.between(columns),
    'pairs_with_k_agreeing': agreement.consensus(columns, labels),
  }


def _mean(values: np.ndarray) -> float | None:
  return float(values.mean()) if len(values) else None


def describe(report: dict) -> str:
  """The report for a terminal."""
  lines = [f'{report["records"]} {report["kind"]}']
  for name, found in report.get('agreement_with_labels', {}).items():
    if found['value'] is None:
      lines.append(f'{name}: no label to agree with')
      continue
    paper = agreement.PUBLISHED.get(name)
    more = f'; on Pick-a-Pic in the paper {paper}%' if paper else ''
    lines.append(
      f'{name} agrees with the labels on {100 * found["value"]:.1f}% '
      f'[{100 * found["low"]:.1f}, {100 * found["high"]:.1f}] of '
      f'{found["n"]} pairs, {found["ties"]} ties{more}'
    )
  for names, found in report.get('agreement_between', {}).items():
    lines.append(
      f'{" and ".join(names.split())} agree on {100 * found["value"]:.1f}%'
    )
  counts = report.get('pairs_with_k_agreeing', [])
  for k, count in enumerate(counts[1:], 1):
    share = 100 * count / max(1, report['records'])
    lines.append(f'{k} or more agree with the label: {count} ({share:.1f}%)')
  for name, found in report.get('mean_score', {}).items():
    lines.append(
      f'{name}: liked {found["liked"]}, disliked {found["disliked"]}'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
  sys.exit(arguments.run(main, sys.argv[1:]))
