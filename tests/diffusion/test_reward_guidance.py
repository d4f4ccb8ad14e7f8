"""Guidance by a reward, where everything is known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.diffusion import reward_guidance, samplers, schedule

MEAN, STD = 0.3, 0.5
SLOPE = 0.8
CONFIG = {'beta_schedule': 'linear', 'clip_sample': False}
SAMPLERS = ['ddim', 'ddpm', 'euler', 'euler_ancestral', 'dpmpp_2m']


def levels(t):
  """alpha and sigma at any float timestep, [n 1 1 1]."""
  made = schedule.from_config(CONFIG, sampler='euler')
  table = np.sqrt(1 / np.float64(made.alphas_cumprod) - 1)
  sigma = jnp.interp(t.astype(jnp.float32), np.arange(len(table)), table)
  alpha = 1 / jnp.sqrt(sigma**2 + 1)
  return alpha[:, None, None, None], (sigma * alpha)[:, None, None, None]


def posterior_mean(x_t, t):
  """E[x_0 | x_t] of data N(MEAN, STD^2)."""
  alpha, sigma = levels(t)
  variance = alpha**2 * STD**2 + sigma**2
  return MEAN + alpha * STD**2 * (x_t - alpha * MEAN) / variance


def denoise(x_t, t):
  alpha, sigma = levels(t)
  return (x_t - alpha * posterior_mean(x_t, t)) / sigma


def tilt(x, t):
  """log r of r = exp(SLOPE sum x_0), up to a constant: of x_0 and of x_t.

  log E[r | x_t] has the slope of SLOPE E[x_0 | x_t]: the variance of
  x_0 given x_t hangs on t alone.
  """
  mean = jnp.where(t[:, None, None, None] > 0, posterior_mean(x, t), x)
  return SLOPE * mean.sum((1, 2, 3))


def clean_tilt(x_0, t):
  assert t.shape == (len(x_0),)
  return SLOPE * x_0.sum((1, 2, 3))


def noise_of(key, shape):
  return lambda i: jax.random.normal(jax.random.fold_in(key, i), shape)


def draw(plan, denoise_fn, n=4096, **options):
  shape = (n, 1, 1, 1)
  noise = jax.random.normal(jax.random.key(0), shape)
  run = functools.partial(
    samplers.sample,
    plan,
    denoise_fn,
    noise_fn=noise_of(jax.random.key(1), shape),
    **options,
  )
  return np.asarray(jax.jit(run)(plan.from_noise(noise)))


@pytest.mark.parametrize('place', reward_guidance.PLACES)
@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_tilted_gaussian_is_found(sampler, place):
  """p exp(w s x_0) is N(m + w s v, v)."""
  plan = samplers.make_plan(CONFIG, 200, sampler=sampler)
  settings = reward_guidance.Settings(1.5, place=place)
  reward = tilt if place == 'x_t' else clean_tilt
  found = draw(plan, reward_guidance.guide(denoise, reward, plan, settings))
  wanted = MEAN + 1.5 * SLOPE * STD**2
  assert abs(found.mean() - wanted) < 0.03
  assert abs(found.std() - STD) < 0.03
  plain = draw(plan, denoise)
  assert abs(plain.mean() - MEAN) < 0.03


def test_the_posterior_mean_moves_by_beta_g():
  """Of the ddpm sampler, exactly (METHODS: to rounding)."""
  plan = samplers.make_plan(CONFIG, 1000, sampler='ddpm')
  betas = schedule.from_config(CONFIG).betas
  gradient = np.random.default_rng(0).normal(size=(2, 3, 3, 2))

  def reward(x, t):
    return (x * gradient).sum((1, 2, 3))

  guided = reward_guidance.guide(
    denoise, reward, plan, reward_guidance.Settings(2.0)
  )
  state = jax.random.normal(jax.random.key(0), gradient.shape)
  still = noise_of(jax.random.key(1), gradient.shape)
  places = samplers.places(plan)
  for i in (0, 500, 900, 998):
    place = jax.tree.map(lambda column, i=i: column[i], places)
    after = [
      samplers.make_step(plan, fn, noise_fn=still)(samplers.start(state), place)
      for fn in (guided, denoise)
    ]
    moved = np.asarray(after[0].state - after[1].state, np.float64)
    beta = float(betas[place.row.t])
    np.testing.assert_allclose(
      moved, beta * 2.0 * gradient, rtol=2e-3, atol=2e-6
    )


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_nothing_asked_is_the_plain_sampler_bit_for_bit(sampler):
  plan = samplers.make_plan(CONFIG, 20, sampler=sampler)
  off = reward_guidance.guide(
    denoise, clean_tilt, plan, reward_guidance.Settings(0.0)
  )
  plain = draw(plan, denoise, n=16)
  np.testing.assert_array_equal(draw(plan, off, n=16, recurrence=1), plain)


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
def test_the_gradient_through_the_denoiser(kind):
  """Against differences of log r at x_0_hat, whatever the network predicts."""
  config = CONFIG | {'prediction_type': kind}
  plan = samplers.make_plan(config, 10, sampler='ddim')

  def network(x_t, t):
    alpha, sigma = levels(t)
    # No exact denoiser: a bend, so that the gradient hangs on the place.
    x_0 = jnp.tanh(posterior_mean(x_t, t) + 0.3 * jnp.sin(3 * x_t))
    eps = (x_t - alpha * x_0) / sigma
    outputs = {'epsilon': eps, 'sample': x_0}
    return outputs.get(kind, alpha * eps - sigma * x_0)

  def reward(x_0, t):
    return -jnp.square(x_0 - 0.4).sum((1, 2, 3))

  def x_0_hat(x_t, t, output):
    alpha, sigma = levels(t)
    if kind == 'sample':
      return output
    if kind == 'epsilon':
      return (x_t - sigma * output) / alpha
    return alpha * x_t - sigma * output

  settings = reward_guidance.Settings(0.7, place='x_0_hat')
  guided = reward_guidance.guide(network, reward, plan, settings)
  x_t = jax.random.normal(jax.random.key(3), (3, 2, 2, 1))
  t = jnp.full(3, int(plan.rows.t[4]))
  alpha, sigma = levels(t)

  def log_r(x):
    return np.asarray(reward(x_0_hat(x, t, network(x, t)), t), np.float64)

  steps = 1e-2 * np.eye(4).reshape(4, 2, 2, 1)
  gradient = np.stack(
    [(log_r(x_t + d) - log_r(x_t - d)) / 2e-2 for d in steps], -1
  ).reshape(3, 2, 2, 1)
  clean = x_0_hat(x_t, t, network(x_t, t))
  wanted = clean + sigma**2 / alpha * 0.7 * gradient
  np.testing.assert_allclose(
    x_0_hat(x_t, t, guided(x_t, t)), wanted, rtol=2e-3, atol=2e-3
  )


def test_backward_steps_raise_the_reward_and_nothing_else():
  plan = samplers.make_plan(CONFIG, 10, sampler='ddim')
  settings = reward_guidance.Settings(0.0, backward_steps=5, backward_rate=0.02)
  guided = reward_guidance.guide(denoise, clean_tilt, plan, settings)
  x_t = jax.random.normal(jax.random.key(3), (3, 2, 2, 1))
  t = jnp.full(3, int(plan.rows.t[4]))
  alpha, sigma = levels(t)
  x_0 = (x_t - sigma * guided(x_t, t)) / alpha
  # Of a constant gradient Adam makes steps of the rate, whatever its size.
  np.testing.assert_allclose(
    x_0, posterior_mean(x_t, t) + 5 * 0.02, rtol=1e-3, atol=1e-4
  )


@pytest.mark.parametrize('sampler', ['ddim', 'ddpm', 'euler', 'dpmpp_2m'])
def test_recurrence_keeps_the_distribution(sampler):
  """Without guidance, going back and forth changes nothing in the mean."""
  plan = samplers.make_plan(CONFIG, 400, sampler=sampler)
  calls = []

  def count(x_t, t):
    calls.append(1)
    return denoise(x_t, t)

  found = draw(
    plan,
    count,
    recurrence=3,
    renoise_fn=noise_of(jax.random.key(2), (4096, 1, 1, 1)),
  )
  assert abs(found.mean() - MEAN) < 0.03
  assert abs(found.std() - STD) < 0.03
  # The network is in the program once.
  assert len(calls) == 1


def test_recurrence_by_hand():
  """Two rounds of one ddim step."""
  plan = samplers.make_plan(CONFIG, 10, sampler='ddim')
  place = jax.tree.map(lambda column: column[3], samplers.places(plan))
  state = jax.random.normal(jax.random.key(0), (2, 2, 2, 1))
  noise = jax.random.normal(jax.random.key(5), state.shape)
  asked = []

  def renoise(number):
    asked.append(number)
    return noise

  step = samplers.make_step(plan, denoise, recurrence=2, renoise_fn=renoise)
  found = step(samplers.start(state), place).state
  alphas = schedule.from_config(CONFIG).alphas_cumprod
  now, after = alphas[int(plan.rows.t[3])], alphas[int(plan.rows.t[4])]

  def once(x):
    t = jnp.full(2, int(plan.rows.t[3]))
    eps = denoise(x, t)
    x_0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
    return np.sqrt(after) * x_0 + np.sqrt(1 - after) * eps

  again = np.sqrt(now / after) * once(state) + np.sqrt(1 - now / after) * noise
  np.testing.assert_allclose(found, once(again), rtol=1e-4, atol=1e-5)
  assert len(asked) == 1


@pytest.mark.parametrize('recurrence', [1, 3])
def test_rounds_from_python_are_those_of_the_scan(recurrence):
  plan = samplers.make_plan(CONFIG, 12, sampler='dpmpp_2m')
  noise = jax.random.normal(jax.random.key(0), (4, 2, 2, 1))

  def renoise(number):
    key = jax.random.fold_in(jax.random.key(7), number)
    return jax.random.normal(key, noise.shape)

  rounds = {'recurrence': recurrence, 'renoise_fn': renoise}
  once = jax.jit(samplers.make_round(plan, denoise, **rounds))
  step = samplers.repeat(once, recurrence)
  carry, places = samplers.start(plan.from_noise(noise)), samplers.places(plan)
  for i in range(plan.num_steps):
    place = jax.tree.map(lambda column, i=i: column[i], places)
    # A round is repeated with the x_0 of the step before.
    again = once(carry, place, 0).again
    np.testing.assert_array_equal(again.last_x_0, carry.last_x_0)
    carry = step(carry, place)
  wanted = samplers.sample(plan, denoise, plan.from_noise(noise), **rounds)
  np.testing.assert_allclose(carry.state, wanted, rtol=1e-5, atol=1e-6)
  plain = samplers.sample(plan, denoise, plan.from_noise(noise))
  assert bool(jnp.abs(wanted - plain).max() > 0.1) == (recurrence > 1)


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'scale': -1.0}, 'must be 0 or more'),
    ({'scale': 1.0, 'place': 'eps'}, 'x_t, x_0_hat'),
    ({'scale': 1.0, 'backward_steps': -1}, 'must be 0 or more'),
    ({'scale': 1.0, 'backward_rate': 0.0}, 'above 0'),
  ],
)
def test_impossible_settings_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    reward_guidance.Settings(**options)


def test_impossible_recurrence_is_refused():
  plan = samplers.make_plan(CONFIG, 10, sampler='ddim')
  with pytest.raises(ValueError, match='must be 1'):
    samplers.make_step(plan, denoise, recurrence=0)
  with pytest.raises(ValueError, match='pass renoise_fn'):
    samplers.make_step(plan, denoise, recurrence=2)
  flow = samplers.make_plan(
    {'_class_name': 'FlowMatchEulerDiscreteScheduler'}, 10, sampler='euler'
  )
  with pytest.raises(ValueError, match='not possible with a rectified flow'):
    samplers.make_step(flow, denoise, recurrence=2, renoise_fn=denoise)


def test_nothing_leans_where_there_is_only_noise():
  """A flow begins at alpha 0, where eps says nothing of x_0."""
  plan = samplers.make_plan(
    {'_class_name': 'FlowMatchEulerDiscreteScheduler'}, 4, sampler='euler'
  )
  guided = reward_guidance.guide(
    lambda x, t: 0.5 * x,
    clean_tilt,
    plan,
    reward_guidance.Settings(1.0, backward_steps=1, place='x_0_hat'),
  )
  x_t = jax.random.normal(jax.random.key(3), (3, 2, 2, 1))
  assert plan.rows.alpha[0] == 0.0
  first = guided(x_t, jnp.full(3, plan.rows.t[0]))
  np.testing.assert_array_equal(first, 0.5 * x_t)
  second = guided(x_t, jnp.full(3, plan.rows.t[1]))
  assert np.isfinite(second).all() and np.abs(second - 0.5 * x_t).max() > 0.01
