"""Votes as training data in tools.prepare's JSON Lines, and as a table."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.evaluate import comparison, pages, vote_stats
from dpo_jax.judging import items as items_lib
from dpo_jax.judging import votes as votes_lib

# Of likes, which benign picture is set against which malign one.
CROSSINGS = ('none', 'prompt', 'all')
MAX_CROSSED = 200_000


def summarise(
  votes: Sequence[votes_lib.Vote],
  *,
  mode: str,
  questions: Sequence[str],
  min_votes: int = 1,
) -> dict[str, Any]:
  """What is known by question: win rate or shares, agreement, counts."""
  found = {}
  for question in questions:
    items = vote_stats.by_item(votes, question)
    judges = sorted({judge for given in items.values() for judge in given})
    one = {
      'items': len(items),
      'votes': sum(map(len, items.values())),
      'judges': judges,
      'krippendorff_alpha': vote_stats.krippendorff(items),
    }
    if mode == items_lib.PAIRS:
      one['win_rate'] = vote_stats.win_rate(items, min_votes=min_votes)
    else:
      one['shares'] = vote_stats.shares(items, items_lib.CHOICES[mode])
    found[question] = one
  return found


def describe(summary: Mapping[str, Any]) -> str:
  """The table for a terminal."""
  lines = []
  for question, one in summary.items():
    alpha = one['krippendorff_alpha']
    agreement = 'no item has two different judges'
    if alpha is not None:
      agreement = f"Krippendorff's alpha {alpha:.2f}"
    lines.append(
      f'{question}: {one["votes"]} votes of {len(one["judges"])} judges on '
      f'{one["items"]} items; {agreement}'
    )
    rate = one.get('win_rate')
    if rate and rate['value'] is not None:
      lines.append(
        f'  b wins {100 * rate["value"]:.1f}% [{100 * rate["low"]:.1f}, '
        f'{100 * rate["high"]:.1f}] of {rate["n"]} pairs; sign test p '
        f'{rate["p_value"]:.2g}'
      )
    for choice, share in one.get('shares', {}).items():
      lines.append(
        f'  {choice} {100 * share["value"]:.1f}% [{100 * share["low"]:.1f}, '
        f'{100 * share["high"]:.1f}]'
      )
  return '\n'.join(lines)


def write(
  folder: str | os.PathLike,
  items: Sequence[items_lib.Item],
  votes: Sequence[votes_lib.Vote],
  *,
  mode: str,
  question: str,
  questions: Sequence[str],
  min_votes: int = 1,
  cross: str = 'none',
  per_class: int = 0,
) -> dict[str, int]:
  """Writes DIR/pairs.jsonl or likes.jsonl, its pictures, and votes.json.

  `python -m dpo_jax.tools.prepare --format=jsonl --source=DIR/...` reads them.
  Of a pair the majority at `question` wins, and ties and even votes are left
  out, and winners that a reward guided (`comparison.is_guided`); of single
  pictures benign is liked, malign is not, and what is unsure is left out.
  `guided` counts the kept ones that a reward guided: they may teach a reward,
  and no generator. `cross`, of single pictures, adds pairs.jsonl, see
  `cross_likes`; `per_class` keeps so many benign and as many malign ones at
  most, drawn by their names; 0 keeps all.
  Returns counts of what was kept and left out. Raises ValueError for guided
  pictures where `cross` is asked for.
  """
  if cross != 'none':
    _refuse_guided(items, cross)
  folder = pathlib.Path(folder)
  (folder / 'pictures').mkdir(parents=True, exist_ok=True)
  given = vote_stats.by_item(votes, question)
  even = 'tie' if mode == items_lib.PAIRS else 'unsure'
  lines, counts = [], {'kept': 0, even: 0, 'too_few_votes': 0, 'no_vote': 0}
  taken = dict.fromkeys(items_lib.CHOICES[mode], 0)
  numbered = list(enumerate(items))
  if per_class:
    # Names tell prompts: the first ones would be of the first prompts.
    numbered.sort(key=lambda one: items_lib.draw('per_class', one[1].key))
  for number, item in numbered:
    choices = list(given.get(item.key, {}).values())
    if len(choices) < max(1, min_votes):
      counts['too_few_votes' if choices else 'no_vote'] += 1
      continue
    choice = vote_stats.majority(choices, even=even)
    if choice == even:
      counts[even] += 1
      continue
    if per_class and taken[choice] >= per_class:
      counts['more_of_its_class'] = counts.get('more_of_its_class', 0) + 1
      continue
    if _is_guided(item, choice, mode):
      name = 'guided' if mode == items_lib.LIKES else 'guided_winner'
      counts[name] = counts.get(name, 0) + 1
      if mode == items_lib.PAIRS:
        continue
    taken[choice] += 1
    names = []
    for side, path in enumerate(item.pictures):
      # Names of our own: a file's may be anything.
      name = f'pictures/{number:06d}_{side}{path.suffix.lower()}'
      shutil.copyfile(path, folder / name)
      names.append(name)
    lines.append(_line(item, names, choice, mode))
    counts['kept'] += 1
  name = 'pairs.jsonl' if mode == items_lib.PAIRS else 'likes.jsonl'
  _write_lines(folder / name, lines)
  if cross != 'none':
    crossed = cross_likes(lines, by=cross)
    _write_lines(folder / 'pairs.jsonl', crossed)
    counts['pairs'] = len(crossed)
  summary = summarise(
    votes, mode=mode, questions=questions, min_votes=min_votes
  )
  record = pages.plain({'counts': counts, 'questions': summary})
  pages.write_whole(folder / 'votes.json', json.dumps(record, indent=2) + '\n')
  return counts


def cross_likes(
  likes: Sequence[Mapping[str, Any]], *, by: str
) -> list[dict[str, Any]]:
  """Pairs of every liked picture with every one that is not, as lines.

  by: 'prompt' pairs pictures of one prompt; 'all' all of them, under the
  liked one's prompt: for unconditional models, which read none.

  Raises ValueError where there is no pair, or more than MAX_CROSSED.
  """
  good = [line for line in likes if line['liked']]
  bad = [line for line in likes if not line['liked']]
  pairs = [
    {'caption': win['caption'], 'winner': win['image'], 'loser': lose['image']}
    for win in good
    for lose in bad
    if by == 'all' or win['caption'] == lose['caption']
  ][: MAX_CROSSED + 1]
  if not pairs:
    hint = "; 'all' crosses prompts" if good and bad else ''
    raise ValueError(
      f'--cross={by}: {len(good)} benign and {len(bad)} malign pictures make '
      f'no pair{hint}'
    )
  if len(pairs) > MAX_CROSSED:
    raise ValueError(
      f'--cross={by}: {len(good)} benign and {len(bad)} malign pictures make '
      f'more than {MAX_CROSSED} pairs; export fewer labels'
    )
  return pairs


def _is_guided(item: items_lib.Item, choice: str, mode: str) -> bool:
  won = 'ab'.index(choice) if mode == items_lib.PAIRS else 0
  return comparison.is_guided(item.pictures[won].parent)


def _refuse_guided(items: Sequence[items_lib.Item], cross: str) -> None:
  for folder in sorted({item.pictures[0].parent for item in items}):
    if comparison.is_guided(folder):
      raise ValueError(
        f'--cross={cross}: a reward guided the pictures of {folder}, and models'
        ' trained on such winners collapse; label pictures that were generated'
        ' without --reward_scale and --backward_steps'
      )


def _write_lines(path: pathlib.Path, lines) -> None:
  pages.write_whole(path, ''.join(json.dumps(line) + '\n' for line in lines))


def _line(item, names, choice, mode) -> dict[str, Any]:
  if mode == items_lib.LIKES:
    return {
      'caption': item.prompt,
      'image': names[0],
      'liked': choice == 'benign',
    }
  winner = 0 if choice == 'a' else 1
  return {
    'caption': item.prompt,
    'winner': names[winner],
    'loser': names[1 - winner],
    'winner_generator': 'ab'[winner],
    'loser_generator': 'ba'[winner],
  }
