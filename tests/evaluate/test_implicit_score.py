"""The policy's own reward as a scorer."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import loading, scoring, sharding
from dpo_jax.data import images as images_lib
from dpo_jax.data import pairs
from dpo_jax.weights import safetensors_io

BASE = 'examples/emoji/model'


def mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def policy(tmp_path_factory):
  """A UNet folder whose last layer says three quarters of the base's."""
  folder = tmp_path_factory.mktemp('policy') / 'unet'
  shutil.copytree(f'{BASE}/unet', folder)
  path = folder / 'diffusion_pytorch_model.safetensors'
  tensors = {
    name: np.array(tensor, np.float32)
    for name, tensor in safetensors_io.load(path).items()
  }
  tensors['conv_out.weight'] *= 0.75
  tensors['conv_out.bias'] *= 0.75
  safetensors_io.save(path, tensors)
  return str(folder)


@pytest.fixture(scope='module')
def pictures():
  images = pairs.read_images(['examples/emoji/pairs.parquet'])
  chosen = [0, 1, 400, 401]
  return (
    [images_lib.decode(images.images[i]) for i in chosen],
    [images.captions[i] for i in chosen],
  )


def open_implicit(weights, batch_size=2):
  return scoring.open_scorer(
    'implicit', f'{BASE}:{weights}', mesh=mesh(), batch_size=batch_size
  )


def test_a_policy_that_is_the_base_has_no_reward(pictures):
  scorer = open_implicit(BASE)
  np.testing.assert_array_equal(scorer.score(*pictures), np.zeros(4))


def test_the_mean_difference_of_errors(policy, pictures):
  """Against other draws of noise and timesteps, all at random."""
  scorer = open_implicit(policy)
  found = scorer.score(*pictures)
  opened = loading.open_model(BASE, mesh=mesh(), dtype='float32')
  trained = loading.load_weights(policy, opened)['unet']
  model, rng, draws = opened.model, np.random.default_rng(0), 256
  alphas = jnp.sqrt(model.schedule.alphas_cumprod)
  sigmas = jnp.sqrt(1 - model.schedule.alphas_cumprod)
  x_0 = model.encode_images(
    opened.params['vae'],
    jnp.stack(pictures[0]) / 127.5 - 1,
    jnp.zeros((4, *model.latent_shape(32))),
  )
  cond = model.encode_text(
    opened.params, opened.tokenizers.encode(pictures[1])[0]
  )

  @jax.jit
  def differences(i, t, eps):
    x_t = (
      alphas[t][:, None, None, None] * x_0[i]
      + sigmas[t][:, None, None, None] * eps
    )
    states = {
      name: jnp.repeat(v[i][None], draws, 0) for name, v in cond.items()
    }

    def err(unet):
      output = model.apply_unet(unet, x_t, t, states)
      return jnp.mean(jnp.square(output - eps), (1, 2, 3))

    return err(opened.params['unet']) - err(trained)

  for i in range(4):
    t = rng.integers(0, 1000, draws)
    eps = rng.normal(size=(draws, *x_0.shape[1:])).astype(np.float32)
    values = np.asarray(differences(i, t, eps))
    # Of 8 draws, one in each eighth, at most as noisy as 8 free ones.
    error = values.std() * (1 / 8 + 1 / draws) ** 0.5
    assert abs(found[i] - values.mean()) < 3 * error
    assert values.mean() < -error


def test_draws_belong_to_the_caption_alone(policy, pictures):
  images, captions = pictures
  scorer = open_implicit(policy, batch_size=4)
  whole = scorer.score(images, captions)
  turned = scorer.score(images[::-1], captions[::-1])[::-1]
  np.testing.assert_allclose(turned, whole, rtol=1e-4)
  pair = next(iter(scorer.batches([(captions[0], images[:2])])))
  np.testing.assert_allclose(pair[0, 0], whole[0], rtol=1e-4)
  other = scorer.score(images[:1], ['something else'])
  assert abs(other[0] - whole[0]) > 1e-3 * abs(whole[0])


def test_what_is_wrong_is_said(tmp_path, policy):
  with pytest.raises(ValueError, match='give BASE:WEIGHTS'):
    scoring.open_scorer('implicit', 'runs', mesh=mesh())
  with pytest.raises(ValueError, match="neither a run's workdir"):
    open_implicit(tmp_path)
  model = tmp_path / 'model'
  shutil.copytree(BASE, model)
  config = json.loads((model / 'unet' / 'config.json').read_text())
  del config['sample_size']
  (model / 'unet' / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='names no square sample_size'):
    scoring.open_scorer('implicit', f'{model}:{policy}', mesh=mesh())
