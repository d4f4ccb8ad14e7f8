"""Trains the style judge of examples/emoji on real pictures only.

  python -m dpo_jax.main --config=configs/emoji_judge.py \
    --workdir=runs/emoji_judge

It never sees a generated picture, and the generator never sees it. Cost and
accuracy on held-out captions: RESULTS.md.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
  """Recipe of the Noto / Twemoji classifier."""
  c = common.get_config()
  c.unlock()
  c.task = 'classify'
  c.data.path = 'examples/emoji/pairs.parquet'
  c.data.holdout = 0.25
  c.data.resolution = 32
  c.data.random_crop = False
  c.optim.lr = 3e-3
  c.optim.schedule = 'cosine'
  c.optim.warmup_steps = 20
  c.train.num_steps = 1500
  c.train.batch_size = 64
  c.train.log_every = 50
  c.train.eval_every = 250
  c.train.checkpoint_every = 500
  c.train.keep = 1
  c.lock()
  return c
