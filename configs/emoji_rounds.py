"""A round of dpo_jax.tools.rounds on the emoji model: its own pictures.

  python -m benchmarks.closed_loop --workdir=runs/closed_loop

Pairs are the best and the worst of four pictures of a caption by a style
classifier, instead of two real pictures by construction; everything else is
configs/quickstart.py. Variants: `dpo` (default), and `sft` on the winners
alone, for comparison. Cost and expected numbers: RESULTS.md.
"""

import ml_collections

from configs import quickstart


def get_config(variant: str = 'dpo') -> ml_collections.ConfigDict:
  """Recipe `dpo` (default) or `sft`."""
  c = quickstart.get_config(variant)
  c.unlock()
  # tools.rounds names each round's pairs.
  c.data.path = ''
  # Only for the curves of the run: rounds are compared on other captions. The
  # captions that are drawn are those whose hash is above quickstart's 0.36, so
  # this holds out an eleventh of them.
  c.data.holdout = 0.42
  c.eval.num_prompts = 32
  c.eval.num_draws = 2
  # These are in the hands of the round's own comparison.
  c.eval.judge = ''
  c.eval.preferred = ''
  c.eval.retrieval = False
  c.lock()
  return c
