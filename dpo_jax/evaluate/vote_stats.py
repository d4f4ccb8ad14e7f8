"""What votes of several judges say: majorities, win rates, agreement."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dpo_jax.evaluate import stats


class Vote(Protocol):
  """A judge's choice of an item at a question."""

  item: str
  question: str
  choice: str
  judge: str


def by_item(votes: Iterable[Vote], question: str) -> dict[str, dict[str, str]]:
  """item to judge to choice, of one question."""
  found: dict[str, dict[str, str]] = {}
  for vote in votes:
    if vote.question == question:
      found.setdefault(vote.item, {})[vote.judge] = vote.choice
  return found


def majority(choices: Sequence[str], *, even: str) -> str:
  """The choice of most judges; `even` where two have equally many."""
  counts = collections.Counter(choices).most_common(2)
  if len(counts) > 1 and counts[0][1] == counts[1][1]:
    return even
  return counts[0][0]


def win_rate(
  items: Mapping[str, Mapping[str, str]], *, min_votes: int = 1
) -> dict[str, Any]:
  """How often b wins over a by the majority of an item's judges.

  A majority for 'tie', and none at all, count one half. Items with fewer than
  `min_votes` votes are left out. Returns what stats.win_rate does (bootstrap
  over items, sign test), or n = 0 and None where nothing is left.
  """
  outcomes = {'b': 1.0, 'a': 0.0, 'tie': 0.5}
  found = [
    outcomes[majority(list(choices.values()), even='tie')]
    for choices in items.values()
    if len(choices) >= min_votes
  ]
  if not found:
    return {'value': None, 'n': 0}
  return stats.win_rate(found, [0.5] * len(found))


def shares(
  items: Mapping[str, Mapping[str, str]], choices: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """Each choice's share of the items, by majority, with Wilson's interval."""
  found = [
    majority(list(given.values()), even='unsure') for given in items.values()
  ]
  return {
    choice: stats.share([one == choice for one in found])
    for choice in choices
    if found
  }


def krippendorff(items: Mapping[str, Mapping[str, str]]) -> float | None:
  """Krippendorff's alpha of nominal choices: 1 agreement, 0 chance.

  alpha = 1 - (n - 1) sum_{c<k} o_ck / sum_{c<k} n_c n_k, with o_ck the
  coincidences of choices c and k within items, each pair of an item of m votes
  counted 1 / (m - 1), n_c their sums and n the sum of those; items with one
  vote say nothing. None where no item has two votes, or all votes are the
  same. Krippendorff, 2011, Computing Krippendorff's Alpha-Reliability, C.
  """
  names = sorted({c for given in items.values() for c in given.values()})
  place = {name: i for i, name in enumerate(names)}
  coincidences = np.zeros((len(names), len(names)))
  for given in items.values():
    if len(given) < 2:
      continue
    counts = np.zeros(len(names))
    for choice in given.values():
      counts[place[choice]] += 1
    pairs = np.outer(counts, counts) - np.diag(counts)
    coincidences += pairs / (len(given) - 1)
  sums = coincidences.sum(0)
  n = sums.sum()
  expected = n**2 - (sums**2).sum()
  if expected == 0:
    return None
  observed = n - np.trace(coincidences)
  return float(1 - (n - 1) * observed / expected)
