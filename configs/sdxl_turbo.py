"""Diffusion-DPO of SDXL-Turbo on Pick-a-Pic v2.

  python -m dpo_jax.main --config=configs/sdxl_turbo.py \
    --config.model.folder=DIR --config.data.path='DIR/*.parquet' \
    --workdir=runs/sdxl_turbo --config.mesh.fsdp=8

As configs/sdxl.py, with what the authors' code changes for Turbo: only the
four timesteps that its sampler visits are trained on, 249, 499, 749 and 999,
of the schedule rescaled to end in pure noise (Lin et al., 2023, algorithm 1);
captions are never dropped, since Turbo is sampled without guidance; 512
pixels. Variants:

  :official_code (default), :paper  as configs/sdxl.py.

No number is known to us for this model; nothing was run at full size.
"""

import ml_collections

from configs import sdxl


def get_config(variant: str = 'official_code') -> ml_collections.ConfigDict:
  """Recipe `official_code` (default) or `paper`."""
  if variant not in ('official_code', 'paper'):
    raise ValueError(f'variant {variant!r}: allowed are official_code, paper')
  c = sdxl.get_config(variant)
  c.unlock()
  c.data.resolution = 512
  c.data.prompt_dropout = 0.0
  c.noise.timesteps = (249, 499, 749, 999)
  c.noise.zero_terminal_snr = True
  c.eval.sampler = 'euler_ancestral'
  c.eval.num_steps = 4
  c.eval.guidance_scale = 1.0
  c.lock()
  return c
