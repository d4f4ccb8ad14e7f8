"""UNet2DModel beside diffusers', its weights on disk, and its options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from dpo_jax.models import unet_2d
from dpo_jax.planning import flops
from dpo_jax.weights import diffusers_maps, mapping, safetensors_io

TINY = dict(
  in_channels=1,
  out_channels=1,
  block_out_channels=(8, 16),
  down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
  up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
  layers_per_block=1,
  norm_num_groups=4,
  attention_head_dim=4,
)
ONE_LEVEL = dict(
  block_out_channels=(8,),
  down_block_types=('AttnDownBlock2D',),
  up_block_types=('UpBlock2D',),
)
CASES = {
  # As of the DDPM models that Ho et al. trained: one wide head, old padding.
  'ddpm': TINY
  | dict(
    in_channels=3,
    out_channels=3,
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
  ),
  'plain_mid_block': TINY
  | dict(
    down_block_types=('DownBlock2D',) * 2,
    up_block_types=('UpBlock2D', 'AttnUpBlock2D'),
    layers_per_block=2,
    add_attention=False,
    center_input_sample=True,
  ),
  'no_mid_block': TINY
  | ONE_LEVEL
  | dict(mid_block_type=None, out_channels=2, norm_eps=1e-3),
  'scale_shift': TINY | dict(resnet_time_scale_shift='scale_shift'),
}


def _inputs(config, size=(8, 12)):
  rng = np.random.default_rng(0)
  shape = (2, *size, config.in_channels)
  x_t = rng.standard_normal(shape, dtype=np.float32)
  return x_t, np.array([3, 951], np.int32)


@pytest.mark.parametrize('case', CASES)
def test_every_module_equals_diffusers(case, from_torch):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  torch.manual_seed(0)
  reference = diffusers.UNet2DModel(**CASES[case]).eval()
  config, params = from_torch('unet', reference)
  assert config == unet_2d.UNet2DConfig(**CASES[case])
  recorded, (x_t, t) = parity.record(reference), _inputs(config)
  with torch.no_grad():
    expected = reference(
      torch.from_numpy(x_t).permute(0, 3, 1, 2), torch.from_numpy(t)
    ).sample
  apply = functools.partial(
    unet_2d.UNet2DModel(config).apply, capture_intermediates=True
  )
  output, state = jax.jit(apply)({'params': params}, x_t, t)
  assert expected.abs().max() > 0.1
  difference = output - expected.permute(0, 2, 3, 1).numpy()
  assert np.abs(difference).max() < 1e-5
  errors = parity.compare_modules('unet', state['intermediates'], recorded)
  # Nothing with parameters was left out.
  owners = {name.rpartition('.')[0] for name, _ in reference.named_parameters()}
  assert owners <= errors.keys()


def test_weights_go_to_disk_and_back_bitwise(random_params, tmp_path):
  config = unet_2d.UNet2DConfig(**TINY)
  params = random_params('unet', config)
  save = functools.partial(
    diffusers_maps.save_component, 'unet', config=config, dtype='float32'
  )
  save(tmp_path, params=params)
  (path,) = tmp_path.glob('*.safetensors')
  tensors = safetensors_io.load(path)
  attention = 'down_blocks.1.attentions.0'
  names = ('group_norm', 'to_q', 'to_k', 'to_v', 'to_out.0')
  assert {
    f'{attention}.{n}.{p}' for n in names for p in ('weight', 'bias')
  } == {name for name in tensors if name.startswith(attention)}
  rules = diffusers_maps.COMPONENTS['unet'].rules
  back = mapping.to_flax(tensors, params, rules, 'file')
  jax.tree.map(np.testing.assert_array_equal, back, params)
  # diffusers before 0.17 wrote the Ho et al. models with other names.
  old = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value'}
  old |= {'to_out.0': 'proj_attn'}
  renamed = {}
  for name, tensor in tensors.items():
    for new, word in old.items():
      name = name.replace(f'.{new}.', f'.{word}.')
    renamed[name] = tensor
  assert renamed.keys() != tensors.keys()
  back = mapping.to_flax(renamed, params, rules, 'file')
  jax.tree.map(np.testing.assert_array_equal, back, params)
  del tensors['conv_in.bias']
  with pytest.raises(ValueError, match=r'1 missing: conv_in\.bias'):
    mapping.to_flax(tensors, params, rules, 'file')


def test_remat_and_half_precision_compute_the_same(random_params):
  config = unet_2d.UNet2DConfig(**(TINY | ONE_LEVEL))
  params, inputs = random_params('unet', config), _inputs(config, (4, 4))

  def run(params, **options):
    model = unet_2d.UNet2DModel(config, **options)
    return jnp.mean(jnp.square(model.apply({'params': params}, *inputs)))

  def count(remat):
    return flops.count(jax.grad(functools.partial(run, remat=remat)), params)

  assert count('none') < count('full') < 4 / 3 * count('none')
  exact, again, half, stream = (
    float(jax.jit(functools.partial(run, **options))(params))
    for options in (
      {},
      {'remat': 'full'},
      {'dtype': jnp.bfloat16},
      {'dtype': jnp.bfloat16, 'residual_dtype': jnp.float32},
    )
  )
  assert again == pytest.approx(exact, rel=1e-5)
  assert half == pytest.approx(exact, rel=0.05) and half != exact
  assert stream == pytest.approx(exact, rel=0.05) and stream != half


@pytest.mark.parametrize(
  'values, words',
  [
    (dict(act_fn='gelu'), ['act_fn', "'gelu'", "'silu'"]),
    (dict(time_embedding_type='fourier'), ['fourier', "'positional'"]),
    (dict(num_class_embeds=10), ['num_class_embeds=10', 'None']),
    (dict(downsample_type='resnet'), ['downsample_type', "'conv'"]),
    (dict(downsample_padding=2), ['downsample_padding=2', '0, 1']),
    (dict(attention_head_dim=3), ['attention_head_dim=3', '(16,)']),
    (dict(norm_num_groups=3), ['norm_num_groups=3', '(8, 16)']),
    (dict(mid_block_type='Other'), ['mid_block_type', "'Other'"]),
    (dict(resnet_time_scale_shift='ada'), ['resnet_time_scale_shift', 'ada']),
    (
      dict(up_block_types=['UpBlock2D', 'SkipUpBlock2D']),
      ['up_block_types', 'SkipUpBlock2D', 'AttnUpBlock2D'],
    ),
    (dict(layers_per_blok=1), ["did you mean 'layers_per_block'?"]),
    (dict(layers_per_block=0), ['layers_per_block=0']),
  ],
)
def test_what_is_not_supported_is_named(values, words):
  with pytest.raises(ValueError) as error:
    unet_2d.UNet2DConfig.from_dict(TINY | values)
  assert all(word in str(error.value) for word in words), error.value
  assert '\n' not in str(error.value)


def test_wrong_calls_are_named():
  config, key = unet_2d.UNet2DConfig(**TINY), jax.random.key(0)
  with pytest.raises(ValueError, match=r'9x12: .*multiples of 2, .* 2 levels'):
    unet_2d.UNet2DModel(config).init(key, *_inputs(config, (9, 12)))
  with pytest.raises(ValueError, match="remat='some'; allowed: none, full"):
    unet_2d.UNet2DModel(config, remat='some').init(key, *_inputs(config))
