import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import trees
from dpo_jax.models import unet
from dpo_jax.weights import diffusers_maps

TINY = dict(
  block_out_channels=(16, 32),
  down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
  up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
  layers_per_block=1,
  norm_num_groups=8,
  cross_attention_dim=24,
  attention_head_dim=4,
)
# Tiny relatives of released models, and options that those do not use.
VARIANTS = {
  'sd15': dict(
    block_out_channels=(16, 32, 32, 32),
    down_block_types=('CrossAttnDownBlock2D',) * 3 + ('DownBlock2D',),
    up_block_types=('UpBlock2D',) + ('CrossAttnUpBlock2D',) * 3,
    layers_per_block=2,
    attention_head_dim=8,
  ),
  'sd2': dict(
    block_out_channels=(16, 32, 64),
    down_block_types=('CrossAttnDownBlock2D',) * 2 + ('DownBlock2D',),
    up_block_types=('UpBlock2D',) + ('CrossAttnUpBlock2D',) * 2,
    attention_head_dim=(2, 4, 8),
    use_linear_projection=True,
    upcast_attention=True,
  ),
  'uneven': dict(
    layers_per_block=(1, 2),
    transformer_layers_per_block=(2, 1),
    attention_head_dim=(2, 8),
    norm_eps=1e-3,
    in_channels=5,
    out_channels=3,
  ),
  'time': dict(flip_sin_to_cos=False, freq_shift=1, center_input_sample=True),
}


def _inputs(config, *, size=(8, 8), seed=0):
  rng = np.random.default_rng(seed)
  x_t = rng.standard_normal((2, *size, config.in_channels), dtype=np.float32)
  embeds = rng.standard_normal(
    (2, 7, config.cross_attention_dim), dtype=np.float32
  )
  return x_t, np.array([3, 951], np.int32), embeds


@pytest.mark.parametrize('size', [(8, 16), (9, 7)])
@pytest.mark.parametrize('variant', VARIANTS)
def test_values_equal_diffusers(variant, size, from_torch):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  torch.manual_seed(0)
  options = TINY | VARIANTS[variant]
  reference = diffusers.UNet2DConditionModel(**options).eval()
  config, params = from_torch('unet', reference)
  x_t, t, embeds = _inputs(config, size=size)
  with torch.no_grad():
    expected = reference(
      torch.from_numpy(x_t).permute(0, 3, 1, 2),
      torch.from_numpy(t),
      torch.from_numpy(embeds),
    ).sample.permute(0, 2, 3, 1)
  apply = jax.jit(unet.UNet2DConditionModel(config).apply)
  output = apply({'params': params}, x_t, t, embeds)
  assert np.abs(expected.numpy()).max() > 0.1
  np.testing.assert_allclose(output, expected.numpy(), atol=1e-4, rtol=0)


# SD 1.x and 2.x by their released config.json; 865,910,724 is what PyTorch
# diffusers 0.42.1 counts for the second.
@pytest.mark.parametrize(
  'options, expected',
  [
    (dict(cross_attention_dim=768), 859_520_964),
    (
      dict(
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
      ),
      865_910_724,
    ),
  ],
)
def test_full_size_parameter_count(options, expected):
  config = unet.UNetConfig.from_dict(options)
  shapes = diffusers_maps.COMPONENTS['unet'].init_shapes(config)
  assert trees.count(shapes) == expected
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {
    jnp.dtype('float32')
  }


def test_remat_changes_no_value_and_no_gradient(random_params):
  one_level = dict(
    block_out_channels=(16,),
    down_block_types=('CrossAttnDownBlock2D',),
    up_block_types=('CrossAttnUpBlock2D',),
  )
  config = unet.UNetConfig(**(TINY | one_level))
  params, inputs = random_params('unet', config), _inputs(config)

  def run(remat):
    model = unet.UNet2DConditionModel(config, remat=remat)

    def loss(params):
      return jnp.mean(jnp.square(model.apply({'params': params}, *inputs)))

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params))
    return jaxpr, jax.jit(jax.value_and_grad(loss))(params)

  plain, (value, grads) = run('none')
  rematted, (value_remat, grads_remat) = run('full')
  assert 'remat' in rematted and 'remat' not in plain
  np.testing.assert_allclose(value, value_remat, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    grads,
    grads_remat,
  )


def test_bfloat16_compute_gives_float32_near_the_same(random_params):
  config = unet.UNetConfig(**TINY)
  params, inputs = random_params('unet', config), _inputs(config)
  apply = jax.jit(unet.UNet2DConditionModel(config).apply)
  exact = apply({'params': params}, *inputs)
  model = unet.UNet2DConditionModel(config, dtype=jnp.bfloat16)
  apply = jax.jit(functools.partial(model.apply, capture_intermediates=True))
  output, state = apply({'params': params}, *inputs)
  assert output.dtype == jnp.float32
  inner = state['intermediates']['mid_block']['__call__'][0]
  assert inner.dtype == jnp.bfloat16
  scale = np.abs(exact).max()
  np.testing.assert_allclose(output / scale, exact / scale, atol=0.05)


def test_init_predicts_zero():
  config = unet.UNetConfig(**TINY)
  inputs, model = _inputs(config), unet.UNet2DConditionModel(config)
  variables = jax.jit(model.init)(jax.random.key(0), *inputs)
  assert list(variables) == ['params']
  zero = {
    trees.leaf_name(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params'])
    if path[-1].key == 'kernel' and not np.any(leaf)
  }
  assert all(
    name.split('/')[-2] in ('conv_out', 'conv2', 'proj_out') for name in zero
  )
  assert {'conv_out/kernel', 'mid_block/resnets_1/conv2/kernel'} <= zero
  assert 'mid_block/attentions_0/proj_out/kernel' in zero
  assert not np.any(jax.jit(model.apply)(variables, *inputs))


@pytest.mark.parametrize(
  'options, words',
  [
    (dict(act_fn='gelu'), ['act_fn', "'gelu'", "'silu'"]),
    (dict(mid_block_type=None), ['mid_block_type', 'None', 'CrossAttn']),
    (dict(addition_embed_type='text_time'), ['addition_embed_type']),
    (dict(only_cross_attention=True), ['only_cross_attention', 'True']),
    (dict(only_cross_attention=0), ['only_cross_attention', '0', 'False']),
    (dict(num_attention_heads=8), ['num_attention_heads', '8', 'None']),
    (dict(layer_per_block=2), ['layer_per_block', "'layers_per_block'"]),
    (dict(down_block_types=['SkipDownBlock2D'] * 2), ['down_block_types']),
    (dict(up_block_types=['UpBlock2D']), ['up_block_types', '2 (as']),
    (dict(attention_head_dim=3), ['attention_head_dim', '(3, 3)', 'divide']),
    (dict(attention_head_dim=[4, 4, 4]), ['attention_head_dim', '2 integers']),
    (dict(layers_per_block=[1, '2']), ['layers_per_block', "'2'"]),
    (dict(norm_num_groups=5), ['norm_num_groups', '5', '(16, 32)']),
    (dict(norm_eps='small'), ['norm_eps', "'small'", 'number above 0']),
    (dict(cross_attention_dim=[24, 24]), ['cross_attention_dim', 'integer']),
    (dict(block_out_channels=16), ['block_out_channels', '16', 'list']),
    (dict(use_linear_projection=1), ['use_linear_projection', 'true']),
  ],
)
def test_unsupported_options_are_named(options, words):
  with pytest.raises(ValueError) as error:
    unet.UNetConfig.from_dict(TINY | options)
  assert all(word in str(error.value) for word in words), error.value
  assert 'UNetConfig' in str(error.value)


def test_config_is_hashable_and_ignores_what_is_harmless():
  values = TINY | dict(_class_name='x', _diffusers_version='y', sample_size=64)
  config = unet.UNetConfig.from_dict(
    values | dict(block_out_channels=[16, 32], layers_per_block=[1, 1])
  )
  assert config == unet.UNetConfig(**TINY)
  assert hash(config) == hash(unet.UNetConfig(**TINY))


def test_wrong_calls_are_named():
  config = unet.UNetConfig(**TINY)
  x_t, t, embeds = _inputs(config)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match=r'width 23 .*cross_attention_dim=24'):
    unet.UNet2DConditionModel(config).init(key, x_t, t, embeds[..., 1:])
  with pytest.raises(ValueError, match="remat='some'; allowed: none, full"):
    unet.UNet2DConditionModel(config, remat='some').init(key, x_t, t, embeds)
