"""The whole sampler beside PyTorch diffusers, from the same latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import build
from dpo_jax import keys as keys_lib
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.evaluate import generate
from dpo_jax.weights import pipeline

PROMPTS = ['red apple', 'a cat with a very long caption that says more']


def test_export_opens_in_diffusers_and_draws_the_same_image(
  tiny_folder, tmp_path
):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  parts = pipeline.load(tiny_folder)
  params = dict(parts.params)
  params['unet'] = jax.tree.map(lambda leaf: leaf * 1.01, params['unet'])
  out = tmp_path / 'export'
  pipeline.save(out, base=tiny_folder, params={'unet': params['unet']})

  model = build.make_model(parts, dtype='float32', remat='none')
  tokenizer = tokenizer_lib.load(out / 'tokenizer')
  sample_fn = generate.make_sample_fn(
    model, resolution=16, sampler='ddim', num_steps=5, guidance_scale=3.0
  )
  keys = jax.random.split(jax.random.key(5), len(PROMPTS))
  ours = np.asarray(
    sample_fn(
      jax.tree.map(jnp.asarray, params),
      tokenizer.encode(PROMPTS)[0],
      tokenizer.encode([''])[0][0],
      keys,
    )
  )

  theirs = diffusers.StableDiffusionPipeline.from_pretrained(out)
  theirs.set_progress_bar_config(disable=True)
  noise = np.asarray(keys_lib.normal(keys, model.latent_shape(16)))
  images = theirs(
    PROMPTS,
    latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
    num_inference_steps=5,
    guidance_scale=3.0,
    height=16,
    width=16,
    output_type='np',
  ).images
  wanted = np.round(images * 255).astype(int)
  assert ours.std() > 5, 'a flat picture would prove nothing'
  difference = np.abs(ours.astype(int) - wanted)
  assert difference.max() <= 1
  assert (difference == 0).mean() > 0.98


def test_bfloat16_compute_stays_near_float32(tiny_folder):
  parts = pipeline.load(tiny_folder)
  outputs = []
  for dtype in ('float32', 'bfloat16'):
    model = build.make_model(parts, dtype=dtype, remat='none')
    rng = np.random.default_rng(0)
    outputs.append(
      np.asarray(
        model.apply_unet(
          parts.params['unet'],
          rng.standard_normal((2, 4, 4, 4), np.float32),
          np.array([10, 900]),
          rng.standard_normal((2, 16, 16), np.float32),
        ),
        np.float32,
      )
    )
  scale = outputs[0].std()
  assert np.abs(outputs[0] - outputs[1]).max() < 0.1 * scale
