"""Folders of DDPMPipeline and DDIMPipeline, ours and PyTorch's."""

import json
import shutil

import jax
import numpy as np
import pytest

from dpo_jax import loading, sharding
from dpo_jax.diffusion import samplers
from dpo_jax.weights import pipeline


def _edit(path, **changes):
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | changes))


def _as_ddim(folder, out):
  """The same model as a DDIMPipeline."""
  shutil.copytree(folder, out)
  _edit(
    out / 'model_index.json',
    _class_name='DDIMPipeline',
    scheduler=['diffusers', 'DDIMScheduler'],
  )
  path = out / 'scheduler' / 'scheduler_config.json'
  _edit(path, _class_name='DDIMScheduler')
  values = json.loads(path.read_text())
  del values['variance_type']
  path.write_text(json.dumps(values))
  return out


@pytest.fixture(params=['DDPM', 'DDIM'])
def kind_and_folder(request, tiny_pixel_folder, tmp_path):
  folder = tiny_pixel_folder
  if request.param == 'DDIM':
    folder = _as_ddim(folder, tmp_path / 'ddim')
  return request.param, folder


def test_diffusers_opens_an_export_and_draws_the_same(
  kind_and_folder, tmp_path
):
  diffusers = pytest.importorskip('diffusers')
  torch = pytest.importorskip('torch')
  kind, folder = kind_and_folder
  opened = loading.open_model(
    str(folder), mesh=sharding.make_mesh(), dtype='float32'
  )
  out = tmp_path / 'out'
  loading.save_model(
    out, opened, {'unet': opened.params['unet']}, dtype='float32'
  )
  index = json.loads((out / 'model_index.json').read_text())
  assert index == {
    '_class_name': f'{kind}Pipeline',
    'scheduler': ['diffusers', f'{kind}Scheduler'],
    'unet': ['diffusers', 'UNet2DModel'],
  }
  assert 'pipeline().images[0]' in (out / 'README.md').read_text()
  reference = getattr(diffusers, f'{kind}Pipeline').from_pretrained(out)
  assert type(reference.scheduler).__name__ == f'{kind}Scheduler'

  # One call of the network, then four steps from the same start.
  rng, model = np.random.default_rng(0), opened.model
  x_t = rng.standard_normal((2, 8, 8, 1), dtype=np.float32)
  params = jax.device_get(opened.params)
  apply = jax.jit(lambda x, t: model.apply_unet(params['unet'], x, t, {}))
  ours = apply(x_t, np.array([7, 7], np.int32))
  start = torch.from_numpy(x_t).permute(0, 3, 1, 2)
  with torch.no_grad():
    theirs = reference.unet(start, 7).sample
  assert theirs.abs().max() > 0.1
  theirs = theirs.permute(0, 2, 3, 1).numpy()
  assert np.abs(ours - theirs).max() < 1e-5
  if kind == 'DDPM':  # It draws noise of its own.
    return
  plan = samplers.make_plan(model.scheduler_config, 4, sampler='ddim')
  ours = model.decode_latents(
    {}, samplers.sample(plan, apply, plan.from_noise(x_t))
  )
  state = start
  reference.scheduler.set_timesteps(4)
  with torch.no_grad():
    for t in reference.scheduler.timesteps:
      eps_hat = reference.unet(state, t).sample
      state = reference.scheduler.step(eps_hat, t, state).prev_sample
  theirs = state.clamp(-1, 1).permute(0, 2, 3, 1).numpy()
  assert np.abs(ours - theirs).max() < 1e-5


def test_save_then_load_is_bitwise(tiny_pixel_folder, tmp_path):
  loaded = pipeline.load(tiny_pixel_folder)
  assert list(loaded.params) == list(loaded.configs) == ['unet']
  assert loaded.class_name == 'DDPMPipeline'
  assert loaded.tokenizer_folders == ()
  changed = jax.tree.map(lambda leaf: leaf + 1, loaded.params)
  pipeline.save(tmp_path / 'out', base=tiny_pixel_folder, params=changed)
  again = pipeline.load(tmp_path / 'out')
  jax.tree.map(np.testing.assert_array_equal, again.params, changed)
  assert again.scheduler_config == loaded.scheduler_config
  names = ['README.md', 'model_index.json', 'scheduler', 'unet']
  assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == names


def test_an_architecture_without_weights_starts_at_random(
  tiny_pixel_folder, tmp_path
):
  folder = shutil.copytree(tiny_pixel_folder, tmp_path / 'bare')
  for path in folder.rglob('*.safetensors'):
    path.unlink()
  mesh = sharding.make_mesh()
  opened = loading.open_model(
    str(folder), mesh=mesh, random_init=('unet',), seed=3, dtype='float32'
  )
  assert opened.params.keys() == {'unet', 'vae'}
  assert opened.params['vae'] == {}
  shapes = jax.tree.map(np.shape, pipeline.load(tiny_pixel_folder).params)
  assert jax.tree.map(np.shape, opened.params['unet']) == shapes['unet']
  assert loading.own_size(opened) == (8, 8)
  assert opened.tokenizers.encode(['a', ''])[0].shape == (2, 0, 1)
  assert opened.tokenizers.encode(['a', ''])[1] == 0
  with pytest.raises(ValueError, match=r'has no vae, only unet'):
    loading.open_model(
      str(folder), mesh=mesh, random_init=('unet', 'vae'), dtype='float32'
    )
  with pytest.raises(ValueError, match='unet: '):
    loading.open_model(str(folder), mesh=mesh, dtype='float32')


@pytest.mark.parametrize(
  'file, changes, words',
  [
    ('unet/config.json', {'in_channels': 4}, 'in_channels=4; without a VAE'),
    ('unet/config.json', {'out_channels': 3}, 'out_channels=3; without a VAE'),
    (
      'unet/config.json',
      {'_class_name': 'UNet2DConditionModel'},
      "needs a UNet whose config.json has _class_name='UNet2DModel'",
    ),
    (
      'model_index.json',
      {'unet': ['diffusers', 'UNet2DConditionModel']},
      r"allowed: \['diffusers', 'UNet2DModel'\]",
    ),
    (
      'model_index.json',
      {'vae': ['diffusers', 'AutoencoderKL']},
      'is not supported with DDPMPipeline',
    ),
  ],
)
def test_what_does_not_fit_is_named(
  tiny_pixel_folder, tmp_path, file, changes, words
):
  folder = shutil.copytree(tiny_pixel_folder, tmp_path / 'spoilt')
  path = folder / file
  values = json.loads(path.read_text()) | changes
  if changes.get('_class_name'):
    values = {
      'cross_attention_dim': 8,
      **changes,
      'block_out_channels': [32],
      'down_block_types': ['DownBlock2D'],
      'up_block_types': ['UpBlock2D'],
    }
  path.write_text(json.dumps(values))
  with pytest.raises(ValueError, match=words) as error:
    pipeline.load(folder)
  assert '\n' not in str(error.value)


def test_create_wants_the_unet_alone(tiny_pixel_folder, tmp_path):
  params = pipeline.load(tiny_pixel_folder).params
  unet = json.loads((tiny_pixel_folder / 'unet' / 'config.json').read_text())
  given = {'scheduler': {'_class_name': 'DDPMScheduler'}, 'params': params}
  given |= {'unet': unet, 'class_name': 'DDPMPipeline'}
  with pytest.raises(ValueError, match='DDPMPipeline has no vae'):
    pipeline.create(tmp_path / 'out', vae={}, **given)
  with pytest.raises(ValueError, match='StableDiffusionPipeline needs vae'):
    pipeline.create(
      tmp_path / 'out', **(given | {'class_name': 'StableDiffusionPipeline'})
    )
