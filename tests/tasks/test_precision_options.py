"""What the preference task's memory and precision options change, and keep.

At beta 5000 the rounding of the margins alone decides which pairs weigh how
much (RESULTS.md, margin noise); a beta of 100 shows that of the gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import cases
from dpo_jax import trees
from dpo_jax.planning import flops
from dpo_jax.tasks import reference
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib

PAIRS, BETA = 8, 100.0
BFLOAT16 = jnp.dtype('bfloat16')
# Of the gradient's norm. A gradient of a pair is the difference of those of
# its images, which are much alike: it keeps some ten times their rounding.
# float32: units of 2^-24 over about a hundred products in turn, sqrt(100) *
# 2^-24 * 10 = 6e-6; found over four batches 3.5e-6 to 1.1e-5.
EXACT = 5e-5
# bfloat16: 2^-9 in the same way is 0.2 where all products counted alike; found
# over four batches and three options 0.034 to 0.068.
ROUNDED = 0.1


def _name(options):
  values = {k: getattr(v, '__name__', v) for k, v in options.items()}
  return ', '.join(f'{k}={v}' for k, v in values.items()) or 'plain'


@pytest.fixture(scope='module')
def params():
  """Weights that bfloat16 holds exactly."""
  rounded = trees.cast_floats(cases.random_params('nano'), jnp.bfloat16)
  return jax.device_get(trees.cast_floats(rounded, jnp.float32))


@pytest.fixture(scope='module')
def policy(params):
  """One that has moved by a hundredth, to such weights too."""
  rng = np.random.default_rng(9)

  def move(leaf):
    normal = rng.standard_normal(leaf.shape, np.float32)
    return np.asarray(leaf * (1 + 0.01 * normal), BFLOAT16).astype(np.float32)

  return {'unet': jax.tree.map(move, params)}


def _mean_loss(task):
  batch = cases.random_batch('nano', PAIRS)

  def mean_loss(policy):
    loss, metrics = task.loss(policy, task.frozen, batch, jax.random.key(0))
    return jnp.mean(loss), metrics['reward/margin']

  return mean_loss


@pytest.fixture(scope='module')
def gradient(params, policy):
  """Options of a task -> (gradient, margins [8]) of the moved policy."""
  made = {}

  def run(**options):
    if str(options) not in made:
      task = cases.make_task('nano', params, beta=BETA, **options)
      start = trees.cast_floats(policy, options.get('param_dtype', 'float32'))
      made[str(options)] = jax.device_get(
        jax.jit(jax.grad(_mean_loss(task), has_aux=True))(start)
      )
    return made[str(options)]

  return run


def _apart(grads, wanted):
  grads, wanted = (trees.cast_floats(x, jnp.float32) for x in (grads, wanted))
  difference = jax.tree.map(np.subtract, grads, wanted)
  return float(trees.global_norm(difference) / trees.global_norm(wanted))


@pytest.mark.parametrize(
  'options',
  [
    {'sequential': True},
    {'compute_errs': reference.loop},
    pytest.param(
      {'compute_errs': reference.loop, 'sequential': True},
      marks=pytest.mark.slow,
    ),
    pytest.param({'compute_errs': reference.revalued}, marks=pytest.mark.slow),
    pytest.param({'ref_dtype': BFLOAT16}, marks=pytest.mark.slow),
  ],
  ids=_name,
)
def test_options_keep_the_float32_gradient(gradient, options):
  wanted, margins = gradient()
  # The policy has left its reference, so that the pairs weigh differently.
  assert margins.std() > 0.1
  found, found_margins = gradient(**options)
  assert _apart(found, wanted) < EXACT
  np.testing.assert_allclose(found_margins, margins, atol=2e-4)


@pytest.mark.parametrize(
  'options',
  [
    {},
    *(
      pytest.param(options, marks=pytest.mark.slow)
      for options in (
        {'compute_errs': reference.separate},
        {'residual_dtype': 'float32'},
        {'ref_dtype': BFLOAT16, 'param_dtype': BFLOAT16},
        {'sequential': True},
        {'remat': 'full'},
        {'remat': 'dots'},
        {'remat': 'names'},
      )
    ),
  ],
  ids=_name,
)
def test_bfloat16_gradients_are_float32s_but_for_rounding(gradient, options):
  found, _ = gradient(dtype='bfloat16', **options)
  apart = _apart(found, gradient()[0])
  assert 1e-4 < apart < ROUNDED


def test_microbatches_in_bfloat16_are_as_one_batch(params, policy, gradient):
  task = cases.make_task('nano', params, beta=BETA, dtype='bfloat16')
  batch = cases.random_batch('nano', PAIRS)
  optimizer = optax.sgd(1.0)
  state = state_lib.init_state(policy, optimizer, use_ema=False)
  step = jax.jit(step_lib.make_step(task.loss, optimizer, accumulate=4))
  after, _ = step(state, task.frozen, batch, jax.random.key(0))
  found = jax.tree.map(np.subtract, policy, jax.device_get(after.params))
  assert _apart(found, gradient(dtype='bfloat16')[0]) < ROUNDED
  assert _apart(found, gradient()[0]) < ROUNDED


def test_the_loop_costs_no_pass_and_the_sequential_pair_one(params, policy):
  def count(**options):
    task = cases.make_task('nano', params, beta=BETA, **options)
    return flops.count(jax.grad(_mean_loss(task), has_aux=True), policy)

  plain = count()
  assert count(compute_errs=reference.loop) == plain
  # Six of eight passes are the policy's, and two are made again.
  assert 1.2 < count(sequential=True) / plain < 1.3


def test_the_reference_is_stored_as_it_is_computed_with():
  params = cases.random_params('nano')
  task = cases.make_task('nano', params, dtype='bfloat16', ref_dtype='auto')
  ref, policy = task.frozen['ref'], task.params['unet']
  assert ref['conv_in']['kernel'].dtype == jnp.bfloat16
  assert ref['conv_norm_out']['scale'].dtype == jnp.float32
  assert policy['conv_in']['kernel'].dtype == jnp.float32
  # The policy is not rounded, and both are the same to the step.
  jax.tree.map(np.testing.assert_array_equal, policy, params)
  prepared, frozen = task.loss.prepare(task.params, task.frozen)
  jax.tree.map(np.testing.assert_array_equal, prepared['unet'], frozen['ref'])


def test_rounded_weights_start_policy_and_reference_alike():
  params = cases.random_params('nano')
  for stored in (
    {'ref_dtype': jnp.bfloat16},
    {'param_dtype': jnp.bfloat16},
    {'ref_dtype': jnp.bfloat16, 'param_dtype': jnp.bfloat16},
  ):
    task = cases.make_task('nano', params, **stored)
    policy, ref = task.params['unet'], task.frozen['ref']
    dtypes = {
      'param_dtype': jax.tree.leaves(policy)[0].dtype,
      'ref_dtype': jax.tree.leaves(ref)[0].dtype,
    }
    for name, dtype in dtypes.items():
      assert dtype == jnp.dtype(stored.get(name, 'float32'))
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(
        np.asarray(a, np.float32), np.asarray(b, np.float32)
      ),
      policy,
      ref,
    )
