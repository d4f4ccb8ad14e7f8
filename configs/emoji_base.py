"""Pretrains the small Stable Diffusion of examples/emoji from scratch.

Two variants, in this order (both are the same command with --config):

  :vae   the autoencoder, 32x32 pixels to 8x8x4 latents
  :unet  UNet and text encoder on the latents, both styles, all captions

  python -m dpo_jax.main --config=configs/emoji_base.py:vae \
    --workdir=runs/emoji_vae
  python -m dpo_jax.main --config=configs/emoji_base.py:unet \
    --workdir=runs/emoji_unet

Cost and results: RESULTS.md.
"""

import ml_collections

from configs import common


def get_config(variant: str = 'unet') -> ml_collections.ConfigDict:
  """Recipe of the autoencoder (`vae`) or of the denoiser (`unet`)."""
  c = common.get_config()
  c.unlock()
  c.data.path = 'examples/emoji/pairs.parquet'
  c.data.holdout = 0.0
  c.data.resolution = 32
  c.data.random_crop = False
  c.data.prompt_dropout = 0.1
  c.optim.weight_decay = 0.0
  c.optim.schedule = 'cosine'
  c.train.keep = 2
  c.export.dtype = 'float16'
  if variant == 'vae':
    c.task = 'autoencode'
    c.model.folder = 'examples/emoji/architecture'
    c.model.random_init = ('unet', 'vae', 'text_encoder')
    c.vae.kl_weight = 3e-6
    c.optim.lr = 2e-3
    c.optim.warmup_steps = 50
    c.optim.ema_decay = 0.99
    c.train.num_steps = 1500
    c.train.batch_size = 32
    c.train.log_every = 50
    c.train.eval_every = 0
    c.train.checkpoint_every = 250
  elif variant == 'unet':
    c.task = 'denoise'
    c.model.folder = 'runs/emoji_vae/export'
    c.model.random_init = ('unet', 'text_encoder')
    c.optim.lr = 1.5e-3
    c.optim.warmup_steps = 200
    c.optim.ema_decay = 0.999
    c.denoise.min_snr_gamma = 5.0
    # Stopped where retrieval no longer grew, long before the rate is zero.
    c.optim.decay_steps = 9500
    c.train.num_steps = 6000
    c.train.batch_size = 64
    c.train.log_every = 50
    c.train.eval_every = 0
    c.train.checkpoint_every = 500
    c.eval.num_prompts = 640
    c.eval.num_steps = 25
    c.eval.guidance_scale = 2.0
    c.eval.batch_size = 64
    c.eval.judge = 'examples/emoji/judge'
    c.eval.preferred = 'twemoji'
    c.eval.retrieval = True
  else:
    raise ValueError(f'variant {variant!r}: allowed are vae, unet')
  c.lock()
  return c
