"""Trains the style judge of examples/emoji on real pictures only.

  python -m dpo_jax.main --config=configs/emoji_judge.py \
    --workdir=runs/emoji_judge

It never sees a generated picture, and the generator never sees it. Variants:
`:all` (default) trains on the pictures of all captions, `:holdout` leaves a
quarter of the captions out and logs the accuracy on those (eval/...). The two
styles differ in their palettes, so one branch of it looks at colours, pixel by
pixel. Blur and noise stand in for what a generator does to a picture.
Accuracy: RESULTS.md.
"""

import ml_collections

from configs import common


def get_config(variant: str = 'all') -> ml_collections.ConfigDict:
  """Recipe of the Noto / Twemoji classifier: `all` or `holdout`."""
  if variant not in ('all', 'holdout'):
    raise ValueError(f'variant {variant!r}: allowed are all, holdout')
  c = common.get_config()
  c.unlock()
  c.task = 'classify'
  c.data.path = 'examples/emoji/pairs.parquet'
  c.data.holdout = 0.25 if variant == 'holdout' else 0.0
  c.data.resolution = 32
  c.data.random_crop = False
  c.classifier.widths = (16, 32, 64)
  c.classifier.palette = (32, 32)
  c.classifier.noise = 0.1
  c.classifier.gain = 0.05
  c.classifier.blur = 0.9
  c.classifier.shift = 2
  c.optim.lr = 3e-3
  c.optim.schedule = 'cosine'
  c.optim.warmup_steps = 20
  c.train.num_steps = 2500
  c.train.batch_size = 64
  c.train.log_every = 50
  c.train.eval_every = 250
  c.train.checkpoint_every = 500
  c.train.keep = 1
  c.lock()
  return c
