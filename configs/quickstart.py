"""Diffusion-DPO on the emoji pairs of examples/emoji, in minutes on a CPU.

  make quickstart

Two styles draw each thing, and one is preferred. Method: Wallace et al., CVPR
2024, eq. 14, as configs/sd15.py; batch, rate and beta are smaller because a
latent here has 256 numbers and not 16,384. Variants: `:sft` trains on the
winners alone, for comparison. Cost and expected numbers: RESULTS.md.
"""

import ml_collections

from configs import common


def get_config(variant: str = 'dpo') -> ml_collections.ConfigDict:
  """Recipe `dpo` (default) or `sft`."""
  c = common.get_config()
  c.unlock()
  c.model.folder = 'examples/emoji/model'
  c.data.path = 'examples/emoji/pairs.parquet'
  c.data.holdout = 0.36
  c.data.resolution = 32
  c.data.random_crop = False
  # As for SDXL-Turbo in the authors' launchers: guidance then works against a
  # branch without caption that keeps both styles.
  c.data.prompt_dropout = 0.0
  c.objective.numbers.beta = 900.0
  c.objective.reward_beta = 900.0
  c.optim.lr = 6e-5
  c.optim.ema_decay = 0.95
  c.optim.warmup_steps = 10
  c.train.num_steps = 250
  c.train.batch_size = 32
  c.train.log_every = 5
  c.train.eval_every = 125
  c.train.checkpoint_every = 25
  c.eval.num_prompts = 220
  c.eval.num_steps = 25
  c.eval.guidance_scale = 2.0
  c.eval.batch_size = 64
  c.eval.num_draws = 4
  c.eval.judge = 'examples/emoji/judge'
  c.eval.preferred = 'twemoji'
  c.eval.retrieval = True
  c.export.dtype = 'float16'
  if variant == 'sft':
    c.objective.name = 'sft'
    c.objective.numbers = ml_collections.ConfigDict()
  elif variant != 'dpo':
    raise ValueError(f'variant {variant!r}: allowed are dpo, sft')
  c.lock()
  return c
