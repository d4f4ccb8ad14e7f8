import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import released

from dpo_jax.models import vae

TINY = dict(
  block_out_channels=(16, 32),
  down_block_types=('DownEncoderBlock2D',) * 2,
  up_block_types=('UpDecoderBlock2D',) * 2,
  norm_num_groups=8,
)
NARROW = dict(block_out_channels=[8, 16, 16, 16], norm_num_groups=4)
CASES = {
  # The releases at a fraction of their width ...
  **{name: values | NARROW for name, values in released.VAE.items()},
  # ... and each option.
  'two_layers': TINY
  | dict(
    block_out_channels=(8, 16, 16),
    down_block_types=('DownEncoderBlock2D',) * 3,
    up_block_types=('UpDecoderBlock2D',) * 3,
    layers_per_block=2,
  ),
  'no_quant_convs': TINY
  | dict(use_quant_conv=False, use_post_quant_conv=False, latent_channels=3),
  'no_attention': TINY | dict(mid_block_add_attention=False),
}
# PyTorch's attention module there adds the residual itself.
RESIDUAL = {f'{part}.mid_block.attentions.0' for part in ('encoder', 'decoder')}


def _nhwc(tensor):
  return tensor.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize('case', CASES)
def test_every_module_equals_diffusers(case, from_torch):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  torch.manual_seed(0)
  reference = diffusers.AutoencoderKL.from_config(CASES[case]).eval()
  config, params = from_torch('vae', reference)
  down = config.downscale
  recorded, images = parity.record(reference), torch.randn(2, 3, 16, 24)
  with torch.no_grad():
    posterior = reference.encode(images).latent_dist
    eps = torch.randn_like(posterior.mean)
    decoded = reference.decode(posterior.mean + posterior.std * eps).sample
  apply = functools.partial(
    vae.AutoencoderKL(config).apply, capture_intermediates=True
  )
  (output, mean, logvar), state = jax.jit(apply)(
    {'params': params}, _nhwc(images), _nhwc(eps)
  )
  assert mean.shape == (2, 16 // down, 24 // down, config.latent_channels)
  for ours, theirs in (
    (mean, posterior.mean),
    (logvar, posterior.logvar),
    (output, decoded),
  ):
    assert ours.dtype == jnp.float32
    parity.assert_equal(ours, theirs)
  errors = parity.compare_modules(
    'vae', state['intermediates'], recorded, without=RESIDUAL
  )
  owners = {name.rpartition('.')[0] for name, _ in reference.named_parameters()}
  assert owners <= errors.keys()


def test_bfloat16_compute_gives_float32_near_the_same(random_params):
  config = vae.VAEConfig(**TINY)
  variables = {'params': random_params('vae', config)}
  rng = np.random.default_rng(1)
  images = rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
  eps = rng.standard_normal((2, 8, 8, 4), dtype=np.float32)
  exact, rough = (
    jax.jit(vae.AutoencoderKL(config, dtype).apply)(variables, images, eps)
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert not np.array_equal(exact[1], rough[1])
  for a, b in zip(exact[:2], rough[:2], strict=True):
    assert b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=0.05 * np.abs(a).max())


def test_logvar_is_clipped(random_params):
  config = vae.VAEConfig(**TINY)
  params = random_params('vae', config)
  params['quant_conv']['bias'] = np.full(8, 1e3, np.float32)
  model = vae.AutoencoderKL(config)
  encode = jax.jit(functools.partial(model.apply, method='encode'))
  _, logvar = encode({'params': params}, jnp.zeros((1, 8, 8, 3)))
  np.testing.assert_array_equal(logvar, 20.0)


@pytest.mark.parametrize(
  'options, words',
  [
    (dict(act_fn='relu'), ['act_fn', "'relu'", "'silu'"]),
    (dict(latents_std=[1.0] * 4), ['latents_std', '1.0', 'None']),
    (dict(shift_factor=0.1), ['shift_factor', '0.1', 'None']),
    (dict(latents_mean=[0.0]), ['latents_mean', 'None']),
    (dict(up_block_types=['UpDecoderBlock2D']), ['up_block_types', '2 times']),
    (dict(norm_num_groups=5), ['norm_num_groups', '5', '(16, 32)']),
    (dict(scaling_factor=-1), ['scaling_factor', '-1', 'above 0']),
    (dict(latent_chanels=4), ['latent_chanels', "'latent_channels'"]),
  ],
)
def test_unsupported_options_are_named(options, words):
  with pytest.raises(ValueError) as error:
    vae.VAEConfig.from_dict(TINY | options)
  assert all(word in str(error.value) for word in ['VAEConfig', *words])


# (scaling_factor, force_upcast) of each release.
@pytest.mark.parametrize(
  'release, expected',
  [
    ('sd15', (0.18215, True)),
    ('sd21', (0.18215, True)),
    ('sdxl', (0.13025, True)),
    ('sdxl_saved_again', (0.13025, True)),
    ('sdxl_fp16_fix', (0.13025, False)),
  ],
)
def test_released_configs_are_read(release, expected):
  values = dict(_class_name='AutoencoderKL', _diffusers_version='0.20.0')
  config = vae.VAEConfig.from_dict(values | released.VAE[release])
  assert (config.scaling_factor, config.force_upcast) == expected
  assert config.downscale == 8
  assert hash(config) != hash(vae.VAEConfig(**TINY))
