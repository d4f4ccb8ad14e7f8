"""Folders of which a file is spoilt: the error names it."""

import json
import re

import pytest

from dpo_jax.weights import pipeline, safetensors_io


def test_spoilt_tensors_are_named_with_their_file(folder):
  path = folder / 'unet/diffusion_pytorch_model.safetensors'
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
    ('unet/config.json', dict(conv_out_kernel=1), 'conv_out_kernel'),
    ('unet/config.json', dict(layers_per_block=2), 'missing'),
    ('vae/config.json', dict(shift_factor=1.0), 'shift_factor'),
    ('text_encoder/config.json', dict(hidden_act='relu'), 'hidden_act'),
  ],
)
def test_spoilt_configs_are_named(path, changes, words, folder):
  values = json.loads((folder / path).read_text())
  (folder / path).write_text(json.dumps(values | changes))
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
