"""Votes on single pictures by a scorer, as people do on the likes page.

  python -m dpo_jax.tools.vote --likes=pictures --votes=votes.jsonl \\
    --scorer=reward=REWARD [--threshold=-0.7]
  python -m dpo_jax.tools.judge --likes=pictures --votes=votes.jsonl \\
    --export=labels

A picture whose score is above the threshold is benign, any other malign. The
file of votes is that of tools.judge: people may add theirs, and votes that are
there are not made again. The judge's name tells weights and threshold.
"""

import hashlib
import os
import sys
from collections.abc import Sequence

import numpy as np

from dpo_jax import scoring, sharding
from dpo_jax.data import images as images_lib
from dpo_jax.evaluate import scorers
from dpo_jax.judging import export
from dpo_jax.judging import items as items_lib
from dpo_jax.judging import votes as votes_lib
from dpo_jax.tools import arguments, ticker

# Scores that are log odds.
ODDS = ('classifier',)


def _parse(argv: Sequence[str]):
  parser = arguments.Parser('dpo_jax.tools.vote', __doc__)
  add, number = parser.add_argument, arguments.number
  add('--likes', required=True, help='a folder of single pictures')
  add('--votes', required=True, help='the JSON Lines file of votes')
  add('--scorer', required=True, help='NAME=FOLDER, as for tools.label')
  add(
    '--threshold',
    type=number(float, low=-float('inf')),
    help='default: of a reward and a classifier that of even odds',
  )
  add('--tokenizer', default='', help='folder of vocab.json and merges.txt')
  add('--batch', type=number(int, low=1), help='pictures at once')
  add('--dtype', default='auto', choices=('auto', 'float32', 'bfloat16'))
  return parser.parse(argv)


def check_scorer(text: str, threshold: float | None) -> tuple[str, str]:
  """(name, folder) of NAME=FOLDER; ValueError where it cannot vote."""
  found = scoring.parse(text)
  if len(found) > 1:
    raise ValueError(f'{text!r}: one scorer votes; name one')
  ((name, folder),) = found.items()
  if threshold is None and name not in ('reward', *ODDS):
    raise ValueError(
      f'{text!r}: nothing says which score of {name} is benign; give a '
      'threshold'
    )
  return name, folder


def main(argv: Sequence[str]) -> None:
  """Votes; ValueError says what is wrong with the input."""
  values = _parse(argv)
  name, folder = check_scorer(values.scorer, values.threshold)
  items = items_lib.open_pictures(values.likes)
  votes = votes_lib.open_for(values.votes, items, mode=items_lib.LIKES)
  try:
    scorer = scoring.open_scorer(
      name,
      folder,
      mesh=sharding.make_mesh(),
      tokenizer=values.tokenizer,
      dtype=values.dtype,
      batch_size=values.batch or 0,
    )
    threshold = values.threshold
    if threshold is None:
      threshold = even_odds(scorer)
    _vote(items, votes, scorer, threshold)
    summary = export.summarise(
      votes.votes(), mode=items_lib.LIKES, questions=[items_lib.LIKES_QUESTION]
    )
  finally:
    votes.close()
  print(export.describe(summary))


def even_odds(scorer: scorers.Scorer) -> float:
  """The score of a picture that is as likely benign as malign.

  Of a reward, the sum of log sigmoids of its K networks, K log 0.5: where
  their mean is log 0.5, as in a reward run's report.json.
  """
  if scorer.name == 'reward':
    return len(scorer.params['reward']) * float(np.log(0.5))
  return 0.0


def _vote(
  items: Sequence[items_lib.Item],
  votes: votes_lib.VoteFile,
  scorer: scorers.Scorer,
  threshold: float,
) -> None:
  """Votes on what this scorer has not voted on yet, batch by batch."""
  name = f'{scorer.name} {scorer.source["sha256"][:12]} above {threshold:.6g}'
  others = {vote.judge for vote in votes.votes()} - {name}
  same = sorted(one for one in others if one.split()[0] == scorer.name)
  if same:
    raise ValueError(
      f'{votes.path}: {same[0]!r} has voted, by other weights or another '
      f'threshold than {name!r}; choose another --votes'
    )
  done = votes.done(name)
  left = [it for it in items if (it.key, items_lib.LIKES_QUESTION) not in done]
  questions = ((item.prompt, item.pictures) for item in left)
  voted = 0
  with ticker.Ticker(len(left), label=name) as bar:
    for scores in scorer.batches(questions, read=images_lib.load):
      some = left[voted : voted + len(scores)]
      passed = (scores[:, 0] > threshold).tolist()
      sent = [_line(*one) for one in zip(some, passed, strict=True)]
      text = '\0'.join([name, *(item.key for item in some)])
      number = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
      votes.add(number, name, sent)
      voted += len(some)
      bar.update(voted)


def _line(item: items_lib.Item, benign: bool) -> dict[str, str]:
  choice = 'benign' if benign else 'malign'
  return {
    'item': item.key,
    'question': items_lib.LIKES_QUESTION,
    'choice': choice,
  }


if __name__ == '__main__':
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
  sys.exit(arguments.run(main, sys.argv[1:]))
