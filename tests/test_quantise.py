"""Weights in eight bits: by hand, their error, and beside a policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases
from dpo_jax import quantise, trees


def test_int8_by_hand():
  kernel = jnp.array([[1.0, 0.0, -25.4], [-0.5, 0.0, 10.1]])
  found = quantise.quantise(kernel, 'int8')
  assert found.values.dtype == jnp.int8
  np.testing.assert_array_equal(found.values, [[127, 0, -127], [-64, 0, 50]])
  np.testing.assert_allclose(found.scale, [1 / 127, 1, 0.2], rtol=1e-6)
  np.testing.assert_allclose(
    found.astype(jnp.float32), [[1, 0, -25.4], [-64 / 127, 0, 10]], rtol=1e-6
  )


# Of a channel's largest: half a step of 1/127; and of the entry itself: half
# of the last of three bits behind the point, or near 0 half of 2^-9 / 448.
ERRORS = {'int8': (0.5 / 127, 0.0), 'float8_e4m3fn': (2**-10 / 448, 2**-4)}


@pytest.mark.parametrize('dtype', quantise.LARGEST)
def test_the_error_is_that_of_the_dtype(dtype):
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((3, 3, 8, 16), np.float32) * np.geomspace(
    1e-3, 1e3, 16, dtype=np.float32
  )
  found = np.asarray(quantise.quantise(kernel, dtype).astype(jnp.float32))
  of_largest, of_entry = ERRORS[dtype]
  largest = np.abs(kernel).max((0, 1, 2))
  allowed = of_largest * largest + of_entry * np.abs(kernel)
  difference = np.abs(found - kernel)
  assert (difference <= 1.0001 * allowed).all()
  # And comes near to it: nothing is stored more finely than it says.
  assert (difference > 0.8 * allowed).any()
  np.testing.assert_allclose(np.abs(found).max((0, 1, 2)), largest, rtol=1e-6)


def test_only_kernels_change_and_a_byte_a_weight_is_left():
  params = cases.random_params('nano')
  found = jax.eval_shape(lambda: quantise.quantise_kernels(params, 'int8'))
  names = {
    trees.leaf_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(found)
  }
  assert names['conv_in/kernel/values'].dtype == jnp.int8
  assert names['conv_in/kernel/scale'].shape == (16,)
  assert names['conv_in/bias'].dtype == jnp.float32
  assert trees.num_bytes(found) < 0.33 * trees.num_bytes(params)


@pytest.mark.parametrize('dtype', quantise.LARGEST)
def test_a_policy_has_its_own_weights_and_a_coarser_reference(dtype):
  params = cases.random_params('nano')
  task = cases.make_task('nano', params, ref_dtype=jnp.dtype(dtype))
  jax.tree.map(np.testing.assert_array_equal, task.params['unet'], params)
  kernel = task.frozen['ref']['conv_in']['kernel']
  assert kernel.values.dtype == jnp.dtype(dtype)
  # The step hands it on as it is; the network casts it where it is used.
  _, frozen = task.loss.prepare(task.params, task.frozen)
  assert frozen['ref']['conv_in']['kernel'] is kernel
