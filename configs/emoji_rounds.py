"""A round of dpo_jax.tools.rounds on the emoji model: its own pictures.

  python -m benchmarks.closed_loop --workdir=runs/closed_loop

Pairs are the best and the worst of four pictures of a caption by a style
classifier, instead of two real pictures by construction. No winner is better
than what the model draws already, so that captions are lost sooner than with
configs/quickstart.py: SDPO's safeguard of the winner and fewer steps keep them.
Both were chosen on the captions that are trained on, by the labeller and by
retrieval (RESULTS.md). Variants: `dpo` (default), and `sft` on the winners
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
  c.train.num_steps = 100
  c.train.eval_every = 50
  if variant == 'dpo':
    c.objective.safeguard = 0.9
  # These are in the hands of the round's own comparison.
  c.eval.judge = ''
  c.eval.preferred = ''
  c.eval.retrieval = False
  c.lock()
  return c
