"""FLOPs by hand, through loops and rematerialisation, and of released UNets."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import sharding
from dpo_jax.models import unet
from dpo_jax.planning import flops
from dpo_jax.weights import diffusers_maps, released

F32 = jnp.float32


def _shape(*shape):
  return jax.ShapeDtypeStruct(shape, F32)


def test_products_by_hand():
  out = flops.count(
    lambda a, b: jnp.einsum('bij,bjk->bik', a, b),
    _shape(5, 2, 3),
    _shape(5, 3, 7),
  )
  assert out == 2 * 5 * 2 * 3 * 7


def _conv(x, kernel, stride=1, groups=1):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    'SAME',
    feature_group_count=groups,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


@pytest.mark.parametrize('stride', [1, 2])
def test_a_convolution_and_its_two_gradients_cost_the_same(stride):
  conv = functools.partial(_conv, stride=stride)
  given = _shape(2, 8, 8, 3), _shape(3, 3, 3, 16)
  forward = 2 * (2 * (8 // stride) ** 2 * 16) * 9 * 3
  assert flops.count(conv, *given) == forward
  both = jax.grad(lambda x, k: conv(x, k).sum(), argnums=(0, 1))
  # The sum's gradient needs no forward pass, which is traced all the same.
  assert flops.count(both, *given) == 3 * forward


def test_groups_share_the_inputs():
  conv = functools.partial(_conv, groups=4)
  found = flops.count(conv, _shape(1, 8, 8, 8), _shape(3, 3, 2, 16))
  assert found == 2 * 8 * 8 * 16 * 9 * 2


def test_loops_branches_and_remat():
  weight = _shape(4, 4)
  once = 2 * 4**3

  def scan(w):
    return jax.lax.scan(lambda c, _: (c @ w, None), w, None, length=6)[0]

  assert flops.count(scan, weight) == 6 * once

  def branch(w):
    return jax.lax.cond(w[0, 0] > 0, lambda w: w @ w @ w, lambda w: w @ w, w)

  assert flops.count(branch, weight) == 2 * once

  def loss(layer, w):
    # Two layers with a nonlinearity: what is kept or computed again.
    return jnp.sum(jnp.sin(layer(w, layer(w, w))))

  def layer(w, x):
    return jnp.sin(x @ w)

  plain = flops.count(jax.grad(functools.partial(loss, layer)), weight)
  again = flops.count(
    jax.grad(functools.partial(loss, jax.checkpoint(layer))), weight
  )
  assert plain == 6 * once
  assert again == 8 * once


def test_a_loop_of_unknown_length_is_refused():
  def loop(w):
    return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, w)

  with pytest.raises(ValueError, match='no known length'):
    flops.count(loop, _shape(4, 4))


def test_a_kernel_of_one_device_counts_for_all():
  mesh = sharding.make_mesh()
  spec = jax.sharding.PartitionSpec('data')
  mapped = jax.shard_map(
    lambda x, w: x @ w,
    mesh=mesh,
    in_specs=(spec, jax.sharding.PartitionSpec()),
    out_specs=spec,
  )
  assert flops.count(mapped, _shape(16, 4), _shape(4, 4)) == 2 * 16 * 4 * 4


def test_flash_attention_of_cudnn():
  query, key = _shape(2, 64, 4, 16), _shape(2, 80, 4, 16)
  half = functools.partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16))

  def attend(q, k, v):
    return jax.nn.dot_product_attention(
      *half((q, k, v)), implementation='cudnn'
    )

  try:
    found = flops.count(attend, query, key, key)
  except (RuntimeError, NotImplementedError) as error:
    pytest.skip(f'cuDNN attention cannot be traced here: {error}')
  assert found == 2 * 2 * (2 * 4 * 64 * 80 * 16)


@pytest.mark.parametrize(
  ('family', 'side', 'tera'), [('sd1', 64, 0.803), ('sdxl', 128, 6.761)]
)
def test_released_unets(family, side, tera):
  """One image forward; the figures count attention's products too."""
  values = released.model_configs(family, 'epsilon')['unet']
  component = diffusers_maps.COMPONENTS['unet']
  config = component.make_config(values)
  arguments = [
    _shape(1, side, side, 4),
    jax.ShapeDtypeStruct((1,), jnp.int32),
    _shape(1, 77, config.cross_attention_dim),
  ]
  if family == 'sdxl':
    arguments += [_shape(1, 1280), _shape(1, 6)]
  module = unet.UNet2DConditionModel(config)
  params = {'params': component.init_shapes(config)}
  found = flops.count(module.apply, params, *arguments)
  assert found == pytest.approx(tera * 1e12, rel=2e-3)
