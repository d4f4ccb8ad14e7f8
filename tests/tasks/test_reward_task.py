"""Rewards: losses by hand, ensembles in one program, what they are shown."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import loading, sharding
from dpo_jax.models import reward
from dpo_jax.objectives import reward_losses
from dpo_jax.tasks import reward as reward_task

NETWORKS, ROWS = 3, 8


@pytest.fixture(scope='module')
def opened():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return loading.open_model('examples/emoji/model', mesh=mesh, dtype='float32')


def make(kind, *, channels, seed=0, count=NETWORKS):
  config = reward.RewardConfig(
    kind, in_channels=channels, widths=(8, 16), num_heads=2
  )
  module = reward.Reward(config)
  t = jnp.zeros(1, jnp.int32)
  members = [
    module.init(jax.random.key(seed + k), jnp.zeros((1, 8, 8, channels)), t)[
      'params'
    ]
    for k in range(count)
  ]
  rng = np.random.default_rng(seed)
  # The last layer starts at 0: with that nothing else would have a gradient.
  members = [
    jax.tree.map(
      lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32),
      one,
    )
    for one in members
  ]
  return module, members


def batch(seed=0, side=8, pairs=False):
  rng = np.random.default_rng(seed)
  two = (2,) if pairs else ()
  return {
    'images': rng.integers(0, 256, (ROWS, *two, side, side, 3), np.uint8),
    'liked': np.arange(ROWS) % 2,
    'members': rng.integers(0, 2, (ROWS, NETWORKS)).astype(np.float32),
    'id': np.arange(ROWS, dtype=np.uint32),
    'epoch': np.zeros(ROWS, np.uint32),
  }


def test_an_offset_makes_log_r_that_of_another_share():
  """Benign is N(1, 1), malign N(-1, 1): their log ratio at x is 2 x."""
  x, odds, share = np.linspace(-3, 3, 7), 0.2, 0.1
  benign, malign = (np.exp(-0.5 * (x - mean) ** 2) for mean in (1, -1))
  learnt = np.log(odds * benign / malign)
  wanted = (1 - share) * benign / ((1 - share) * benign + share * malign)
  offset = reward.find_offset(share, odds)
  np.testing.assert_allclose(1 / (1 + np.exp(-learnt - offset)), wanted)
  assert reward.find_offset(0.5, 1.0) == 0

  module, members = make('clean', channels=3)
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  t = jnp.zeros(4, jnp.int32)
  found = reward.make_log_reward_fn(module, members, (1.0, 0.0, -2.0))
  logits = [module.apply({'params': one}, images, t) for one in members]
  by_hand = reward.log_reward([logits[0] + 1, logits[1], logits[2] - 2])
  np.testing.assert_allclose(found(images, t), by_hand, rtol=1e-6)


def test_weighted_bce_by_hand():
  logits = jnp.array([0.0, 2.0, -1.0, 2.0])
  labels = jnp.array([1.0, 1.0, 0.0, 0.0])
  found = reward_losses.weighted_bce(logits, labels, benign_weight=0.02)
  wanted = [
    0.02 * np.log(2),
    0.02 * np.log1p(np.exp(-2.0)),
    np.log1p(np.exp(-1.0)),
    np.log1p(np.exp(2.0)),
  ]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_pairwise_by_hand():
  found = reward_losses.pairwise(jnp.array([1.0, 0.0]), jnp.array([0.0, 3.0]))
  np.testing.assert_allclose(
    found, [np.log1p(np.exp(-1.0)), np.log1p(np.exp(3.0))], rtol=1e-6
  )


def test_an_ensemble_is_the_product_of_its_members():
  module, members = make('clean', channels=3)
  x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  t = jnp.zeros(4, jnp.int32)
  found = reward.make_log_reward_fn(module, members)(x, t)
  probabilities = [
    1 / (1 + np.exp(-np.float64(module.apply({'params': p}, x, t))))
    for p in members
  ]
  np.testing.assert_allclose(
    np.exp(np.float64(found)), np.prod(probabilities, 0), rtol=1e-5
  )


@pytest.mark.parametrize('kind', ['time', 'clean'])
def test_a_picture_is_judged_alone(kind):
  module, (params, *_) = make(kind, channels=3)
  x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  t = jnp.array([0, 10, 500, 999])
  found = module.apply({'params': params}, x, t)
  for i in range(4):
    alone = module.apply({'params': params}, x[i : i + 1], t[i : i + 1])
    np.testing.assert_allclose(alone[0], found[i], rtol=1e-4, atol=1e-5)
  other = module.apply({'params': params}, x, t[::-1])
  assert (np.abs(other - found).max() > 1e-3) == (kind == 'time')


def test_a_new_reward_says_one_half():
  config = reward.RewardConfig('time', in_channels=3, widths=(8, 16))
  module = reward.Reward(config)
  x, t = jnp.ones((2, 8, 8, 3)), jnp.zeros(2, jnp.int32)
  params = module.init(jax.random.key(0), x, t)['params']
  np.testing.assert_array_equal(module.apply({'params': params}, x, t), 0.0)


@pytest.mark.parametrize('loss', reward_task.LOSSES)
def test_networks_in_one_program_are_those_trained_apart(loss):
  module, members = make('clean', channels=3)
  # An eps above rounding: Adam would make steps of it where a gradient is 0.
  optimizer = optax.adamw(1e-2, eps=1e-4, weight_decay=0.05)
  inputs = reward_task.Inputs(None, noised=False)
  batches = [batch(i, pairs=loss == 'pairwise') for i in range(3)]

  def train(chosen):
    task = reward_task.make_task(
      module=module,
      members=[members[k] for k in chosen],
      inputs=inputs,
      frozen={},
      benign_weight=0.1,
      loss=loss,
    )

    @jax.jit
    def step(params, state, given):
      gradient = jax.grad(
        lambda p: task.loss(p, {}, given, jax.random.key(0))[0].mean()
      )(params)
      updates, state = optimizer.update(gradient, state, params)
      return optax.apply_updates(params, updates), state

    params, state = task.params, optimizer.init(task.params)
    for given in batches:
      own = given | {'members': given['members'][:, list(chosen)]}
      params, state = step(params, state, own)
    return list(params['reward'].values())

  together = train(range(NETWORKS))
  for k in range(NETWORKS):
    (alone,) = train([k])
    moved = 0.0
    for a, b, start in zip(
      *map(jax.tree.leaves, (alone, together[k], members[k])), strict=True
    ):
      np.testing.assert_allclose(a, b, atol=1e-4)
      moved = max(moved, np.abs(a - start).max())
    assert moved > 1e-2


def test_only_its_own_examples_teach_a_network():
  module, members = make('clean', channels=3)
  task = reward_task.make_task(
    module=module,
    members=members,
    inputs=reward_task.Inputs(None, noised=False),
    frozen={},
    benign_weight=0.1,
  )
  given = batch()
  given['members'][:] = 0
  given['members'][2, 1] = 1
  losses, metrics = task.loss(task.params, {}, given, jax.random.key(0))
  assert (np.asarray(losses) != 0).tolist() == [False, False, True] + [
    False
  ] * 5
  assert np.isfinite(metrics['reward/right']).tolist() == [
    i == 2 for i in range(ROWS)
  ]
  gradient = jax.grad(
    lambda p: task.loss(p, {}, given, jax.random.key(0))[0].sum()
  )(task.params)['reward']
  sizes = [optax.global_norm(one) for one in gradient.values()]
  assert sizes[0] == 0 and sizes[1] > 0 and sizes[2] == 0


def test_noised_latents_of_the_generator_are_shown(opened):
  model = opened.model
  frozen = {'vae': opened.params['vae']}
  given = batch(side=32)
  key = jax.random.key(3)
  x_0, t = reward_task.Inputs(model, noised=False).make(frozen, given, key)
  assert x_0.shape == (ROWS, *model.latent_shape(32)) and (t == 0).all()
  noised = reward_task.Inputs(model, noised=True)
  x_t, t = noised.make(frozen, given, key)
  assert len(set(np.asarray(t).tolist())) > 4
  alpha, sigma = model.schedule.alpha_sigma(t)
  eps = (x_t - alpha[:, None, None, None] * x_0) / sigma[:, None, None, None]
  assert abs(float(eps.mean())) < 0.1 and abs(float(eps.std()) - 1) < 0.1
  # The draws belong to the example.
  turned = {name: value[::-1] for name, value in given.items()}
  np.testing.assert_allclose(
    noised.make(frozen, turned, key)[0][::-1], x_t, atol=1e-4
  )
  again = noised.make(frozen, given | {'epoch': given['epoch'] + 1}, key)
  assert (np.asarray(again[1]) != np.asarray(t)).any()


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'kind': 'noisy'}, 'time, clean, features'),
    ({'widths': (12,)}, '12 is no multiple of norm_num_groups=8'),
    ({'kind': 'time', 'widths': (8,), 'num_heads': 3}, 'num_heads=3'),
    ({'depth': 0}, 'depth=0'),
    ({'breadth': 1}, 'breadth'),
  ],
)
def test_impossible_rewards_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    reward.RewardConfig.from_dict({'kind': 'clean', 'in_channels': 3} | options)


def test_what_does_not_fit_is_refused():
  module, members = make('clean', channels=3)
  with pytest.raises(ValueError, match='3 channels was given 1'):
    module.apply({'params': members[0]}, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
  with pytest.raises(ValueError, match='bce, pairwise'):
    reward_task.make_task(
      module=module,
      members=members,
      inputs=reward_task.Inputs(None, noised=False),
      frozen={},
      benign_weight=0.1,
      loss='mse',
    )
  with pytest.raises(ValueError, match='schedule of its generator'):
    reward_task.Inputs(None, noised=True)
