import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import released

from dpo_jax import trees
from dpo_jax.models import layers, unet
from dpo_jax.planning import flops

TINY = dict(
  block_out_channels=(16, 32),
  down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
  up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
  layers_per_block=1,
  norm_num_groups=8,
  cross_attention_dim=24,
  attention_head_dim=4,
)
# Every family of releases at a fraction of its width.
FAMILIES = {
  'sd15': dict(
    block_out_channels=[16, 32, 32, 32],
    norm_num_groups=8,
    cross_attention_dim=24,
  ),
  'sd21': dict(
    attention_head_dim=[2, 4, 8, 8],
    block_out_channels=[16, 32, 64, 64],
    norm_num_groups=8,
    cross_attention_dim=24,
  ),
  'sdxl': dict(
    attention_head_dim=[1, 2, 4],
    block_out_channels=[16, 32, 64],
    norm_num_groups=8,
    cross_attention_dim=24,
    transformer_layers_per_block=[1, 2, 3],
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=20 + 6 * 8,
  ),
  'sdxl_refiner': dict(
    attention_head_dim=[1, 2, 4, 4],
    block_out_channels=[16, 32, 64, 64],
    norm_num_groups=8,
    cross_attention_dim=20,
    transformer_layers_per_block=2,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=20 + 5 * 8,
  ),
}
# Options, some of which no release uses, beside TINY.
VARIANTS = {
  'uneven': dict(
    layers_per_block=(1, 2),
    transformer_layers_per_block=(2, 1),
    attention_head_dim=(2, 8),
    norm_eps=1e-3,
    in_channels=5,
    out_channels=3,
  ),
  'time': dict(flip_sin_to_cos=False, freq_shift=1, center_input_sample=True),
  'linear_text_time': dict(
    use_linear_projection=True,
    flip_sin_to_cos=False,
    freq_shift=1,
    addition_embed_type='text_time',
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=20 + 3 * 6,
  ),
  'scale_shift': dict(resnet_time_scale_shift='scale_shift'),
  'plain_mid_block': dict(
    mid_block_type='UNetMidBlock2D',
    resnet_time_scale_shift='scale_shift',
    cross_attention_dim=[24, 7],
  ),
  'no_mid_block': dict(
    mid_block_type=None,
    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
    layers_per_block=2,
    transformer_layers_per_block=[1, [2, 1]],
    reverse_transformer_layers_per_block=[1, [1, 3, 2]],
  ),
  'reverse_depths': dict(
    up_block_types=('CrossAttnUpBlock2D',) * 2,
    layers_per_block=[1, 2],
    transformer_layers_per_block=[2, [2, 1]],
    reverse_transformer_layers_per_block=[[1, 2, 1], 1],
    cross_attention_dim=[24, 24],
  ),
}
CASES = {
  **{name: released.UNET[name] | values for name, values in FAMILIES.items()},
  **{name: TINY | values for name, values in VARIANTS.items()},
}


def _inputs(config, *, size=(8, 8), seed=0):
  rng = np.random.default_rng(seed)
  x_t = rng.standard_normal((2, *size, config.in_channels), dtype=np.float32)
  embeds = rng.standard_normal(
    (2, 7, config.cross_attention_dim), dtype=np.float32
  )
  inputs = (x_t, np.array([3, 951], np.int32), embeds)
  if config.addition_embed_type is not None:
    dim = config.addition_time_embed_dim
    numbers = (config.projection_class_embeddings_input_dim - 20) // dim
    pooled = rng.standard_normal((2, 20), dtype=np.float32)
    sizes = rng.choice([0, 6, 768, 1024], (2, numbers)).astype(np.float32)
    inputs += (pooled, sizes)
  return inputs


def _run_torch(reference, inputs):
  torch = pytest.importorskip('torch')
  x_t, t, embeds, *added = map(torch.from_numpy, inputs)
  if added:
    added = {'text_embeds': added[0], 'time_ids': added[1]}
  with torch.no_grad():
    return reference(
      x_t.permute(0, 3, 1, 2), t, embeds, added_cond_kwargs=added or None
    ).sample


# Odd sizes take another way up; every case at both would take minutes.
@pytest.mark.parametrize(
  'case, size',
  [(case, (8, 16)) for case in CASES]
  + [(case, (9, 7)) for case in ('sd15', 'sd21', 'uneven', 'time')],
)
def test_every_module_equals_diffusers(case, size, from_torch):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  torch.manual_seed(0)
  reference = diffusers.UNet2DConditionModel.from_config(CASES[case]).eval()
  config, params = from_torch('unet', reference)
  recorded, inputs = parity.record(reference), _inputs(config, size=size)
  expected = _run_torch(reference, inputs)
  apply = functools.partial(
    unet.UNet2DConditionModel(config).apply, capture_intermediates=True
  )
  output, state = jax.jit(apply)({'params': params}, *inputs)
  assert expected.abs().max() > 0.1
  parity.assert_equal(output, expected)
  errors = parity.compare_modules('unet', state['intermediates'], recorded)
  # Nothing with parameters was left out.
  owners = {name.rpartition('.')[0] for name, _ in reference.named_parameters()}
  assert owners <= errors.keys()


@pytest.fixture(scope='module')
def rematted(random_params):
  """Remat policy -> (loss function, params) of a UNet of one level."""
  one_level = dict(
    block_out_channels=(16,),
    down_block_types=('CrossAttnDownBlock2D',),
    up_block_types=('CrossAttnUpBlock2D',),
  )
  config = unet.UNetConfig(**(TINY | one_level))
  params, inputs = random_params('unet', config), _inputs(config)

  def make(remat):
    model = unet.UNet2DConditionModel(config, remat=remat)

    def loss(params):
      return jnp.mean(jnp.square(model.apply({'params': params}, *inputs)))

    return loss, params

  return make


@pytest.fixture(scope='module')
def plain_gradient(rematted):
  loss, params = rematted('none')
  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize('remat', unet.REMAT[1:])
def test_remat_changes_no_value_and_no_gradient(
  rematted, plain_gradient, remat
):
  loss, params = rematted(remat)
  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, plain_gradient[0], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    grads,
    plain_gradient[1],
  )


def test_each_remat_policy_computes_less_again_than_the_next(rematted):
  counts = {}
  for remat in unet.REMAT:
    loss, params = rematted(remat)
    counts[remat] = flops.count(jax.grad(loss), params)
  assert counts['none'] < counts['dots'] < counts['names'] < counts['full']
  # A forward pass more at most, which is half of a backward pass.
  assert counts['full'] < 4 / 3 * counts['none']


def test_full_remat_keeps_what_runs_from_block_to_block_and_no_more(
  random_params,
):
  config = unet.UNetConfig(**TINY)
  params, inputs = random_params('unet', config), _inputs(config)
  model = unet.UNet2DConditionModel(config, remat='full')
  _, pullback = jax.vjp(
    lambda params: model.apply({'params': params}, *inputs), params
  )
  n, h, w, channels = inputs[0].shape
  # Kernels are 1 or 3 high.
  assert n == 2
  shapes = [leaf.shape for leaf in jax.tree.leaves(pullback)]
  kept = {shape for shape in shapes if len(shape) > 3 and shape[0] == n}
  widths = config.block_out_channels
  allowed = {(n, h, w, channels), (n, h, w, widths[0])}
  for i, width in enumerate(widths):
    allowed |= {(n, h >> i, w >> i, width)}
    # What a level is given by the one above it.
    allowed |= {(n, h >> i, w >> i, widths[max(i - 1, 0)])}
  up = (n, h, w, widths[1])
  # No parts of norms, and no skips joined to what they meet.
  assert kept <= allowed | {up}, kept - allowed
  # What the upsampler's convolution makes, not what it takes.
  assert shapes.count(up) == 1


def test_group_norms_keep_no_float32_copies():
  norm = layers.group_norm(8, 1e-5, dtype=jnp.bfloat16, name=None)
  x = jnp.ones((2, 4, 4, 16), jnp.bfloat16)
  params = norm.init(jax.random.key(0), x)
  _, pullback = jax.vjp(lambda x: norm.apply(params, x), x)
  kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size >= x.size]
  assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]


@pytest.mark.parametrize('scale_shift', [False, True])
def test_a_residual_block_keeps_what_its_convolutions_take(scale_shift):
  block = layers.ResnetBlock2D(
    16, 8, 1e-5, scale_shift=scale_shift, dtype=jnp.bfloat16
  )
  x, time = jnp.ones((2, 4, 4, 8), jnp.bfloat16), jnp.ones((2, 6))
  params = block.init(jax.random.key(0), x, time)
  _, pullback = jax.vjp(lambda x: block.apply(params, x, time), x)
  kept = [
    leaf for leaf in jax.tree.leaves(pullback) if leaf.shape[:2] == (2, 4)
  ]
  assert {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.bfloat16)}
  # x, what each of the two takes, and what the second norm takes.
  assert len(kept) <= 4


def test_a_float32_stream_is_nearer_to_float32(random_params):
  config = unet.UNetConfig(**TINY)
  params, inputs = random_params('unet', config), _inputs(config)

  def run(**options):
    model = unet.UNet2DConditionModel(config, **options)
    apply = functools.partial(model.apply, capture_intermediates=True)
    output, state = jax.jit(apply)({'params': params}, *inputs)
    inner = state['intermediates']['mid_block']['__call__'][0]
    return np.asarray(output), inner.dtype

  exact, _ = run()
  plain, dtype = run(dtype=jnp.bfloat16)
  assert dtype == jnp.bfloat16
  stream, dtype = run(dtype=jnp.bfloat16, residual_dtype=jnp.float32)
  assert dtype == jnp.float32
  errors = [np.sqrt(np.mean(np.square(x - exact))) for x in (plain, stream)]
  assert 0 < errors[1] < errors[0]


@pytest.mark.parametrize('options', [{}, VARIANTS['linear_text_time']])
def test_bfloat16_compute_gives_float32_near_the_same(options, random_params):
  config = unet.UNetConfig(**(TINY | options))
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


def test_wrong_calls_are_named():
  config = unet.UNetConfig(**TINY)
  x_t, t, embeds = _inputs(config)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match=r'width 23 .*cross_attention_dim=24'):
    unet.UNet2DConditionModel(config).init(key, x_t, t, embeds[..., 1:])
  with pytest.raises(
    ValueError, match="remat='some'; allowed: none, full, dots"
  ):
    unet.UNet2DConditionModel(config, remat='some').init(key, x_t, t, embeds)


@pytest.mark.parametrize(
  'pooled, numbers, words',
  [
    (None, 6, ['no pooled_embeds', "'text_time'"]),
    (20, None, ['no micro_cond', "'text_time'"]),
    (None, None, ['no pooled_embeds and no micro_cond']),
    (20, 5, ['width 20', '5 numbers', '20 + 5 * 8 = 60', 'input_dim=68']),
    (21, 6, ['width 21', '6 numbers', '21 + 6 * 8 = 69', 'input_dim=68']),
  ],
)
def test_wrong_conditioning_is_named(pooled, numbers, words):
  config = unet.UNetConfig.from_dict(CASES['sdxl'])
  inputs = _inputs(config)[:3]
  pooled = None if pooled is None else np.zeros((2, pooled), np.float32)
  sizes = None if numbers is None else np.zeros((2, numbers), np.float32)
  with pytest.raises(ValueError) as error:
    unet.UNet2DConditionModel(config).init(
      jax.random.key(0), *inputs, pooled, sizes
    )
  assert all(word in str(error.value) for word in words), error.value
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['pooled_embeds', 'micro_cond'])
def test_conditioning_that_is_not_taken_is_named(name):
  config = unet.UNetConfig(**TINY)
  with pytest.raises(ValueError, match=f'{name} given .*=None, which takes'):
    unet.UNet2DConditionModel(config).init(
      jax.random.key(0), *_inputs(config), **{name: np.zeros((2, 6))}
    )
