"""Ranks a model's own pictures of each prompt by a judge, and makes pairs.

  python -m dpo_jax.tools.generate --model=MODEL --prompts=prompts.txt \\
    --images_per_prompt=4 --out=pictures
  python -m dpo_jax.tools.rank --pictures=pictures --scorer=pickscore=PICKSCORE
  python -m dpo_jax.tools.prepare --format=jsonl --out=pairs \\
    --source=pictures/pairs.jsonl

The winner of a pair is a prompt's best picture and the loser its worst, or
every two are compared (--pairs=all). Scores are kept in scores-NAME.jsonl as
they are made: the same command goes on after it was killed.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from dpo_jax import scoring, sharding
from dpo_jax.data import images as images_lib
from dpo_jax.evaluate import ranking, scorers
from dpo_jax.tools import arguments, ticker


def _parse(argv: Sequence[str]):
  parser = arguments.Parser('dpo_jax.tools.rank', __doc__)
  add, number = parser.add_argument, arguments.number
  add('--pictures', required=True, help='a folder of tools.generate')
  add('--scorer', required=True, help='NAME=FOLDER, as for tools.label')
  add('--tokenizer', default='', help='folder of vocab.json and merges.txt')
  add('--pairs', default='extremes', choices=ranking.MODES)
  add(
    '--min_gap',
    type=number(float, low=0),
    default=0.0,
    help='of the scores of a pair; smaller ones are left out',
  )
  add('--batch', type=number(int, low=1), help='prompts at once')
  add('--dtype', default='auto', choices=('auto', 'float32', 'bfloat16'))
  return parser.parse(argv)


def main(argv: Sequence[str]) -> None:
  """Ranks; ValueError says what is wrong with the input."""
  values = _parse(argv)
  wanted = scoring.parse(values.scorer)
  if len(wanted) > 1:
    raise ValueError(f'--scorer={values.scorer}: one judge ranks; name one')
  groups = ranking.read_groups(values.pictures)
  ((name, folder),) = wanted.items()
  scorer = scoring.open_scorer(
    name,
    folder,
    mesh=sharding.make_mesh(),
    tokenizer=values.tokenizer,
    dtype=values.dtype,
    batch_size=values.batch or 0,
  )
  scores = score(values.pictures, groups, scorer)
  lines, counts = ranking.make_pairs(
    groups,
    scores,
    mode=values.pairs,
    min_gap=values.min_gap,
    generator=pathlib.Path(values.pictures).name,
  )
  if not lines:
    raise ValueError(
      f'{values.pictures}: no pair is left of {len(groups)} prompts '
      f'({counts}); draw more pictures of each, or ask for a smaller --min_gap'
    )
  best, mean = scores.max(1), scores.mean(1)
  report = {
    'scorer': {'name': name, **scorer.source},
    'pictures': scores.size,
    'pairs': counts,
    'mean_score': float(mean.mean()),
    'mean_best_score': float(best.mean()),
  }
  path = ranking.write(values.pictures, lines, report)
  print(
    f'{counts["kept"]} pairs of {len(groups)} prompts in {path} '
    f'({counts["ties"]} ties, {counts["below_min_gap"]} below the gap); '
    f'{name} {mean.mean():.4g}, of the best {best.mean():.4g}'
  )


def score(
  folder: str, groups: Sequence[ranking.Group], scorer: scorers.Scorer
) -> np.ndarray:
  """Scores [prompts, pictures]; those that are there are not made again."""
  log = ranking.ScoreLog(folder, scorer.name, scorer.source)
  missing = log.missing(groups)
  root, done = pathlib.Path(folder), len(groups) - len(missing)
  questions = (
    (group.prompt, [root / file for file in group.files]) for group in missing
  )
  first = 0
  with ticker.Ticker(len(groups), label=scorer.name, first=done) as bar:
    for scores in scorer.batches(questions, read=images_lib.load):
      log.add(missing[first : first + len(scores)], scores)
      first += len(scores)
      bar.update(done + first)
  return log.read(groups)


if __name__ == '__main__':
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
  sys.exit(arguments.run(main, sys.argv[1:]))
