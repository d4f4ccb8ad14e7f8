import json
import os
import re

import jax
import numpy as np
import pytest

from dpo_jax.weights import diffusers_maps, pipeline, safetensors_io

WEIGHTS = {
  'unet': 'unet/diffusion_pytorch_model.safetensors',
  'vae': 'vae/diffusion_pytorch_model.safetensors',
  'text_encoder': 'text_encoder/model.safetensors',
}


def _same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _edit(path, **changes):
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | changes))


def test_create_then_load(folder, params, configs):
  loaded = pipeline.load(folder)
  _same(loaded.params, params)
  assert loaded.scheduler_config == configs['scheduler']
  assert loaded.unet_config.cross_attention_dim == 16
  assert loaded.vae_config.downscale == 2
  assert loaded.text_config.eos_token_id == 19
  assert (loaded.tokenizer_folder / 'vocab.json').is_file()


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_save_then_load_is_bitwise(dtype, folder, params, tmp_path):
  out = tmp_path / 'deep' / 'out'
  pipeline.save(out, base=folder, params=params, dtype=dtype)
  _same(pipeline.load(out).params, params)
  for path in WEIGHTS.values():
    kinds = {str(x.dtype) for x in safetensors_io.load(out / path).values()}
    assert kinds == {dtype}
  again = tmp_path / 'again'
  loaded = pipeline.load(out).params
  pipeline.save(again, base=out, params=loaded, dtype=dtype)
  for path in WEIGHTS.values():
    assert (again / path).read_bytes() == (out / path).read_bytes()


def test_save_replaces_given_components_and_copies_the_rest(
  folder, params, tmp_path
):
  (folder / 'LICENSE.md').write_text('free')
  (folder / 'unet' / 'diffusion_pytorch_model.fp16.safetensors').touch()
  (folder / 'unet' / 'diffusion_pytorch_model.bin').touch()
  (folder / 'old.ckpt').touch()
  changed = jax.tree.map(lambda x: 2 * x, params['unet'])
  out = tmp_path / 'out'
  pipeline.save(
    out, base=folder, params={'unet': changed}, notes='Win rate 0.7.'
  )
  loaded = pipeline.load(out)
  _same(loaded.params, params | {'unet': changed})
  for name in ('vae', 'text_encoder'):
    copy, original = out / WEIGHTS[name], folder / WEIGHTS[name]
    assert copy.read_bytes() == original.read_bytes()
  before = {str(path.relative_to(folder)) for path in folder.rglob('*')}
  after = {str(path.relative_to(out)) for path in out.rglob('*')}
  assert after == before - {
    'old.ckpt',
    'unet/diffusion_pytorch_model.bin',
    'unet/diffusion_pytorch_model.fp16.safetensors',
  }
  card = (out / 'README.md').read_text()
  assert 'from tiny (unet changed)' in card and 'Win rate 0.7.' in card
  assert str(tmp_path) not in card
  assert sorted(os.listdir(tmp_path)) == ['out', 'tiny']


def test_save_says_the_dtype_to_transformers(folder, params, tmp_path):
  path = folder / 'text_encoder' / 'config.json'
  _edit(path, torch_dtype='float16')
  out = tmp_path / 'out'
  pipeline.save(out, base=folder, params=params, dtype='float32')
  written = json.loads((out / 'text_encoder' / 'config.json').read_text())
  assert written == json.loads(path.read_text()) | {'torch_dtype': 'float32'}


def test_a_failed_save_leaves_what_was_there(folder, params, tmp_path):
  out = tmp_path / 'out'
  pipeline.save(out, base=folder, params=params)
  bad = {'unet': jax.tree.map(lambda x: x * np.nan, params['unet'])}
  with pytest.raises(ValueError, match='NaN'):
    pipeline.save(out, base=folder, params=bad)
  with pytest.raises(ValueError, match='NaN'):
    pipeline.save(tmp_path / 'new', base=folder, params=bad)
  _same(pipeline.load(out).params, params)
  assert sorted(os.listdir(tmp_path)) == ['out', 'tiny']
  good = {'unet': jax.tree.map(lambda x: x + 1, params['unet'])}
  pipeline.save(out, base=folder, params=good)
  _same(pipeline.load(out).params, params | good)
  assert sorted(os.listdir(tmp_path)) == ['out', 'tiny']


def test_float16_overflow_is_refused(folder, params, tmp_path):
  big = {'vae': jax.tree.map(lambda x: x * 1e6, params['vae'])}
  with pytest.raises(ValueError, match='infinite'):
    pipeline.save(tmp_path / 'o', base=folder, params=big, dtype='float16')


def test_save_refuses_wrong_arguments(folder, params, tmp_path):
  def save(out=tmp_path / 'out', params=params, **options):
    pipeline.save(out, base=folder, params=params, **options)

  with pytest.raises(ValueError, match="'int4'; allowed: float32"):
    save(dtype='int4')
  with pytest.raises(ValueError, match="'unett'; allowed: unet"):
    save(params={'unett': params['unet']})
  with pytest.raises(ValueError, match='is the base pipeline'):
    save(folder)
  with pytest.raises(ValueError, match=r'missing: .*config.json'):
    save(params={'unet': params['vae']})
  occupied = tmp_path / 'photos'
  occupied.mkdir()
  (occupied / 'cat.jpg').touch()
  with pytest.raises(ValueError, match='not a pipeline'):
    save(occupied)
  assert (occupied / 'cat.jpg').exists()


def test_create_refuses_wrong_arguments(
  configs, params, tokenizer_dir, tmp_path
):
  def create(**changes):
    given = dict(configs, tokenizer_dir=tokenizer_dir, params=params)
    pipeline.create(tmp_path / 'out', **(given | changes))

  with pytest.raises(ValueError, match='no parameters for vae'):
    create(params={k: v for k, v in params.items() if k != 'vae'})
  with pytest.raises(ValueError, match='_class_name'):
    create(scheduler={})
  with pytest.raises(ValueError, match='tokenizer'):
    create(tokenizer_dir=tmp_path / 'nothing')
  with pytest.raises(ValueError, match='act_fn'):
    create(unet=configs['unet'] | {'act_fn': 'relu'})
  assert list(tmp_path.iterdir()) == []


def test_the_fp16_variant_is_found(folder, params):
  for path in WEIGHTS.values():
    path = folder / path
    path.rename(path.with_suffix('.fp16.safetensors'))
  _same(pipeline.load(folder).params, params)


@pytest.mark.parametrize('name', WEIGHTS)
def test_weights_that_are_not_there(name, folder):
  path = folder / WEIGHTS[name]
  path.unlink()
  with pytest.raises(ValueError, match=f'{name}: no {path.name}'):
    pipeline.load(folder)
  path.with_suffix('.bin').touch()
  with pytest.raises(ValueError, match=r'\.bin is refused: .*pickle.*convert'):
    pipeline.load(folder)
  (folder / name / f'{path.name}.index.json').touch()
  with pytest.raises(ValueError, match='sharded'):
    pipeline.load(folder)


def test_spoilt_tensors_are_named_with_their_file(folder):
  path = folder / WEIGHTS['unet']
  tensors = safetensors_io.load(path)
  del tensors['conv_in.bias']
  safetensors_io.save(path, tensors)
  words = f'{re.escape(str(path))}: 1 missing: conv_in.bias'
  with pytest.raises(ValueError, match=words):
    pipeline.load(folder)


@pytest.mark.parametrize(
  'path, changes, words',
  [
    ('model_index.json', dict(_class_name='FluxPipeline'), 'FluxPipeline'),
    ('model_index.json', dict(vae=['diffusers', 'VQModel']), 'VQModel'),
    ('unet/config.json', dict(act_fn='mish'), 'act_fn'),
    ('unet/config.json', dict(in_channels=9), 'conv_in.weight'),
    ('vae/config.json', dict(shift_factor=1.0), 'shift_factor'),
    ('text_encoder/config.json', dict(hidden_act='relu'), 'hidden_act'),
  ],
)
def test_spoilt_configs_are_named(path, changes, words, folder):
  _edit(folder / path, **changes)
  with pytest.raises(ValueError, match=words) as error:
    pipeline.load(folder)
  assert str((folder / path).parent) in str(error.value)


@pytest.mark.parametrize(
  'path', ['model_index.json', 'vae/config.json', 'scheduler']
)
@pytest.mark.parametrize('text, words', [(None, 'no such'), ('{', 'not JSON')])
def test_unreadable_json_is_named(path, text, words, folder):
  path = folder / path
  path = path / 'scheduler_config.json' if path.is_dir() else path
  path.unlink() if text is None else path.write_text(text)
  with pytest.raises(ValueError, match=f'{re.escape(str(path))}: {words}'):
    pipeline.load(folder)


def test_text_encoder_of_another_pipeline(folder, params, configs, tmp_path):
  component = diffusers_maps.COMPONENTS['unet']
  values = configs['unet'] | {'cross_attention_dim': 32}
  shapes = component.init_shapes(component.make_config(values))
  wide = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
  _edit(folder / 'unet' / 'config.json', cross_attention_dim=32)
  out = tmp_path / 'out'
  pipeline.save(out, base=folder, params={'unet': wide})
  with pytest.raises(ValueError, match=r'cross_attention_dim=32 .*size=16'):
    pipeline.load(out)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_diffusers_opens_what_was_written(
  dtype, folder, params, configs, tmp_path
):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  out = tmp_path / 'out'
  pipeline.save(out, base=folder, params=params, dtype=dtype)
  opened = diffusers.StableDiffusionPipeline.from_pretrained(
    out, dtype=torch.float32
  )
  assert opened.scheduler.config.beta_schedule == 'scaled_linear'
  assert opened.tokenizer('a b').input_ids == [18, 8, 9, 19]
  images = opened(
    'a b c',
    num_inference_steps=2,
    height=16,
    width=16,
    output_type='np',
    generator=torch.Generator().manual_seed(0),
  ).images
  assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()
  # Back from PyTorch: nothing was dropped and nothing invented on the way.
  for name in WEIGHTS:
    getattr(opened, name).save_pretrained(tmp_path / name)
    _, back = diffusers_maps.load_component(name, tmp_path / name)
    _same(back, params[name])
