"""The step on toy losses: accumulation, devices, averages, EMA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import sharding
from dpo_jax import task as task_lib
from dpo_jax.train import optimizer as optimizer_lib
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib


def _loss(params, frozen, batch, key):
  del key
  hidden = jnp.tanh(batch['x'] @ params['w1'])
  output = hidden @ params['w2'] + frozen['bias']
  loss = jnp.mean(jnp.square(output - batch['y']), -1)
  rare = jnp.where(batch['id'] == 5, loss, jnp.nan)
  return loss, {'rare': rare, 'never': jnp.full_like(loss, jnp.nan)}


def _setup(size=16):
  rng = np.random.default_rng(0)
  params = {
    'w1': jnp.asarray(rng.standard_normal((6, 128)), jnp.float32),
    'w2': jnp.asarray(rng.standard_normal((128, 256)), jnp.float32),
  }
  frozen = {'bias': jnp.ones((256,))}
  batch = {
    'x': rng.standard_normal((size, 6)).astype(np.float32),
    'y': rng.standard_normal((size, 256)).astype(np.float32),
    'id': np.arange(size, dtype=np.uint32),
  }
  return params, frozen, batch


def _run(*, accumulate=1, mesh=None, ema_decay=0.0, steps=3):
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  params, frozen, batch = _setup()
  optimizer = optax.adamw(1e-2)
  state = state_lib.init_state(params, optimizer, use_ema=ema_decay > 0)
  state = jax.device_put(state, sharding.state_shardings(state, mesh))
  step = jax.jit(
    step_lib.make_step(
      _loss, optimizer, accumulate=accumulate, ema_decay=ema_decay
    )
  )
  losses = []
  for _ in range(steps):
    state, metrics = step(
      state,
      jax.device_put(frozen, sharding.replicated(mesh)),
      sharding.put_batch(batch, mesh),
      jax.random.key(0),
    )
    losses.append(float(metrics['loss']))
  return state, metrics, losses


@pytest.mark.parametrize('accumulate', [2, 4, 16])
def test_microbatches_equal_one_batch(accumulate):
  state, _, losses = _run()
  other, metrics, others = _run(accumulate=accumulate)
  np.testing.assert_allclose(losses, others, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    state.params,
    other.params,
  )
  assert np.isfinite(metrics['rare']) and np.isnan(metrics['never'])


@pytest.mark.parametrize(('data', 'fsdp'), [(8, 1), (4, 2), (1, 8)])
def test_eight_devices_equal_one(data, fsdp):
  state, _, losses = _run(accumulate=2)
  mesh = sharding.make_mesh(data=data, fsdp=fsdp)
  other, _, others = _run(accumulate=2, mesh=mesh)
  np.testing.assert_allclose(losses, others, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    state.params,
    other.params,
  )
  if fsdp > 1:
    shard = other.params['w2'].addressable_shards[0].data
    assert shard.size * fsdp == other.params['w2'].size


def test_rare_metrics_are_averaged_over_those_that_have_them():
  params, frozen, batch = _setup()
  loss, _ = _loss(params, frozen, batch, None)
  _, metrics, _ = _run(steps=1)
  assert float(metrics['rare']) == pytest.approx(float(loss[5]), rel=1e-5)
  assert float(metrics['loss']) == pytest.approx(float(loss.mean()), rel=1e-5)


def test_a_nan_loss_stays_nan():
  def broken(params, frozen, batch, key):
    loss, metrics = _loss(params, frozen, batch, key)
    return jnp.where(batch['id'] == 3, jnp.nan, loss), metrics

  params, frozen, batch = _setup()
  step = step_lib.make_step(broken, optax.sgd(1e-2))
  state = state_lib.init_state(params, optax.sgd(1e-2), use_ema=False)
  _, metrics = step(state, frozen, batch, jax.random.key(0))
  assert np.isnan(metrics['loss'])


def test_ema_by_hand():
  params, frozen, batch = _setup()
  optimizer = optax.sgd(1e-2)
  state = state_lib.init_state(params, optimizer, use_ema=True)
  step = step_lib.make_step(_loss, optimizer, ema_decay=0.15)
  wanted = np.asarray(params['w1'], np.float64)
  # Decay is warmed up: min(0.15, 1/10), then min(0.15, 2/11).
  for decay in (0.1, 0.15):
    state, _ = step(state, frozen, batch, jax.random.key(0))
    wanted = decay * wanted + (1 - decay) * np.asarray(state.params['w1'])
  np.testing.assert_allclose(state.ema['w1'], wanted, rtol=1e-5, atol=1e-6)
  assert state_lib.final_params(state) is state.ema


def test_no_ema_means_none():
  state, _, _ = _run(steps=1)
  assert state.ema is None
  assert state_lib.final_params(state) is state.params


def test_split_takes_strided_rows():
  parts = step_lib.split_microbatches({'id': jnp.arange(6)}, 3)
  np.testing.assert_array_equal(parts['id'], [[0, 3], [1, 4], [2, 5]])


def test_the_step_has_one_gradient_all_reduce_and_moves_no_batch():
  mesh = sharding.make_mesh()
  params, frozen, batch = _setup()
  optimizer = optax.sgd(1e-2)
  state = state_lib.init_state(params, optimizer, use_ema=False)
  state = jax.device_put(state, sharding.replicated(mesh))
  step = step_lib.make_step(_loss, optimizer, accumulate=2)
  text = (
    jax.jit(step)
    .lower(
      state,
      jax.device_put(frozen, sharding.replicated(mesh)),
      sharding.put_batch(batch, mesh),
      jax.random.key(0),
    )
    .compile()
    .as_text()
  )
  for name in ('all-to-all', 'all-gather(', 'collective-permute'):
    assert name not in text, name
  assert 'all-reduce' in text


@pytest.mark.parametrize(
  ('name', 'wanted'),
  [
    ('constant', [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
    ('linear', [0.25, 0.5, 0.75, 1.0, 1.0, 0.875]),
    ('cosine', [0.25, 0.5, 0.75, 1.0, 1.0, 0.9619398]),
  ],
)
def test_schedules_by_hand(name, wanted):
  schedule = optimizer_lib.make_schedule(
    name=name, learning_rate=1.0, warmup_steps=4, num_steps=12
  )
  found = [float(schedule(step)) for step in range(6)]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize('name', optimizer_lib.OPTIMIZERS)
def test_optimizers_go_downhill_and_decay(name):
  optimizer = optimizer_lib.make_optimizer(
    name=name,
    schedule=lambda step: 1e-2,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
  )
  params = {'w': jnp.ones((256, 256))}
  state = optimizer.init(params)
  grads = {'w': jnp.full((256, 256), 3.0)}
  updates, state = optimizer.update(grads, state, params)
  assert float(updates['w'].max()) < 0
  decay_only, _ = optimizer.update(
    {'w': jnp.zeros((256, 256))}, optimizer.init(params), params
  )
  np.testing.assert_allclose(decay_only['w'], -1e-2 * 0.1, rtol=1e-4)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match='adamw, adafactor'):
    optimizer_lib.make_optimizer(
      name='lion',
      schedule=lambda step: 1.0,
      b1=0,
      b2=0,
      eps=0,
      weight_decay=0,
      clip_norm=0,
    )
  with pytest.raises(ValueError, match='constant, linear, cosine'):
    optimizer_lib.make_schedule(
      name='step', learning_rate=1.0, warmup_steps=0, num_steps=1
    )


def test_prepared_params_are_made_once_and_the_gradient_is_float32():
  params, frozen, batch = _setup()
  dtypes, calls = set(), []

  def prepare(params, frozen):
    calls.append(1)
    cast = {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}
    return cast, frozen

  def loss(params, frozen, batch, key):
    dtypes.update(leaf.dtype for leaf in jax.tree.leaves(params))
    exact = {name: leaf.astype(jnp.float32) for name, leaf in params.items()}
    return _loss(exact, frozen, batch, key)

  prepared = task_lib.PreparedLoss(prepare, loss)
  rounded = {
    name: leaf.astype(jnp.bfloat16).astype(jnp.float32)
    for name, leaf in params.items()
  }
  found = []
  for start, fn in ((params, prepared), (rounded, _loss)):
    state = state_lib.init_state(start, optax.sgd(1e-2), use_ema=False)
    step = step_lib.make_step(fn, optax.sgd(1e-2), accumulate=4)
    state, metrics = jax.jit(step)(state, frozen, batch, jax.random.key(0))
    assert state.params['w1'].dtype == jnp.float32
    found.append((float(metrics['loss']), float(metrics['norm/grads'])))
  assert dtypes == {jnp.dtype('bfloat16')} and len(calls) == 1
  np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
  # Four microbatches' gradients of bfloat16 weights, each rounded to 2^-9.
  np.testing.assert_allclose(found[0][1], found[1][1], rtol=2**-8)


def test_bfloat16_weights_move_by_updates_below_their_last_place():
  # One unit in the last place of 1.0 is 2^-7; a step is an eighth of it.
  params = {'w': jnp.ones((64, 256), jnp.bfloat16)}
  rate = 2.0**-10

  def loss(params, frozen, batch, key):
    return jnp.sum(params['w'].astype(jnp.float32)) * jnp.ones(2), {}

  state = state_lib.init_state(params, optax.adamw(rate), use_ema=True)
  assert state.opt_state[0].nu['w'].dtype == jnp.float32
  assert state.ema['w'].dtype == jnp.float32
  step = jax.jit(
    step_lib.make_step(loss, optax.sgd(rate), ema_decay=0.5), donate_argnums=0
  )
  state = state_lib.init_state(params, optax.sgd(rate), use_ema=True)
  batch = {'id': jnp.arange(2)}
  for _ in range(16):
    state, _ = step(state, {}, batch, jax.random.key(0))
  moved = np.asarray(state.params['w'], np.float64)
  assert state.params['w'].dtype == jnp.bfloat16
  # Rounding to nearest would have left every one at 1.
  assert moved.mean() == pytest.approx(1 - 16 * rate, abs=2e-4)
  assert len(np.unique(moved)) > 2
  # Not the same draw at each step or in each entry.
  assert 0 < moved.std() < 2**-6


def test_margin_noise_is_of_the_first_step_only():
  margins = jnp.array([0.5, -0.5, 0.5, -1.5])

  def loss(params, frozen, batch, key):
    value = jnp.sum(params['w']) * jnp.ones(4)
    return value, {'reward/margin': margins[batch['id']]}

  params = {'w': jnp.ones((2,))}
  state = state_lib.init_state(params, optax.sgd(1e-2), use_ema=False)
  step = jax.jit(step_lib.make_step(loss, optax.sgd(1e-2), accumulate=2))
  batch = {'id': jnp.arange(4)}
  state, metrics = step(state, {}, batch, jax.random.key(0))
  assert float(metrics['margin_noise/sd']) == pytest.approx(0.8291562)
  assert float(metrics['margin_noise/max']) == 1.5
  _, metrics = step(state, {}, batch, jax.random.key(0))
  assert np.isnan(metrics['margin_noise/sd'])
  assert np.isnan(metrics['margin_noise/max'])


def test_adamw_keeps_its_first_moment_in_the_dtype_asked():
  def run(mu_dtype):
    optimizer = _optimizer('adamw', mu_dtype=mu_dtype)
    params = {'w': jnp.ones((16,))}
    state = optimizer.init(params)
    for scale in (1.0, 0.3, -0.2):
      updates, state = optimizer.update(
        {'w': jnp.linspace(-1, 1, 16) * scale}, state, params
      )
    moments = [x for x in jax.tree.leaves(state) if x.shape == (16,)]
    return updates['w'], {x.dtype for x in moments}

  exact, dtypes = run('float32')
  assert dtypes == {jnp.dtype('float32')}
  rounded, dtypes = run('bfloat16')
  assert dtypes == {jnp.dtype('float32'), jnp.dtype('bfloat16')}
  # Two roundings to 2^-9 of a moment that is later multiplied by 0.9.
  np.testing.assert_allclose(rounded, exact, atol=2**-7 * np.abs(exact).max())


def test_adafactor_scales_by_the_parameters_only_when_asked():
  params = {'w': jnp.full((256, 256), 0.01)}
  grads = {'w': jnp.full((256, 256), 3.0)}
  sizes = []
  for scaled in (False, True):
    optimizer = _optimizer('adafactor', parameter_scale=scaled)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    sizes.append(float(jnp.abs(updates['w']).mean()))
  assert sizes[1] / sizes[0] == pytest.approx(0.01, rel=1e-3)


def test_options_that_an_optimizer_would_ignore_are_refused():
  with pytest.raises(ValueError, match='adafactor holds no first moment'):
    _optimizer('adafactor', mu_dtype='bfloat16')
  with pytest.raises(ValueError, match='adamw has no such thing'):
    _optimizer('adamw', parameter_scale=True)


def _optimizer(name, **options):
  numbers = {'b1': 0.9, 'b2': 0.999, 'eps': 1e-8}
  return optimizer_lib.make_optimizer(
    name=name,
    schedule=lambda step: 1e-2,
    weight_decay=0.0,
    clip_norm=0.0,
    **numbers,
    **options,
  )
