"""Single-file checkpoints that must be refused, with the tensor's name."""

import pickle

import ldm_layout
import numpy as np
import pytest

from dpo_jax.weights import diffusers_maps, single_file


def _configs(family):
  values = ldm_layout.tiny_configs(family)
  return {
    name: diffusers_maps.COMPONENTS[name].make_config(options)
    for name, options in values.items()
  }


UNET, SECOND = 'model.diffusion_model.', 'conditioner.embedders.1.model.'
SPOILT = {
  'an unknown tensor': (
    'unet',
    {'model.diffusion_model.control.weight': np.ones(3)},
    r'1 tensors .*: model\.diffusion_model\.control\.weight;',
  ),
  'no buffer': (
    'unet',
    {'model.diffusion_model.position_ids': np.ones(3)},
    r'1 tensors .*: model\.diffusion_model\.position_ids;',
  ),
  'an unknown network': (
    'vae',
    {'v_pred': np.ones(1)},
    r'1 tensors .*: v_pred; do configs and file belong together',
  ),
  'a block too many': (
    'unet',
    {f'{UNET}input_blocks.9.0.in_layers.0.bias': np.ones(3)},
    r'1 tensors .*input_blocks\.9\.0\.in_layers\.0\.bias',
  ),
  'a layer too many': (
    'text_encoder_2',
    {f'{SECOND}transformer.resblocks.2.ln_1.bias': np.ones(3)},
    r'1 tensors .*resblocks\.2\.ln_1\.bias',
  ),
  'a deeper transformer': (
    'unet',
    {f'{UNET}middle_block.1.transformer_blocks.2.norm1.bias': np.ones(3)},
    r'1 extra: mid_block\.attentions\.0\.transformer_blocks\.2\.norm1\.bias',
  ),
  'a missing tensor': (
    'unet',
    {f'{UNET}out.2.bias': None},
    r'1 missing: conv_out\.bias',
  ),
  'a missing fused tensor': (
    'text_encoder_2',
    {f'{SECOND}transformer.resblocks.0.attn.in_proj_bias': None},
    r'3 missing: .*0\.self_attn\.[qkv]_proj\.bias',
  ),
  'another shape': (
    'unet',
    {f'{UNET}label_emb.0.0.weight': np.ones((32, 25))},
    r'add_embedding\.linear_1\.weight is \(32, 25\), should be \(32, 24\)',
  ),
  'a fused tensor that is no three': (
    'text_encoder_2',
    {f'{SECOND}transformer.resblocks.0.attn.in_proj_bias': np.ones(37)},
    r'3 misshapen: .*_proj\.bias is \(37,\), should be \(12,\)',
  ),
  'a larger convolution': (
    'vae',
    {'first_stage_model.encoder.mid.attn_1.q.weight': np.ones((8, 8, 3, 3))},
    r'attentions\.0\.to_q\.weight is \(8, 8, 3, 3\), should be \(8, 8\)',
  ),
  'integers': (
    'unet',
    {f'{UNET}out.2.bias': np.ones(4, np.int32)},
    r'conv_out\.bias is int32, should be a float',
  ),
  'a NaN': (
    'unet',
    {f'{UNET}out.2.bias': np.full(4, np.nan, np.float16)},
    r"model\.diffusion_model\.out\.2\.bias' holds 4 NaN",
  ),
}


@pytest.mark.parametrize('kind', SPOILT)
def test_whatever_does_not_fit_is_named(kind, tmp_path):
  component, changes, pattern = SPOILT[kind]
  path = ldm_layout.write(tmp_path, 'sdxl', changes)
  configs = _configs('sdxl')
  with pytest.raises(ValueError, match=pattern) as error:
    single_file.load_params(path, {component: configs[component]})
  assert str(error.value).startswith(str(path))
  assert '\n' not in str(error.value)


def test_a_component_of_another_family_is_refused(tmp_path):
  configs = _configs('sdxl')
  with pytest.raises(ValueError, match=r"'sd1', which has no 'text_encoder_2'"):
    single_file.load_params(ldm_layout.write(tmp_path, 'sd1'), configs)


FIRST = 'model.diffusion_model.input_blocks.0.0.weight'
OTHERS = {
  'inpainting': (
    {FIRST: (8, 9, 3, 3), 'cond_stage_model.transformer.a': (1,)},
    'takes 9 channels',
  ),
  'a UNet alone': ({FIRST: (8, 4, 3, 3)}, 'none of the text encoders'),
  # SD-Turbo: the prefix of the refiner, but no sizes.
  'turbo': (
    {FIRST: (8, 4, 3, 3), 'conditioner.embedders.0.model.ln_final.bias': (3,)},
    'none of the text encoders',
  ),
  'diffusers': (
    {'down_blocks.0.resnets.0.conv1.bias': (3,), 'conv_in.weight': (3,)},
    'its tensors begin with conv_in, down_blocks',
  ),
  'a LoRA': ({'lora_unet_down.alpha': ()}, 'begin with lora_unet_down'),
}


@pytest.mark.parametrize('kind', OTHERS)
def test_other_models_are_no_family(kind, tmp_path):
  shapes, pattern = OTHERS[kind]
  path = ldm_layout.write_header(tmp_path / 'other.safetensors', shapes)
  with pytest.raises(ValueError, match=pattern) as error:
    single_file.detect(path)
  assert str(error.value).startswith(str(path))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['model.ckpt', 'model.safetensors'])
def test_a_pickle_is_refused_unread(name, tmp_path):
  class Bomb:
    def __reduce__(self):
      return (pytest.fail, ('unpickled',))

  path = tmp_path / name
  path.write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(ValueError, match=r'pickle.*convert it to safetensors'):
    single_file.detect(path)


def test_a_cut_file_is_refused(tmp_path):
  path = ldm_layout.write(tmp_path, 'sd1')
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r'truncated') as error:
    single_file.detect(path)
  assert str(error.value).startswith(str(path))
