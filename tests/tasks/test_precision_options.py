"""What the preference task's memory and precision options change, and keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import cases, flops
from dpo_jax import trees
from dpo_jax.tasks import reference
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib

PAIRS, RATE = 8, 1e-5


@pytest.fixture(scope='module')
def params():
  return cases.random_params('nano')


def _moved_gradient(params, **options):
  """Loss, gradient [tree] and its FLOPs for a policy off its reference."""
  task = cases.make_task('nano', params, **options)
  batch = cases.random_batch('nano', PAIRS)
  policy = jax.tree.map(lambda leaf: leaf * 1.0002, task.params)

  def mean_loss(policy):
    loss, _ = task.loss(policy, task.frozen, batch, jax.random.key(0))
    return jnp.mean(loss)

  counted = flops.count(jax.grad(mean_loss), policy)
  return *jax.jit(jax.value_and_grad(mean_loss))(policy), counted


def _relative(grads, wanted):
  difference = jax.tree.map(jnp.subtract, grads, wanted)
  return float(trees.global_norm(difference) / trees.global_norm(wanted))


@pytest.fixture(scope='module')
def plain(params):
  return _moved_gradient(params)


@pytest.mark.parametrize(
  ('options', 'tolerance'),
  [
    ({'sequential': True}, 1e-4),
    ({'compute_errs': reference.loop}, 1e-4),
    ({'compute_errs': reference.loop, 'sequential': True}, 1e-4),
  ],
  ids=str,
)
def test_options_keep_the_float32_gradient(params, plain, options, tolerance):
  loss, grads, _ = _moved_gradient(params, **options)
  assert float(plain[0]) != pytest.approx(np.log(2), abs=1e-3)
  assert float(loss) == pytest.approx(float(plain[0]), rel=1e-4)
  assert _relative(grads, plain[1]) < tolerance


def test_bfloat16_gradients_point_where_float32_does(params, plain):
  _, grads, _ = _moved_gradient(params, dtype='bfloat16')
  # The pair's weights are sigmoids of margins that hold bfloat16's rounding.
  assert _relative(grads, plain[1]) < 0.2


def test_the_loop_costs_no_pass_and_the_sequential_pair_one(params, plain):
  looped = _moved_gradient(params, compute_errs=reference.loop)[2]
  assert looped == plain[2]
  one_by_one = _moved_gradient(params, sequential=True)[2]
  # Six of eight passes are the policy's, and two are made again.
  assert plain[2] * 1.2 < one_by_one < plain[2] * 1.3


def test_rounded_weights_start_policy_and_reference_alike(params):
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


def test_microbatches_in_bfloat16_equal_one_batch(params):
  task = cases.make_task('nano', params, dtype='bfloat16')
  batch = cases.random_batch('nano', PAIRS)
  found = []
  for accumulate in (1, 4):
    optimizer = optax.sgd(RATE)
    state = state_lib.init_state(task.params, optimizer, use_ema=False)
    step = jax.jit(
      step_lib.make_step(task.loss, optimizer, accumulate=accumulate)
    )
    state, metrics = step(state, task.frozen, batch, jax.random.key(0))
    assert float(metrics['margin_noise/max']) == 0.0
    found.append((float(metrics['norm/grads']), state.params))
  assert found[0][0] == pytest.approx(found[1][0], rel=0.02)
