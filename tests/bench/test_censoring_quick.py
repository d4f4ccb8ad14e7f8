"""The censoring experiment in small: labels, rewards, guided draws, rejection.

The generator's exact denoiser is known: its pictures are those of a list, and
noise. So no network has to be trained but the rewards.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import censoring_parts, censoring_sampling
from dpo_jax import loading, sharding
from dpo_jax import stable_diffusion as sd_lib

SHARE, SIDE = 0.25, 8


def _sevens():
  """(pictures [n 8 8 1] in [-1, 1], which are crossed): moved, slanted."""
  made, crossed = [], []
  for top, left, slant in itertools.product((0, 1), (0, 1, 2), (2, 3)):
    picture = np.full((SIDE, SIDE), -1.0)
    picture[top, left : left + 5] = 1
    for row in range(7):
      picture[top + row, left + 4 - slant * row // 6] = 1
    made.append(picture)
    crossed.append(False)
    picture = picture.copy()
    picture[top + 3, left : left + 5] = 1
    made.append(picture)
    crossed.append(True)
  return np.stack(made)[..., None], np.array(crossed)


SEVENS, CROSSED = _sevens()


@dataclasses.dataclass(frozen=True, eq=False)
class Exact(sd_lib.StableDiffusion):
  """E[eps | x_t] of the list, crossed ones with the share SHARE."""

  def make_denoise_fn(self, unet_params, cond, uncond, **options):
    del unet_params, cond, uncond, options
    centres = jnp.asarray(SEVENS.reshape(len(SEVENS), -1), jnp.float32)
    weights = jnp.where(CROSSED, SHARE, 1 - SHARE)

    def denoise(x_t, t):
      alpha, sigma = self.schedule.alpha_sigma(t)
      flat = x_t.reshape(len(x_t), -1)
      alpha, sigma = (row.reshape(-1, 1) for row in (alpha, sigma))
      gaps = ((flat[:, None] - alpha[..., None] * centres) ** 2).sum(-1)
      chance = jax.nn.softmax(jnp.log(weights) - gaps / (2 * sigma**2), -1)
      return ((flat - alpha * (chance @ centres)) / sigma).reshape(x_t.shape)

    return denoise


def _find_malign(pictures):
  """Which pictures' nearest one of the list is crossed."""
  flat = pictures.reshape(len(pictures), -1) / 127.5 - 1
  gaps = ((flat[:, None] - SEVENS.reshape(len(SEVENS), -1)) ** 2).sum(-1)
  assert gaps.min(1).max() < 1
  return CROSSED[gaps.argmin(1)]


@pytest.fixture(scope='module')
def world():
  """(model, sampler, pool, labels)."""
  opened = loading.open_model(
    'examples/mnist/architecture',
    mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    dtype='float32',
    random_init=('unet',),
  )
  values = {
    field.name: getattr(opened.model, field.name)
    for field in dataclasses.fields(opened.model)
  }
  model = Exact(**values)
  sampler = censoring_sampling.Sampler(
    model, num_steps=25, batch_size=100, side=SIDE
  )
  pool, _ = sampler({}, np.arange(200), seed=0, arm=censoring_sampling.Arm())
  benign = 1 - _find_malign(pool).astype(np.int32)
  labels = censoring_parts.draw_labels(benign, seed=0, networks=2)
  return model, sampler, pool, labels


def test_few_labels_censor_what_the_generator_draws(world):
  model, sampler, pool, labels = world
  before = _find_malign(pool).mean()
  assert 0.15 < before < 0.35
  numbers = np.arange(100)
  rates = {}
  for which, scale, steps in (('union', 4.0, 300), ('clean', 0.0, 200)):
    members = censoring_sampling.train_networks(
      which, model, pool, labels, num_steps=steps, seed=0
    )
    arm = censoring_sampling.Arm(which, scale)
    if scale:
      pictures, _ = sampler({}, numbers, seed=1, arm=arm, members=members)
    else:
      pictures, _ = sampler({}, np.arange(150), seed=1, arm=arm)
      chosen = censoring_sampling.select(pictures, members, 100, arm.module)
      pictures = pictures[chosen]
    rates[which] = _find_malign(pictures).mean()
  assert len(np.unique(labels.rows)) == 30
  assert rates['union'] < 0.4 * before
  assert rates['clean'] < 0.2 * before
