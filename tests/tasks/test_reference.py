"""The paths of policy and reference on a small function: values, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import quantise
from dpo_jax.planning import flops
from dpo_jax.tasks import reference


def _params(seed):
  rng = np.random.default_rng(seed)
  return {
    'a': jnp.asarray(rng.standard_normal((8, 16)) / 3, jnp.float32),
    'b': jnp.asarray(rng.standard_normal((16, 8)) / 4, jnp.float32),
  }


def _inputs():
  rng = np.random.default_rng(5)
  return {
    'x': jnp.asarray(rng.standard_normal((4, 2, 8)), jnp.float32),
    't': jnp.arange(4),
  }


def _err(params, inputs):
  hidden = jnp.tanh(inputs['x'] @ params['a'] + inputs['t'][:, None, None])
  return jnp.mean(jnp.square(hidden @ params['b']), -1)


def _loss(policy, ref, inputs, *, path):
  policy_err, ref_err = path(_err, policy, ref, inputs)
  margin = (ref_err - policy_err) @ jnp.array([1.0, -1.0])
  return jnp.mean(-jax.nn.log_sigmoid(margin)), (policy_err, ref_err)


def _grads(path, argnums=0):
  loss = functools.partial(_loss, path=path)
  return jax.jit(jax.grad(loss, argnums, has_aux=True))


@pytest.mark.parametrize('name', reference.PATHS)
def test_paths_give_the_errors_and_the_gradient_by_hand(name):
  policy, ref, inputs = _params(0), _params(1), _inputs()
  grads, errs = _grads(reference.PATHS[name])(policy, ref, inputs)
  for params, err in zip((policy, ref), errs, strict=True):
    np.testing.assert_allclose(err, _err(params, inputs), rtol=1e-6)

  def by_hand(policy):
    margin = (_err(ref, inputs) - _err(policy, inputs)) @ jnp.array([1.0, -1.0])
    return jnp.mean(-jax.nn.log_sigmoid(margin))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    grads,
    jax.grad(by_hand)(policy),
  )


@pytest.mark.parametrize('name', reference.PATHS)
def test_no_gradient_reaches_the_reference(name):
  grads, _ = _grads(reference.PATHS[name], 1)(_params(0), _params(1), _inputs())
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize('name', reference.PATHS)
def test_a_reference_in_eight_bits_is_as_its_cast_weights(name):
  policy, inputs = _params(0), _inputs()
  ref = {
    key: quantise.quantise(leaf, 'int8') for key, leaf in _params(1).items()
  }
  dense = {key: leaf.astype(jnp.float32) for key, leaf in ref.items()}
  found = _grads(reference.PATHS[name])(policy, ref, inputs)
  wanted = _grads(reference.PATHS[name])(policy, dense, inputs)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    found,
    wanted,
  )


def test_the_loop_differentiates_the_policy_alone_and_carries_no_weights():
  policy, ref, inputs = _params(0), _params(1), _inputs()
  arguments = policy, ref, inputs

  def gradient(name):
    return jax.grad(
      functools.partial(_loss, path=reference.PATHS[name]), has_aux=True
    )

  assert flops.count(gradient('loop'), *arguments) == flops.count(
    gradient('separate'), *arguments
  )
  jaxpr = jax.make_jaxpr(gradient('loop'))(*arguments).jaxpr
  (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan']
  first = scan.params['num_consts']
  carry = scan.invars[first : first + scan.params['num_carry']]
  shapes = {value.aval.shape for value in carry}
  assert shapes and not shapes & {leaf.shape for leaf in policy.values()}


def test_the_loop_works_in_a_loop_over_microbatches():
  policy, ref, inputs = _params(0), _params(1), _inputs()
  halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), inputs)

  def total(policy):
    def body(sum_, half):
      return sum_ + _loss(policy, ref, half, path=reference.loop)[0] / 2, None

    return jax.lax.scan(body, 0.0, halves)[0]

  wanted, _ = _grads(reference.loop)(policy, ref, inputs)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    jax.jit(jax.grad(total))(policy),
    wanted,
  )


def test_the_loop_without_gradient_carries_nothing():
  arguments = _params(0), _params(1), _inputs()
  run = functools.partial(reference.loop, _err)
  policy_err, ref_err = jax.jit(run)(*arguments)
  np.testing.assert_allclose(policy_err, _err(_params(0), _inputs()), rtol=1e-6)
  np.testing.assert_allclose(ref_err, _err(_params(1), _inputs()), rtol=1e-6)


def test_auto_is_the_loop_where_rounding_shows():
  assert reference.choose('auto', 'bfloat16', 'none') is reference.loop
  assert reference.choose('auto', 'float32', 'none') is reference.separate
  assert reference.choose('auto', 'float32', 'full') is reference.loop
  assert reference.choose('revalued', 'float32', 'none') is reference.revalued
