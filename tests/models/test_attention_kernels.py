"""The attention backends against plain attention, and what they keep."""

import functools
import importlib.util
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from jax.experimental import topologies

from dpo_jax import sharding
from dpo_jax.models import attention, attention_kernels, unet, vae
from dpo_jax.weights import diffusers_maps


def _inputs(n, queries, keys, heads, width, dtype=jnp.float32):
  parts = jax.random.split(jax.random.key(0), 3)
  shapes = [(n, length, heads, width) for length in (queries, keys, keys)]
  return [
    jax.random.normal(key, shape).astype(dtype)
    for key, shape in zip(parts, shapes, strict=True)
  ]


def _value_and_grads(attend):
  """(q, k, v) -> the output and three gradients that weigh it unevenly."""

  def total(q, k, v):
    out = attend(q, k, v).astype(jnp.float32)
    return jnp.sum(jnp.sin(3 * out)), out

  def compute(q, k, v):
    grads, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return (out, *grads)

  return compute


def _assert_close(found, wanted, share):
  """Largest difference of each array at most `share` of its largest entry."""
  for a, b in zip(found, wanted, strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(a - b).max() <= share * np.abs(b).max()


@pytest.mark.parametrize('is_causal', [False, True])
@pytest.mark.parametrize('scores', [7 * 24, 24, 5])
def test_runs_of_queries_equal_all_at_once(monkeypatch, is_causal, scores):
  # 22 queries: runs of 7, which do not divide them, and of one.
  attend = functools.partial(attention_kernels.xla, is_causal=is_causal)
  arrays = _inputs(2, 22, 24, 3, 4)
  wanted = jax.jit(_value_and_grads(attend))(*arrays)
  monkeypatch.setattr(attention_kernels, 'MAX_SCORES', scores)
  found = jax.jit(_value_and_grads(attend))(*arrays)
  # Float32: sums of up to 24 terms in another order.
  _assert_close(found, wanted, 2e-6)


@pytest.mark.parametrize(
  ('dtype', 'share'),
  # Float32: 1,024 terms in another order. bfloat16: its half unit is 2**-9,
  # and out, the weights and their gradient are each rounded to it.
  [(jnp.float32, 1e-5), (jnp.bfloat16, 4 * 2**-9)],
)
@pytest.mark.parametrize('tensor', [1, 2])
def test_splash_equals_xla_on_every_device(monkeypatch, dtype, share, tensor):
  monkeypatch.setitem(
    attention_kernels.KERNELS,
    'splash',
    functools.partial(attention_kernels.splash, interpret=True),
  )
  arrays = _inputs(4, 1024, 1024, 2, 40, dtype)
  wanted = jax.jit(_value_and_grads(attention_kernels.xla))(*arrays)
  mesh = sharding.make_mesh(
    data=2, fsdp=2, tensor=tensor, devices=jax.devices()[: 4 * tensor]
  )
  attend = functools.partial(attention_kernels.run, 'splash')
  placed = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in arrays]
  compute = jax.jit(sharding.over(mesh, _value_and_grads(attend)))
  assert 'pallas_call' in str(compute.trace(*placed).jaxpr)
  _assert_close(compute(*placed), wanted, share)


def test_cudnn_gets_each_devices_images(monkeypatch):
  seen = []

  def fake(q, k, v, *, implementation):
    seen.append((implementation, q.shape))
    return attention_kernels.xla(q, k, v)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', fake)
  mesh = sharding.make_mesh(data=4, fsdp=2)
  arrays = _inputs(8, 16, 16, 2, 8, jnp.bfloat16)
  attend = functools.partial(attention.attend, backend='cudnn')
  attend = jax.jit(sharding.over(mesh, attend))
  rows = sharding.batch_sharding(mesh)
  out = attend(*(jax.device_put(x, rows) for x in arrays))
  assert seen == [('cudnn', (1, 16, 2, 8))]
  wanted = attention_kernels.xla(*arrays)
  _assert_close([out], [wanted], 2**-8)
  # An odd number of keys, and a batch that does not split, are xla's.
  for n, keys in ((8, 77), (6, 16)):
    attend.trace(*_inputs(n, 16, keys, 2, 8))
  assert len(seen) == 1


@pytest.mark.parametrize(
  ('queries', 'keys', 'width', 'dtype', 'cudnn', 'splash'),
  [
    (4096, 4096, 64, jnp.bfloat16, True, True),
    (4096, 4096, 40, jnp.float16, True, True),
    (1024, 1024, 80, jnp.float32, False, True),
    (256, 256, 160, jnp.bfloat16, False, False),
    (256, 256, 64, jnp.bfloat16, True, False),
    (4096, 77, 64, jnp.bfloat16, False, False),
    (1089, 1089, 64, jnp.bfloat16, False, False),
    (4096, 4096, 36, jnp.bfloat16, False, True),
  ],
)
def test_what_the_kernels_take(queries, keys, width, dtype, cudnn, splash):
  q = jax.ShapeDtypeStruct((1, queries, 8, width), dtype)
  k = jax.ShapeDtypeStruct((1, keys, 8, width), dtype)
  assert attention_kernels.takes_cudnn(q, k) == cudnn
  assert attention_kernels.takes_splash(q, k) == splash


@pytest.mark.parametrize(
  ('name', 'platform', 'dtype', 'backend'),
  [
    ('auto', 'cpu', 'bfloat16', 'xla'),
    ('auto', 'tpu', 'bfloat16', 'splash'),
    ('auto', 'tpu', 'float32', 'splash'),
    ('auto', 'gpu', 'bfloat16', 'cudnn'),
    ('auto', 'cuda', 'float16', 'cudnn'),
    ('auto', 'gpu', 'float32', 'xla'),
    ('xla', 'tpu', 'bfloat16', 'xla'),
    ('cudnn', 'gpu', 'bfloat16', 'cudnn'),
  ],
)
def test_the_backend_follows_the_mesh(name, platform, dtype, backend):
  assert attention.choose(name, platform=platform, dtype=dtype) == backend


@pytest.mark.parametrize(
  ('name', 'platform', 'dtype', 'words'),
  [
    ('cudnn', 'cpu', 'bfloat16', 'runs on gpu only, and this is cpu'),
    ('splash', 'gpu', 'bfloat16', 'runs on tpu only, and this is gpu'),
    ('cudnn', 'gpu', 'float32', 'half precision only'),
  ],
)
def test_a_backend_that_cannot_run_is_refused(name, platform, dtype, words):
  with pytest.raises(ValueError, match=words):
    attention.choose(name, platform=platform, dtype=dtype)


def _shapes(jaxpr):
  """Shapes of all that a jaxpr computes, inner ones included."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield variable.aval.shape
    for value in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _shapes(inner)


def _largest_scores(function, *arguments, tokens):
  """Most elements over two axes that both count tokens."""
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  return max(
    math.prod(sorted(axis for axis in shape if axis in tokens)[-2:])
    for shape in _shapes(jaxpr)
    if sum(axis in tokens for axis in shape) >= 2
  )


def _initial(component, release, **changes):
  entry = diffusers_maps.COMPONENTS[component]
  config = entry.make_config(released.COMPONENTS[component][release] | changes)
  return config, entry.init_shapes(config)


def test_sdxl_at_1024_pixels_makes_no_square_of_tokens():
  """Of its gradient; latents 128x128, 4,096 tokens.

  One layer where the released UNet has several: they have the same shapes.
  """
  config, params = _initial(
    'unet', 'sdxl', layers_per_block=1, transformer_layers_per_block=[1] * 3
  )
  module = unet.UNet2DConditionModel(config, dtype=jnp.bfloat16, remat='full')
  inputs = [
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((1, 128, 128, 4), (1,), (1, 77, 2048), (1, 1280), (1, 6))
  ]

  def total(params, *inputs):
    return jnp.sum(module.apply({'params': params}, *inputs))

  # Runs of 512 queries by 4,096 keys; 77 are the text's.
  tokens = {77, 512, 1024, 4096}
  found = _largest_scores(jax.grad(total), params, *inputs, tokens=tokens)
  assert found == attention_kernels.MAX_SCORES == 512 * 4096


def test_the_vae_at_1024_pixels_makes_no_square_of_tokens():
  config, params = _initial('vae', 'sd15')
  module = vae.AutoencoderKL(config)
  images = jax.ShapeDtypeStruct((1, 1024, 1024, 3), jnp.float32)

  def encode(params, images):
    return module.apply({'params': params}, images, method='encode')

  found = _largest_scores(encode, params, images, tokens={128, 16384})
  assert found == 128 * 16384


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs libtpu'
)
def test_a_tpu_program_has_the_kernel_and_little_memory(monkeypatch):
  for name in ('TPU_SKIP_MDS_QUERY', 'ALLOW_MULTIPLE_LIBTPU_LOAD'):
    monkeypatch.setitem(os.environ, name, '1')
  devices = topologies.get_topology_desc('v5e:2x2', platform='tpu').devices
  mesh = sharding.make_mesh(data=2, fsdp=2, devices=devices)
  shape = (4, 4096, 10, 64)
  q = jax.ShapeDtypeStruct(
    shape, jnp.bfloat16, sharding=sharding.batch_sharding(mesh)
  )
  backend = attention.choose(
    'auto', platform=devices[0].platform, dtype='bfloat16'
  )
  compute = _value_and_grads(
    functools.partial(attention.attend, backend=backend)
  )
  compiled = jax.jit(sharding.over(mesh, compute)).lower(q, q, q).compile()
  assert 'tpu_custom_call' in compiled.as_text()
  one = math.prod(shape[1:])
  # Some copies of q in float32; the scores would be 640 of them.
  assert compiled.memory_analysis().temp_size_in_bytes <= 16 * 4 * one
