"""Labels of training pairs by judges: who wins, and which pairs are kept.

Wallace et al. 2024, section 5.4, train on labels by a scorer instead of
people's. All choices are made from the columns that tools.label left beside
the records, without reading a picture.
"""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Bool, UInt64

from dpo_jax.data import record_loader, score_files


@dataclasses.dataclass(frozen=True)
class Labelling:
  """How the labels of training pairs are made.

  Attributes:
    winner: column whose larger score wins; '' is the label of the records.
      Equal scores drop the pair.
    consensus: columns of judges that are asked whether they agree with the
      label of the records.
    min_agree: how many of them must; 0 asks none.
    per_caption: of each caption only so many pairs, those whose scores by
      `winner` differ the most; 0 is all.
    columns: others that batches come with.
  """

  winner: str = ''
  consensus: tuple[str, ...] = ()
  min_agree: int = 0
  per_caption: int = 0
  columns: tuple[str, ...] = ()

  def __post_init__(self):
    if self.min_agree > len(self.consensus):
      raise ValueError(
        f'data.min_agree={self.min_agree}: data.consensus names '
        f'{len(self.consensus)} judges; ask for as many at most'
      )
    if self.consensus and not self.min_agree:
      raise ValueError(
        'data.min_agree=0: says how many of data.consensus must agree with the '
        'label; give 1 or more'
      )
    if self.per_caption and not self.winner:
      raise ValueError(
        f'data.per_caption={self.per_caption}: keeps the pairs whose scores by '
        'data.winner differ the most; name that'
      )

  @property
  def names(self) -> tuple[str, ...]:
    """All columns that are read."""
    return tuple(
      sorted({*self.consensus, *self.columns} | {self.winner} - {''})
    )


def with_columns(
  source: record_loader.Source, labelling: Labelling
) -> tuple[record_loader.Source, str]:
  """(the source with its columns beside the records, their digest).

  What the records hold themselves is not looked for beside them. Raises
  ValueError naming the folder where a column is missing.
  """
  found, digest = {}, hashlib.sha256(repr(labelling).encode())
  for name in labelling.names:
    if name in source.records.fields:
      continue
    description, values = score_files.read(source.records, source.kind, name)
    found[name] = values
    digest.update(description.sha256.encode())
  return dataclasses.replace(source, scores=found), digest.hexdigest()


def choose(
  source: record_loader.Source,
  labelling: Labelling,
  captions: UInt64[np.ndarray, ' n'],
) -> tuple[record_loader.Source, dict[str, int]]:
  """(the source of the pairs that are kept, how many were dropped and why).

  captions: hash of the caption of each of the source's examples. Raises
  ValueError where nothing is kept.
  """
  rows = np.arange(len(source.records)) if source.rows is None else source.rows
  kept, counts = np.ones(len(rows), bool), {}
  if labelling.min_agree:
    agree = _agreeing(source, labelling)[rows]
    kept &= agree
    counts['pairs_without_consensus_dropped'] = int((~agree).sum())
  if labelling.winner:
    scores = _column(source, labelling.winner)[rows]
    tied = scores[:, 0] == scores[:, 1]
    counts['score_ties_dropped'] = int((kept & tied).sum())
    kept &= ~tied
    if labelling.per_caption:
      gaps = np.abs(scores[:, 0] - scores[:, 1])
      best = _largest(captions, gaps, kept, labelling.per_caption)
      counts['pairs_beyond_per_caption_dropped'] = int((kept & ~best).sum())
      kept = best
  if not kept.any():
    raise ValueError(
      f'{source.records.folder}: no pair is left of {len(rows)} ({counts}); '
      'ask for less'
    )
  chosen = source if kept.all() else source.select(np.flatnonzero(kept))
  return dataclasses.replace(chosen, winner=labelling.winner), counts


def _column(source: record_loader.Source, name: str) -> np.ndarray:
  if name in source.scores:
    return source.scores[name]
  raise ValueError(
    f'{source.records.folder}: {name} is in the records and not beside them; '
    'choosing pairs by it would read them all: score the folder with python -m '
    'dpo_jax.tools.label'
  )


def _agreeing(
  source: record_loader.Source, labelling: Labelling
) -> Bool[np.ndarray, ' n']:
  """Whether enough judges choose what the label says; their ties do not."""
  _, labels = score_files.read(source.records, source.kind, score_files.LABEL)
  votes = np.zeros(len(labels), int)
  for name in labelling.consensus:
    scores = _column(source, name)
    chosen = np.sign(scores[:, 0] - scores[:, 1])
    votes += (chosen * np.sign(labels - 0.5)) > 0
  return votes >= labelling.min_agree


def _largest(
  groups: np.ndarray, values: np.ndarray, kept: np.ndarray, most: int
) -> Bool[np.ndarray, ' n']:
  """Of each group's kept rows the `most` with the largest values."""
  rows = np.flatnonzero(kept)
  # By group, within it the largest first, ties in the order of the rows.
  order = rows[np.lexsort((rows, -values[rows], groups[rows]))]
  firsts = np.r_[True, groups[order][1:] != groups[order][:-1]]
  starts = np.maximum.accumulate(np.where(firsts, np.arange(len(order)), 0))
  chosen = np.zeros(len(kept), bool)
  chosen[order[np.arange(len(order)) - starts < most]] = True
  return chosen
