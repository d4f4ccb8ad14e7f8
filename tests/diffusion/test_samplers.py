import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.diffusion import guidance, predict, samplers, schedule

MEAN, STD = 0.7, 0.4


def _schedule(**changes):
  return schedule.from_config(
    {
      'beta_schedule': 'linear',
      'num_train_timesteps': 1000,
      'clip_sample': False,
      'timestep_spacing': 'trailing',
    }
    | changes
  )


def _gaussian_denoiser(made):
  """The exact E[eps | x_t] for data N(MEAN, STD^2), and v likewise."""

  def denoise(x_t, t):
    alpha_t, sigma_t = (v[:, None, None, None] for v in made.alpha_sigma(t))
    variance = alpha_t**2 * STD**2 + sigma_t**2
    eps = sigma_t * (x_t - alpha_t * MEAN) / variance
    if made.prediction_type == 'epsilon':
      return eps
    x_0 = (x_t - sigma_t * eps) / alpha_t
    return alpha_t * eps - sigma_t * x_0

  return denoise


def _exact(x_t, made):
  """The probability flow of Gaussian data keeps the quantile of the start."""
  signal = made.alphas_cumprod[-1]
  std = np.sqrt(signal * STD**2 + 1 - signal)
  return MEAN + STD * (x_t - np.sqrt(signal) * MEAN) / std


@pytest.mark.parametrize('prediction_type', ['epsilon', 'v_prediction'])
def test_ddim_converges_at_first_order(prediction_type):
  made = _schedule(prediction_type=prediction_type)
  x_t = jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
  errors = []
  for steps in (25, 50, 100):
    x_0 = samplers.ddim(
      _gaussian_denoiser(made), x_t, schedule=made, num_steps=steps
    )
    errors.append(float(jnp.abs(x_0 - _exact(x_t, made)).max()))
  orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
  assert np.all(orders > 0.7) and errors[-1] < 0.05, (errors, orders)


@pytest.mark.parametrize('name', ['ddpm', 'ddim'])
def test_ancestral_samplers_reproduce_the_data(name):
  made = _schedule()
  key = jax.random.key(1)
  shape = (4096, 2, 2, 1)

  def noise_fn(t):
    return jax.random.normal(jax.random.fold_in(key, t), shape)

  options = {'eta': 1.0} if name == 'ddim' else {}
  x_0 = getattr(samplers, name)(
    _gaussian_denoiser(made),
    jax.random.normal(jax.random.key(2), shape),
    schedule=made,
    num_steps=200,
    noise_fn=noise_fn,
    **options,
  )
  assert float(jnp.mean(x_0)) == pytest.approx(MEAN, abs=0.02)
  assert float(jnp.std(x_0)) == pytest.approx(STD, abs=0.02)


def test_ddpm_posterior_by_hand():
  # One full step from alphas_cumprod 0.5 to 0.8: alpha = 0.625.
  mean, variance = samplers.ddpm_posterior(
    jnp.float32(2.0), jnp.float32(3.0), jnp.float32(0.5), jnp.float32(0.8)
  )
  wanted = np.sqrt(0.8) * 0.375 / 0.5 * 2 + np.sqrt(0.625) * 0.2 / 0.5 * 3
  assert float(mean) == pytest.approx(wanted, rel=1e-6)
  assert float(variance) == pytest.approx(0.2 / 0.5 * 0.375, rel=1e-6)


@pytest.mark.parametrize('spacing', schedule.TIMESTEP_SPACINGS)
@pytest.mark.parametrize('prediction_type', ['epsilon', 'v_prediction'])
def test_ddim_equals_diffusers(spacing, prediction_type):
  diffusers = pytest.importorskip('diffusers')
  torch = pytest.importorskip('torch')
  config = {
    'beta_schedule': 'scaled_linear',
    'beta_start': 0.00085,
    'beta_end': 0.012,
    'clip_sample': False,
    'set_alpha_to_one': False,
    'steps_offset': 1,
    'timestep_spacing': spacing,
    'prediction_type': prediction_type,
  }
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 4, 4, 3), dtype=np.float32)
  weights = rng.standard_normal((3, 3), dtype=np.float32) * 0.3

  def denoise(x_t, t):
    return jnp.tanh(x_t @ weights) + t[:, None, None, None] / 1000

  ours = samplers.ddim(
    denoise, jnp.asarray(x), schedule=schedule.from_config(config), num_steps=7
  )
  theirs = diffusers.DDIMScheduler.from_config(config)
  theirs.set_timesteps(7)
  state = torch.tensor(x)
  for t in theirs.timesteps:
    output = torch.tanh(state @ torch.tensor(weights)) + t / 1000
    state = theirs.step(output, t, state).prev_sample
  np.testing.assert_allclose(ours, state.numpy(), rtol=1e-5, atol=2e-5)


def test_ddim_with_eta_needs_noise():
  with pytest.raises(ValueError, match='noise_fn'):
    samplers.ddim(
      lambda x, t: x,
      jnp.zeros((1, 1, 1, 1)),
      schedule=_schedule(),
      num_steps=2,
      eta=0.5,
    )


def test_clipping_bounds_the_result():
  made = _schedule(clip_sample=True, clip_sample_range=0.1)
  x_0 = samplers.ddim(
    lambda x, t: jnp.zeros_like(x),
    10 * jnp.ones((1, 2, 2, 1)),
    schedule=made,
    num_steps=3,
  )
  assert float(jnp.abs(x_0).max()) <= 0.1 + 1e-6


def test_conversions_invert_each_other():
  rng = np.random.default_rng(1)
  x_0, eps = rng.standard_normal((2, 5, 1, 1, 2)).astype(np.float32)
  alpha_t, sigma_t = np.float32(0.6), np.float32(0.8)
  x_t = alpha_t * x_0 + sigma_t * eps
  for kind in schedule.PREDICTION_TYPES:
    target = predict.training_target(
      x_0, eps, alpha_t, sigma_t, prediction_type=kind
    )
    options = {'prediction_type': kind}
    np.testing.assert_allclose(
      predict.to_eps(target, x_t, alpha_t, sigma_t, **options), eps, atol=1e-6
    )
    np.testing.assert_allclose(
      predict.to_x_0(target, x_t, alpha_t, sigma_t, **options), x_0, atol=1e-6
    )
  for function in (predict.to_eps, predict.to_x_0):
    with pytest.raises(ValueError, match='flow'):
      function(x_0, x_t, alpha_t, sigma_t, prediction_type='flow')


def test_guidance_by_hand_and_off():
  calls = []

  def apply_fn(x_t, t, embeds):
    calls.append(len(x_t))
    return x_t * embeds[:, :1, :1, None]

  cond, uncond = jnp.full((2, 1, 1), 3.0), jnp.full((2, 1, 1), 1.0)
  x_t, t = jnp.ones((2, 1, 1, 1)), jnp.zeros((2,), jnp.int32)
  guided = guidance.classifier_free(apply_fn, cond, uncond, guidance_scale=2.5)
  np.testing.assert_allclose(guided(x_t, t), 1 + 2.5 * 2)
  plain = guidance.classifier_free(apply_fn, cond, uncond, guidance_scale=1.0)
  np.testing.assert_allclose(plain(x_t, t), 3.0)
  assert calls == [4, 2]
