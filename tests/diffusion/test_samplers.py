"""Samplers on data with a closed-form denoiser; plans and their errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.diffusion import predict, samplers, schedule

MEAN, STD = 0.7, 0.4
CONFIG = {
  'beta_schedule': 'linear',
  'clip_sample': False,
  'timestep_spacing': 'trailing',
}


def _gaussian_denoiser(config):
  """The exact E[eps | x_t] for data N(MEAN, STD^2), or v; any float t."""
  made = schedule.from_config(config, sampler='euler')
  table = np.sqrt(1 / np.float64(made.alphas_cumprod) - 1)

  def denoise(x_t, t):
    edm_sigma = jnp.interp(t.astype(jnp.float32), np.arange(len(table)), table)[
      :, None, None, None
    ]
    alpha_t = 1 / jnp.sqrt(edm_sigma**2 + 1)
    sigma_t = edm_sigma * alpha_t
    variance = alpha_t**2 * STD**2 + sigma_t**2
    eps = sigma_t * (x_t - alpha_t * MEAN) / variance
    if made.prediction_type == 'epsilon':
      return eps
    # Not by way of x_0 / alpha_t: with zero terminal SNR alpha_t may be 0.
    x_0 = MEAN + alpha_t * STD**2 * (x_t - alpha_t * MEAN) / variance
    return alpha_t * eps - sigma_t * x_0

  return denoise


def _even_log_snr(total=2400):
  """A file whose log(alpha / sigma) falls evenly from 3 to -3."""
  log_ratio = np.linspace(3.0, -3.0, total)
  alphas_cumprod = 1 / (1 + np.exp(-2 * log_ratio))
  before = np.concatenate([[1.0], alphas_cumprod[:-1]])
  return {
    'trained_betas': (1 - alphas_cumprod / before).tolist(),
    'num_train_timesteps': total,
    'clip_sample': False,
    'set_alpha_to_one': False,
    'timestep_spacing': 'linspace',
    'final_sigmas_type': 'sigma_min',
  }


def _flow(x, before, after):
  """Where the probability flow takes x_t: it keeps the quantile.

  before, after: alphas_cumprod; all of the state in x_t.
  """
  std = [np.sqrt(signal * STD**2 + 1 - signal) for signal in (before, after)]
  quantile = (x - np.sqrt(before) * MEAN) / std[0]
  return np.sqrt(after) * MEAN + std[1] * quantile


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize(
  ('sampler', 'order'), [('ddim', 1), ('euler', 1), ('dpmpp_2m', 2)]
)
def test_order_of_convergence(sampler, order, kind):
  config = _even_log_snr() | {'prediction_type': kind}
  levels = schedule.from_config(config).alphas_cumprod
  x_t = np.random.default_rng(0).standard_normal((64, 2, 2, 1))
  errors = []
  for steps in (50, 100, 200):
    plan = samplers.make_plan(config, steps, sampler=sampler)
    begin = levels[plan.rows.t[0].astype(int)]
    end = levels[0]
    scale = plan.rows.scale[0]
    state = jnp.asarray(x_t / scale, jnp.float32)
    result = samplers.sample(plan, _gaussian_denoiser(config), state)
    # The Euler state at the end is in edm_sigma too.
    if sampler == 'euler':
      result = result * np.sqrt(end)
    errors.append(float(jnp.abs(result - _flow(x_t, begin, end)).max()))
  orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
  assert np.all(np.abs(orders - order) < 0.25), (errors, orders)


@pytest.mark.parametrize('snr', [False, True])
@pytest.mark.parametrize('sampler', ['ddpm', 'ddim', 'euler_ancestral'])
def test_ancestral_samplers_reproduce_the_data(sampler, snr):
  config = CONFIG | {
    'rescale_betas_zero_snr': snr,
    'prediction_type': 'v_prediction' if snr else 'epsilon',
  }
  shape = (4096, 2, 2, 1)
  plan = samplers.make_plan(
    config, 200, sampler=sampler, eta=1.0 if sampler == 'ddim' else 0.0
  )

  def noise_fn(i):
    return jax.random.normal(jax.random.fold_in(jax.random.key(1), i), shape)

  eps = jax.random.normal(jax.random.key(2), shape)
  x_0 = samplers.sample(
    plan, _gaussian_denoiser(config), plan.from_noise(eps), noise_fn=noise_fn
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


def _linear_denoiser(x_t, t):
  return jnp.tanh(0.5 * x_t) + t[:, None, None, None] / 1000


def _draws(seed, count=1):
  shape = (count, 2, 4, 4, 1)
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_one_scan_one_network_call_and_no_loop_over_steps(sampler):
  plan = samplers.make_plan(CONFIG, 20, sampler=sampler)
  calls = []

  def denoise(x_t, t):
    calls.append((x_t.dtype, t.dtype))
    return _linear_denoiser(x_t, t)

  run = functools.partial(
    samplers.sample,
    plan,
    denoise,
    noise_fn=_draws(0, 20).__getitem__,
  )
  jaxpr = jax.make_jaxpr(run)(jnp.zeros((2, 4, 4, 1)))
  scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan']
  assert len(scans) == 1 and scans[0].params['length'] == 20
  assert len(calls) == 1
  fractional = sampler.startswith('euler')
  assert calls[0] == (jnp.float32, jnp.float32 if fractional else jnp.int32)


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_hand_over_goes_on_where_the_first_part_ended(sampler):
  make = functools.partial(samplers.make_plan, CONFIG, 10, sampler=sampler)
  run = functools.partial(samplers.sample, noise_fn=_draws(0, 10).__getitem__)
  whole, base, refiner = make(), make(end=0.8), make(start=0.8)
  assert (base.num_steps, refiner.num_steps) == (8, 2)
  state = whole.from_noise(_draws(1)[0])
  parts = run(refiner, _linear_denoiser, run(base, _linear_denoiser, state))
  wanted = run(whole, _linear_denoiser, state)
  gap = float(jnp.abs(parts - wanted).max() / jnp.abs(wanted).max())
  if sampler == 'dpmpp_2m':
    # The second part starts again at first order.
    assert 1e-5 < gap < 0.1
  else:
    assert gap < 1e-6


@pytest.mark.parametrize('sampler', ['ddpm', 'euler_ancestral'])
def test_noise_is_counted_over_the_whole_range(sampler):
  plan = samplers.make_plan(CONFIG, 10, sampler=sampler, strength=0.4)
  np.testing.assert_array_equal(plan.rows.index, [6, 7, 8, 9])


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_an_image_is_found_again_from_little_noise(sampler):
  plan = samplers.make_plan(CONFIG, 1000, sampler=sampler, strength=0.01)
  x_0 = MEAN + STD * _draws(0)[0]
  state = plan.from_image(x_0, _draws(1)[0])
  result = samplers.sample(
    plan,
    _gaussian_denoiser(CONFIG),
    state,
    noise_fn=_draws(2, 1000).__getitem__,
  )
  # alphas_cumprod[9] is 0.998: a noise of 0.045 against a spread of 0.4.
  assert float(jnp.sqrt(jnp.mean((result - x_0) ** 2))) < 0.07


def test_clipping_bounds_the_result():
  config = CONFIG | {'clip_sample': True, 'clip_sample_range': 0.1}
  x_0 = samplers.sample(
    samplers.make_plan(config, 3, sampler='ddim'),
    lambda x_t, t: jnp.zeros_like(x_t),
    10 * jnp.ones((1, 2, 2, 1)),
  )
  assert float(jnp.abs(x_0).max()) <= 0.1 + 1e-6


def test_turbo_takes_its_four_timesteps():
  # Sauer et al., 2023: t in {249, 499, 749, 999}.
  config = CONFIG | {'beta_schedule': 'scaled_linear', 'steps_offset': 1}
  plan = samplers.make_plan(config, 4, sampler='euler_ancestral')
  np.testing.assert_array_equal(plan.rows.t, [999, 749, 499, 249])
  plan = samplers.make_plan(config, 1, sampler='euler_ancestral')
  np.testing.assert_array_equal(plan.rows.t, [999])


@pytest.mark.parametrize('num_steps', [61, 487, 1000])
def test_trailing_spacing_never_has_one_timestep_too_many(num_steps):
  # 1000 / (1000 / 61) is above 61 in float64.
  plan = samplers.make_plan(CONFIG, num_steps, sampler='ddim')
  assert plan.num_steps == num_steps and plan.rows.t[-1] >= 0


def test_karras_argument_goes_before_the_file():
  on = CONFIG | {'use_karras_sigmas': True}
  make = functools.partial(samplers.make_plan, num_steps=6, sampler='euler')
  for plan, wanted in (
    (make(CONFIG, karras=True), make(on)),
    (make(on, karras=False), make(CONFIG)),
  ):
    np.testing.assert_array_equal(plan.rows.t, wanted.rows.t)
  assert not np.array_equal(make(on).rows.t, make(CONFIG).rows.t)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'num_steps': 0}, 'num_steps=0'),
    ({'num_steps': 1001}, 'num_steps=1001'),
    ({'eta': 0.5, 'sampler': 'euler'}, "eta=0.5.*'euler'"),
    ({'eta': 1.5}, 'eta=1.5'),
    ({'karras': True}, "karras=True.*'ddim'"),
    ({'karras': True, 'sampler': 'euler_ancestral'}, 'karras=True'),
    ({'strength': 0.0}, 'strength=0.0'),
    ({'strength': 1.1}, 'strength=1.1'),
    ({'strength': 0.05}, 'leave none of 10 steps'),
    ({'start': 0.99}, 'leave none of 10 steps'),
    ({'start': 0.5, 'end': 0.4}, 'start=0.5 and end=0.4'),
    ({'start': 0.5, 'end': 0.5}, 'start=0.5 and end=0.5'),
    ({'end': 1.2}, 'end=1.2'),
    ({'start': 0.5, 'strength': 0.5}, 'give one of them'),
    ({'strength': 0.2, 'end': 0.5}, 'leave none of 10 steps'),
  ],
)
def test_impossible_plans_are_refused(changes, words):
  arguments = {'num_steps': 10, 'sampler': 'ddim'} | changes
  with pytest.raises(ValueError, match=words):
    samplers.make_plan(CONFIG, **arguments)


@pytest.mark.parametrize(
  ('sampler', 'num_steps', 'changes'),
  [
    ('ddim', 1000, {'timestep_spacing': 'leading', 'steps_offset': 1}),
    ('euler', 1000, {'timestep_spacing': 'leading', 'steps_offset': 1}),
    ('dpmpp_2m', 1000, {'timestep_spacing': 'leading'}),
    ('dpmpp_2m', 1000, {'timestep_spacing': 'linspace'}),
  ],
)
def test_too_many_steps_are_refused(sampler, num_steps, changes):
  # diffusers leaves the schedule or repeats a timestep (and divides by 0).
  with pytest.raises(ValueError, match='use fewer steps'):
    samplers.make_plan(CONFIG | changes, num_steps, sampler=sampler)


@pytest.mark.parametrize('sampler', ['ddim', 'ddpm'])
def test_epsilon_at_zero_snr_is_refused(sampler):
  config = CONFIG | {'rescale_betas_zero_snr': True}
  with pytest.raises(ValueError, match='cannot start at timestep 999'):
    samplers.make_plan(config, 10, sampler=sampler)
  samplers.make_plan(config, 10, sampler=sampler, strength=0.5)


def test_a_step_of_no_length_stays_finite():
  # With as many steps as timesteps the last one begins where sigma_min ends;
  # diffusers divides 0 by 0.
  config = CONFIG | {
    'num_train_timesteps': 100,
    'final_sigmas_type': 'sigma_min',
    'solver_type': 'heun',
  }
  plan = samplers.make_plan(config, 100, sampler='dpmpp_2m')
  assert plan.rows.weights['state'][-1] == 1.0
  assert all(np.all(np.isfinite(w)) for w in plan.rows.weights.values())


@pytest.mark.parametrize('sampler', ['ddim', 'ddpm', 'euler_ancestral'])
def test_samplers_with_noise_need_noise_fn(sampler):
  eta = 0.5 if sampler == 'ddim' else 0.0
  plan = samplers.make_plan(CONFIG, 2, sampler=sampler, eta=eta)
  with pytest.raises(ValueError, match='noise_fn'):
    samplers.sample(plan, _linear_denoiser, jnp.zeros((1, 1, 1, 1)))


@pytest.mark.parametrize('part', [{'strength': 0.5}, {'start': 0.5}])
def test_a_later_start_is_not_noise(part):
  plan = samplers.make_plan(CONFIG, 10, sampler='ddim', **part)
  with pytest.raises(ValueError, match=r'begins at step 5.*from_image'):
    plan.from_noise(jnp.zeros((1, 1, 1, 1)))


def test_conversions_invert_each_other():
  rng = np.random.default_rng(1)
  x_0, eps = rng.standard_normal((2, 5, 1, 1, 2)).astype(np.float32)
  alpha_t, sigma_t = np.float32(0.6), np.float32(0.8)
  x_t = alpha_t * x_0 + sigma_t * eps
  for kind in ('epsilon', 'v_prediction', 'sample'):
    output = x_0
    if kind != 'sample':
      output = predict.training_target(
        x_0, eps, alpha_t, sigma_t, prediction_type=kind
      )
    at = (output, x_t, alpha_t, sigma_t)
    np.testing.assert_allclose(
      predict.to_eps(*at, prediction_type=kind), eps, atol=1e-6
    )
    np.testing.assert_allclose(
      predict.to_x_0(*at, prediction_type=kind), x_0, atol=1e-6
    )


@pytest.mark.parametrize(
  ('function', 'kind'),
  [
    (predict.to_eps, 'flow'),
    (predict.to_x_0, 'flow'),
    (predict.training_target, 'flow'),
    (predict.training_target, 'sample'),
  ],
)
def test_unknown_predictions_are_named(function, kind):
  with pytest.raises(ValueError, match=f'prediction_type={kind!r}'):
    function(*np.ones((4, 1), np.float32), prediction_type=kind)
