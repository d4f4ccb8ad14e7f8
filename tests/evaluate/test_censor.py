"""Guided sampling of whole models: identities, drivers, and what fits."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reward_folder
from flax import linen as nn

from dpo_jax import keys as keys_lib
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.diffusion import reward_guidance, samplers, schedule
from dpo_jax.evaluate import censor, generate
from dpo_jax.models import pixels, reward, vae

N = 4
SCHEDULER = {
  '_class_name': 'DDIMScheduler',
  'beta_schedule': 'linear',
  'num_train_timesteps': 1000,
  'clip_sample': False,
  'prediction_type': 'epsilon',
}
VAE = vae.VAEConfig(
  block_out_channels=(8,),
  down_block_types=('DownEncoderBlock2D',),
  up_block_types=('UpDecoderBlock2D',),
  norm_num_groups=4,
)


class Slight(nn.Module):
  """A denoiser that compiles in no time."""

  features: int
  remat: str = 'none'

  @nn.compact
  def __call__(self, x, t):
    return jnp.tanh(nn.Conv(self.features, (3, 3))(x)) * (1 + t.mean() / 1e3)


def _setup(decoder, channels, side, config, members):
  model = sd_lib.StableDiffusion(
    unet=Slight(channels),
    vae=decoder,
    text_encoders={},
    schedule=schedule.from_config(SCHEDULER),
    scheduler_config=SCHEDULER,
    scaling_factor=0.7 if channels == 4 else 1.0,
    latent_channels=channels,
    downscale=2 if channels == 4 else 1,
  )
  x, t = jnp.zeros((1, side, side, channels)), jnp.zeros(1)
  params = {
    'unet': model.unet.init(jax.random.key(1), x, t)['params'],
    'vae': {},
    'reward': members,
  }
  if channels == 4:
    init = functools.partial(decoder.init, method='decode')
    shapes = jax.eval_shape(init, jax.random.key(2), x)['params']
    rng = np.random.default_rng(0)
    params['vae'] = jax.tree.map(
      lambda leaf: np.float32(0.2 * rng.normal(size=leaf.shape)), shapes
    )
  empty = np.zeros((N, 0, 1), np.int32)
  batch = {'input_ids': empty, 'uncond_ids': empty}
  batch['keys'] = jax.random.split(jax.random.key(0), N)
  return model, config, params, batch


@pytest.fixture(scope='module')
def pixel_setup():
  return _setup(pixels.Pixels(1), 1, 8, *reward_folder.make('time', 1, count=1))


@pytest.fixture(scope='module')
def latent_setup():
  made = reward_folder.make('clean', 3, count=1)
  return _setup(vae.AutoencoderKL(VAE), 4, 4, *made)


def _settings(side, **options):
  given = {'sampler': 'ddpm', 'num_steps': 3, 'guidance_scale': 1.0}
  return generate.Settings(size=(side, side), **given | options)


def _pixel_sample(setup, guidance, *, driver='scan', recurrence=1):
  model, config, params, batch = setup
  made = censor.Censor(config, False, guidance, recurrence)
  sample_fn = generate.make_sample_fn(
    model, _settings(8), censor=made, driver=driver
  )
  return sample_fn, params, batch


def test_a_reward_that_says_nothing_is_bitwise_the_plain_sampler(pixel_setup):
  model, _, params, batch = pixel_setup
  plain = generate.make_sample_fn(model, _settings(8))(params, batch)
  for driver in generate.DRIVERS:
    sample_fn, *given = _pixel_sample(
      pixel_setup, reward_guidance.Settings(0.0), driver=driver
    )
    found = sample_fn(*given)
    np.testing.assert_array_equal(found['images'], plain)
    assert found['log_reward'].shape == (N,)


def test_drivers_agree_and_a_picture_does_not_hang_on_its_batch(pixel_setup):
  guidance = reward_guidance.Settings(2.0, backward_steps=1)
  found = {}
  for driver in generate.DRIVERS:
    sample_fn, params, batch = _pixel_sample(
      pixel_setup, guidance, driver=driver, recurrence=2
    )
    found[driver] = jax.device_get(sample_fn(params, batch))
  scan, python = found['scan'], found['python']
  apart = scan['images'].astype(int) - python['images'].astype(int)
  assert np.abs(apart).max() <= 1
  # The score is that of the picture as it is saved, of 256 levels.
  np.testing.assert_allclose(
    scan['log_reward'], python['log_reward'], atol=0.02
  )
  order = np.array([2, 0, 0, 0])
  other = sample_fn(params, {name: leaf[order] for name, leaf in batch.items()})
  apart = python['images'][2].astype(int) - np.asarray(other['images'][0], int)
  assert np.abs(apart).max() <= 1
  # Four pictures of four keys.
  assert np.abs(python['images'][2].astype(int) - python['images'][3]).max() > 9


def test_before_its_start_a_reward_steers_nothing(pixel_setup):
  """Steps at t = 999, 749 and 500 are plain, that at 250 is guided: by hand."""
  model, config, params, batch = pixel_setup
  guidance = reward_guidance.Settings(5.0)
  settings = _settings(8, num_steps=4, sampler='dpmpp_2m')
  made = censor.Censor(config, False, guidance, start=0.5)
  plan = samplers.make_plan(SCHEDULER, 4, sampler='dpmpp_2m')
  assert plan.rows.t.tolist() == [999, 749, 500, 250]
  assert made.first_step(plan.rows.t, 1000) == 3
  plain = model.make_denoise_fn(params['unet'], {}, {}, guidance_scale=1.0)
  guided = reward_guidance.guide(
    plain, made.make_log_reward_fn(model, params), plan, guidance
  )

  @jax.jit
  def by_hand(noise):
    carry, places = samplers.start(noise), samplers.places(plan)
    for i, denoise_fn in enumerate((plain, plain, plain, guided)):
      place = jax.tree.map(lambda column, i=i: column[i], places)
      carry = samplers.make_step(plan, denoise_fn)(carry, place)
    return sd_lib.to_uint8(model.decode_latents({}, carry.state))

  noise = keys_lib.normal(batch['keys'], (8, 8, 1))
  wanted = np.asarray(by_hand(noise), int)
  for driver in generate.DRIVERS:
    found = {}
    for start in (0.5, 0.0):
      sample_fn = generate.make_sample_fn(
        model,
        settings,
        censor=dataclasses.replace(made, start=start),
        driver=driver,
      )
      found[start] = np.asarray(sample_fn(params, batch)['images'], int)
    assert np.abs(found[0.5] - wanted).max() <= 1
    assert np.abs(found[0.0] - wanted).max() > 9


def test_a_start_after_the_last_step_is_refused(pixel_setup):
  model, config, *_ = pixel_setup
  late = SCHEDULER | {'timestep_spacing': 'trailing'}
  model = dataclasses.replace(model, scheduler_config=late)
  made = censor.Censor(config, False, reward_guidance.Settings(1.0), start=0.8)
  with pytest.raises(
    ValueError, match=r'start=0\.8 leaves the reward none of 3'
  ):
    generate.make_sample_fn(model, _settings(8), censor=made)


def test_the_slope_goes_through_denoiser_and_decoder(latent_setup):
  """eps moves by sigma times the slope, by hand; remat changes no value."""
  model, config, params, _ = latent_setup
  plan = samplers.make_plan(SCHEDULER, 10, sampler='ddim')
  t = jnp.full(2, int(plan.rows.t[5]))
  alpha, sigma = plan.rows.alpha[5], plan.rows.sigma[5]
  x_t = jax.random.normal(jax.random.key(3), (2, 4, 4, 4))

  def denoise(x, t):
    return model.apply_unet(params['unet'], x, t, {})

  def log_reward(x):
    x_0 = (x - sigma * denoise(x, t)) / alpha
    shown = model.vae.apply(
      {'params': params['vae']}, x_0 / model.scaling_factor, method='decode'
    )
    module = reward.Reward(config)
    return jax.nn.log_sigmoid(
      module.apply({'params': params['reward'][0]}, shown, t)
    ).sum()

  wanted = denoise(x_t, t) - 3.0 * sigma * jax.jit(jax.grad(log_reward))(x_t)
  made = censor.Censor(
    config, True, reward_guidance.Settings(3.0, place='x_0_hat')
  )
  prepared = made.prepare(model)
  assert prepared.unet.remat == prepared.vae.remat == 'full'
  guided = reward_guidance.guide(
    lambda x, t: prepared.apply_unet(params['unet'], x, t, {}),
    made.make_log_reward_fn(prepared, params),
    plan,
    made.guidance,
  )
  found = jax.jit(guided)(x_t, t)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  assert np.abs(found - denoise(x_t, t)).max() > 1e-3


def test_the_driver_hangs_on_the_mesh_alone():
  for platform, wanted in (('cpu', 'python'), ('tpu', 'scan'), ('gpu', 'scan')):
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    assert generate.choose_driver(mesh) == wanted
  with pytest.raises(ValueError, match='scan, python'):
    generate.make_sample_fn(None, _settings(8), driver='loop')


@pytest.mark.parametrize(
  'kind, channels, record, words',
  [
    ('clean', 4, {'space': 'latents', 'size': [4, 4]}, None),
    ('clean', 3, {'space': 'pixels', 'size': [8, 8]}, None),
    ('time', 4, {'space': 'latents', 'size': [4, 4]}, None),
    ('features', 12, {'space': 'pixels', 'size': [8, 8]}, None),
    (
      'features',
      12,
      {'space': 'pixels', 'size': [8, 16]},
      'pixels of 8x16, and --size makes 8x8',
    ),
    ('time', 3, {'space': 'pixels', 'size': [8, 8]}, 'noise is in latents'),
    ('clean', 3, {'space': 'latents'}, 'takes 3 channels, and there are 4'),
    (
      'clean',
      4,
      {'space': 'latents', 'size': [6, 6]},
      'of 6x6, and --size makes 4x4',
    ),
    (
      'time',
      4,
      {'space': 'latents', 'size': [4, 4], 'num_train_timesteps': 10},
      'noise of 10 timesteps, and this model has 1000',
    ),
  ],
)
def test_what_fits_a_latent_model(latent_setup, kind, channels, record, words):
  model = latent_setup[0]
  config, _ = reward_folder.make(kind, channels)
  record = {
    'place': 'x_t' if kind == 'time' else 'x_0_hat',
    'num_train_timesteps': 1000,
    **record,
  }
  if words is None:
    found = censor.decodes(config, record, model, (8, 8))
    assert found == (record['space'] == 'pixels')
  else:
    with pytest.raises(ValueError, match=words):
      censor.decodes(config, record, model, (8, 8))
