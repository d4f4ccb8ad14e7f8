"""A reward as a judge of finished pictures."""

import jax
import numpy as np
import pytest
import reward_folder

from dpo_jax import scoring, sharding
from dpo_jax.models import reward

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


def _open(folder):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return scoring.open_scorer('reward', str(folder), mesh=mesh, batch_size=3)


def _log_reward(kind, shown):
  config, members = reward_folder.make(kind, shown.shape[-1])
  logits = [
    reward.Reward(config).apply({'params': one}, shown, np.zeros(3, np.int32))
    for one in members
  ]
  return reward.log_reward(logits)


def test_pixels_and_latents_are_scored_by_log_r(tiny_pixel_folder, tmp_path):
  shown = PICTURES / np.float32(127.5) - 1
  colour = reward_folder.write(tmp_path / 'c', 'clean', 3, (8, 8), 'pixels')
  found = _open(colour).score(list(PICTURES), [''] * 3)
  wanted = _log_reward('clean', shown)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  # What this generator calls latents are grey pixels.
  source = {'name': str(tiny_pixel_folder), 'revision': ''}
  grey = reward_folder.write(
    tmp_path / 'g', 'time', 1, (8, 8), 'latents', model=source
  )
  found = _open(grey).score(list(PICTURES), [''] * 3)
  wanted = _log_reward('time', shown.mean(-1, keepdims=True))
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_pixels_of_a_latent_model_stay_pixels(tiny_folder, tmp_path):
  source = {'name': str(tiny_folder), 'revision': ''}
  folder = reward_folder.write(
    tmp_path, 'clean', 3, (8, 8), 'pixels', model=source
  )
  found = _open(folder).score(list(PICTURES), [''] * 3)
  wanted = _log_reward('clean', PICTURES / np.float32(127.5) - 1)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_reward_of_what_is_no_square_is_no_judge(tmp_path):
  folder = reward_folder.write(tmp_path, 'clean', 3, (8, 16), 'pixels')
  with pytest.raises(ValueError, match='reads pictures of 8x16; judges are'):
    _open(folder)
