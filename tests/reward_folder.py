"""Tiny rewards with random weights, as tests write them."""

import jax
import numpy as np

from dpo_jax.models import reward
from dpo_jax.weights import rewards

RECORD = {
  'model': None,
  'num_train_timesteps': 1000,
  'labels': {'benign': 4, 'malign': 3},
}


def make(kind, channels, *, count=2):
  """(config, members), whose logits are about 1 wide."""
  config = reward.RewardConfig(
    kind, channels, widths=(8, 8), num_heads=2, norm_num_groups=4
  )
  rng = np.random.default_rng(0)

  def draw(leaf):
    width = np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 2.0
    return rng.normal(size=leaf.shape).astype(np.float32) / np.float32(width)

  members = [
    jax.tree.map(draw, rewards.init_shapes(config)) for _ in range(count)
  ]
  return config, members


def write(folder, kind, channels, size, space, *, count=2, **more):
  """Writes one for inputs [h w channels] of a size; returns the folder."""
  config, members = make(kind, channels, count=count)
  record = RECORD | {
    'size': list(size),
    'space': space,
    'place': 'x_t' if kind == 'time' else 'x_0_hat',
  }
  record |= more
  rewards.save(folder, config=config, members=members, record=record)
  return folder
