"""A judge's scores of what the policy draws of the validation prompts.

The median picks the best step of a run (Wallace et al., CVPR 2024, section
5.1). Prompts, noise and sampler are the same at every step, and for the start
model, so that steps can be compared picture by picture.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from dpo_jax import distributed, drawing, folders, sharding, trees, types
from dpo_jax.evaluate import prompts as prompts_lib
from dpo_jax.evaluate import scorers, stats
from dpo_jax.train import best as best_lib
from dpo_jax.train import checkpoint
from dpo_jax.train import state as state_lib

# The start model's scores, drawn once and not once a start of the program.
START = 'start_scores.json'


def read_prompts(
  path: str, count: int, find_captions: Callable[[int], list[str]]
) -> list[prompts_lib.Prompt]:
  """The first `count` prompts of a file, of '' as many held-out captions.

  Each has a seed: its own, or its row. Raises ValueError as prompts.read.
  """
  if path:
    found = prompts_lib.read(path)[:count]
  else:
    texts = find_captions(count)
    found = [
      prompts_lib.Prompt(f'{i:06d}', text) for i, text in enumerate(texts)
    ]
  return [
    dataclasses.replace(one, seed=i if one.seed is None else one.seed)
    for i, one in enumerate(found)
  ]


@dataclasses.dataclass(frozen=True, eq=False)
class Validation:
  """Prompts, the sampler that draws them, and who judges what it drew.

  Attributes:
    scorer: whose parameters are on the host; they are placed while it judges.
    draw: of these prompts, from the noise of their seeds.
    settings: what the pictures hang on beside the prompts, of JSON types.
    start: whole components of the model at the start.
    complete: trained components -> whole ones.
  """

  scorer: scorers.Scorer
  prompts: Sequence[prompts_lib.Prompt]
  draw: drawing.DrawFn
  settings: Mapping[str, Any]
  start: Mapping[str, types.Params]
  complete: Callable[[types.Params], types.Params]

  def describe(self) -> dict[str, Any]:
    """Who scores what, by digests: all that the scores hang on."""
    rows = [[one.text, one.negative, one.seed] for one in self.prompts]
    texts = hashlib.sha256(json.dumps(rows).encode())
    if self.scorer.encode is not None:
      # Of the judge's own tokenizer too.
      ids = self.scorer.encode([one.text for one in self.prompts])
      texts.update(np.ascontiguousarray(ids, np.int32).tobytes())
    return {
      'scorer': {
        'name': self.scorer.name,
        'sha256': self.scorer.source['sha256'],
        'dtype': self.scorer.source['dtype'],
      },
      'prompts': {'n': len(self.prompts), 'sha256': texts.hexdigest()},
      'sampling': dict(self.settings),
    }

  def score(
    self, params: Mapping[str, types.Params]
  ) -> Float32[np.ndarray, ' n']:
    """Scores of what these whole components draw; all processes call it.

    Raises ValueError naming the first prompt whose score is not finite.
    """
    placed = jax.device_put(
      self.scorer.params, sharding.replicated(self.scorer.mesh)
    )
    scorer = dataclasses.replace(self.scorer, params=placed)
    questions = (
      (self.prompts[row].text, [image])
      for rows, images in self.draw(params)
      for row, image in zip(range(rows.start, rows.stop), images, strict=True)
    )
    scores = np.concatenate(list(scorer.batches(questions)))[:, 0]
    if not np.isfinite(scores).all():
      row = int(np.argmin(np.isfinite(scores)))
      raise ValueError(
        f'eval.scorer: {scorer.name} of {scorer.source["name"]} gives '
        f'{scores[row]} to prompt {row}, {self.prompts[row].text!r:.100}; its '
        'weights may be damaged'
      )
    return scores

  def select(self, workdir: str | os.PathLike) -> best_lib.Selection:
    """For the loop of a run in this folder."""
    about = self.describe()
    start = None

    def score(state):
      nonlocal start
      if start is None:
        start = self._score_start(workdir, about)
      trained = self.complete(state_lib.final_params(state))
      return measure(self.score({**self.start, **trained}), start)

    named = about['scorer'] | {'folder': self.scorer.source['name']}
    return best_lib.Selection(score, about | {'scorer': named})

  def _score_start(self, workdir, about) -> np.ndarray:
    path, record = folders.to_path(workdir) / START, None
    if distributed.is_primary():
      record = json.loads(folders.read_text(path) or 'null')
    record = distributed.from_primary(record)
    if record is not None and record['about'] == about:
      return np.array(record['scores'], np.float32)
    scores = self.score(self.start)
    if distributed.is_primary():
      # Each float32 is a float64, which goes through JSON as it is.
      folders.write_json(path, {'about': about, 'scores': scores.tolist()})
    return scores


def measure(
  scores: Float32[np.ndarray, ' n'], start: Float32[np.ndarray, ' n']
) -> dict[str, float]:
  """Metrics of scores [n], and of those of the start model's pictures.

  eval/score/win_rate_over_start is paired by prompt, a tie counts one half.
  """
  return {
    best_lib.MEDIAN: float(np.median(scores)),
    f'{best_lib.GROUP}mean': float(np.mean(scores, dtype=np.float64)),
    f'{best_lib.GROUP}start_median': float(np.median(start)),
    f'{best_lib.GROUP}win_rate_over_start': float(
      np.mean(stats.wins(scores, start))
    ),
  }


class Chosen(NamedTuple):
  """What is exported: trained parameters on the host, and of which step.

  `record`: `step`, `of` so many, `by` 'last' or 'best', and `best`, what
  best.json says or None.
  """

  params: types.Params
  record: dict[str, Any]


def choose(
  state: state_lib.TrainState,
  best: Mapping[str, Any] | None,
  *,
  by: str,
  workdir: str | os.PathLike,
) -> Chosen:
  """The last state's, or those of the best step's checkpoint.

  All processes call it. Raises ValueError where that checkpoint cannot be read.
  """
  last = int(state.step)
  step = best['step'] if by == 'best' else last
  record = {'step': step, 'of': last, 'by': by, 'best': best}
  if step == last:
    params = state_lib.final_params(state)
    return Chosen(jax.tree.map(trees.fetch, params), record)
  try:
    params, _ = checkpoint.restore_params(workdir, step=step)
  except ValueError as error:
    raise ValueError(
      f'{error}; to export the last step instead, give the same command with '
      '--config.export.select=last'
    ) from error
  return Chosen(params, record)
