"""Aligns a pixel model away from what few labels call malign.

Its data are pairs that cross all benign with all malign pictures, as
benchmarks/censoring.py writes them. Yoon et al., 2023, leave the generator as
it is; these are the same labels as training data: Wallace et al., 2024, eq. 14
(`:dpo`), with DUO's term that holds the rest (Park et al., 2024; `:duo`), and
Diffusion-KTO (Li et al., 2024; `:kto`), which takes both pictures of a pair.

  python -m dpo_jax.main --config=configs/censoring.py:dpo --workdir=runs/kept \
    --config.model.folder=runs/mnist/export --config.data.path=pairs.parquet
"""

import ml_collections

from configs import common

# Numbers of the objective, steps, rate. The pictures that are trained on are
# few: with 150 steps dpo draws nothing malign, far from the data.
VARIANTS = {
  'dpo': ({'beta': 2000.0}, 30, 5e-5),
  'duo': ({'beta': 2000.0, 'weight': 1e5}, 60, 5e-5),
  'kto': (
    {'beta': 1000.0, 'weight_liked': 1.0, 'weight_disliked': 1.0},
    60,
    1e-4,
  ),
}


def get_config(variant: str = 'dpo') -> ml_collections.ConfigDict:
  """Recipe `dpo` (default), `duo` or `kto`."""
  if variant not in VARIANTS:
    raise ValueError(f'variant {variant!r}: allowed are {", ".join(VARIANTS)}')
  c = common.get_config()
  c.unlock()
  c.data.holdout = 0.0
  c.data.resolution = 28
  c.data.random_crop = False
  c.data.prompt_dropout = 0.0
  c.objective.name = variant
  numbers, steps, rate = VARIANTS[variant]
  c.objective.numbers = ml_collections.ConfigDict(numbers)
  c.objective.reward_beta = numbers['beta']
  c.optim.lr = rate
  c.optim.warmup_steps = 5
  c.train.num_steps = steps
  c.train.batch_size = 16
  c.train.eval_every = 0
  c.train.checkpoint_every = 150
  c.eval.num_prompts = 1
  c.eval.num_pairs = 16
  c.eval.num_draws = 1
  c.eval.num_steps = 10
  c.eval.guidance_scale = 1.0
  c.eval.batch_size = 16
  c.lock()
  return c
