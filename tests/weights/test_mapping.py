import jax
import numpy as np
import pytest

from dpo_jax.weights import diffusers_maps, mapping

COMPONENTS = list(diffusers_maps.COMPONENTS)


def _rules(name):
  return diffusers_maps.COMPONENTS[name].rules


@pytest.mark.parametrize('name', COMPONENTS)
def test_round_trip_is_bitwise(name, params, shapes):
  tensors = mapping.from_flax(params[name], _rules(name), target=shapes[name])
  back = mapping.to_flax(tensors, shapes[name], _rules(name))
  assert jax.tree.structure(back) == jax.tree.structure(params[name])
  jax.tree.map(np.testing.assert_array_equal, back, params[name])
  assert len(tensors) == len(jax.tree.leaves(params[name]))
  again = mapping.from_flax(back, _rules(name))
  for key, tensor in tensors.items():
    assert again[key].tobytes() == tensor.tobytes()


def test_names_and_layouts():
  params = {
    'down_blocks_0': {
      'resnets_11': {'conv1': {'kernel': np.zeros((3, 2, 4, 5))}},
      'norm1': {'scale': np.zeros(4), 'bias': np.zeros(4)},
    },
    'time_embedding': {'linear_1': {'kernel': np.zeros((6, 7))}},
    'token_embedding': {'embedding': np.zeros((8, 9))},
  }
  tensors = mapping.from_flax(params, diffusers_maps.UNET)
  assert {name: tensor.shape for name, tensor in tensors.items()} == {
    'down_blocks.0.resnets.11.conv1.weight': (5, 4, 3, 2),
    'down_blocks.0.norm1.weight': (4,),
    'down_blocks.0.norm1.bias': (4,),
    'time_embedding.linear_1.weight': (7, 6),
    'token_embedding.weight': (8, 9),
  }


@pytest.mark.parametrize('name', COMPONENTS)
def test_names_are_those_of_pytorch(name, configs, shapes):
  pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  transformers = pytest.importorskip('transformers')
  options = configs[name]
  component = diffusers_maps.COMPONENTS[name]
  if component.library == 'transformers':
    cls = getattr(transformers, component.class_name)
    reference = cls(transformers.CLIPTextConfig(**options))
  else:
    reference = getattr(diffusers, component.class_name)(**options)
  zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes[name])
  ours = mapping.from_flax(zeros, _rules(name))
  # transformers 4 has the prefix `text_model.` and transformers 5 has not.
  expected = {
    key.removeprefix('text_model.'): tuple(tensor.shape)
    for key, tensor in reference.state_dict().items()
  }
  assert expected == {
    key.removeprefix('text_model.'): tensor.shape
    for key, tensor in ours.items()
  }


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64'])
def test_other_floats_become_float32(dtype, params, shapes):
  dtype = diffusers_maps.DTYPES.get(dtype, np.float64)
  tensors = mapping.from_flax(params['vae'], diffusers_maps.VAE)
  tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
  back = mapping.to_flax(tensors, shapes['vae'], diffusers_maps.VAE)
  assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype('float32')}
  jax.tree.map(np.testing.assert_array_equal, back, params['vae'])


def test_old_names_of_the_vae_attention(params, shapes):
  tensors = mapping.from_flax(params['vae'], diffusers_maps.VAE)
  old = {}
  for name, tensor in tensors.items():
    for new, before in (
      ('to_q.', 'query.'),
      ('to_k.', 'key.'),
      ('to_v.', 'value.'),
      ('to_out.0.', 'proj_attn.'),
    ):
      name = name.replace(new, before)
    old[name] = tensor
  assert len(old.keys() - tensors.keys()) == 16
  back = mapping.to_flax(old, shapes['vae'], diffusers_maps.VAE)
  jax.tree.map(np.testing.assert_array_equal, back, params['vae'])


@pytest.mark.parametrize('prefix', ['', 'text_model.'])
def test_text_names_with_and_without_prefix(prefix, params, shapes):
  tensors = mapping.from_flax(params['text_encoder'], diffusers_maps.CLIP_TEXT)
  renamed = {
    prefix + name.removeprefix('text_model.'): tensor
    for name, tensor in tensors.items()
  }
  renamed[f'{prefix}embeddings.position_ids'] = np.arange(8)[None]
  back = mapping.to_flax(
    renamed, shapes['text_encoder'], diffusers_maps.CLIP_TEXT
  )
  jax.tree.map(np.testing.assert_array_equal, back, params['text_encoder'])


def test_two_tensors_of_one_meaning_are_refused(params, shapes):
  tensors = mapping.from_flax(params['vae'], diffusers_maps.VAE)
  name = 'encoder.mid_block.attentions.0.to_q.bias'
  tensors[name.replace('to_q', 'query')] = tensors[name]
  with pytest.raises(ValueError, match=r'file: .*query\.bias.* are both'):
    mapping.to_flax(tensors, shapes['vae'], diffusers_maps.VAE, 'file')


def test_two_leaves_of_one_name_are_refused():
  params = {'norm': {'scale': np.ones(2), 'kernel': np.ones((2, 2))}}
  with pytest.raises(ValueError, match=r"norm/kernel: .*'norm\.weight'"):
    mapping.from_flax(params, diffusers_maps.UNET)


def test_missing_extra_and_misshapen_are_named_together(params, shapes):
  tensors = mapping.from_flax(params['unet'], diffusers_maps.UNET)
  del tensors['conv_in.bias']
  tensors['surplus.weight'] = np.ones(3, np.float32)
  tensors['conv_out.bias'] = np.ones(5, np.float32)
  tensors['conv_norm_out.bias'] = np.ones(16, np.int32)
  with pytest.raises(ValueError) as error:
    mapping.to_flax(tensors, shapes['unet'], diffusers_maps.UNET, 'some/file')
  text = str(error.value)
  assert text.startswith('some/file: ')
  for words in (
    '1 missing: conv_in.bias',
    '1 extra: surplus.weight',
    '1 misshapen: conv_out.bias is (5,), should be (4,)',
    'conv_norm_out.bias is int32, should be a float',
  ):
    assert words in text
  assert '\n' not in text


def test_a_transposed_square_shape_is_not_enough(params, shapes):
  # A 1x1 convolution where a dense layer belongs.
  tensors = mapping.from_flax(params['unet'], diffusers_maps.UNET)
  name = 'mid_block.attentions.0.proj_in.weight'
  tensors[name] = tensors[name][..., 0, 0]
  with pytest.raises(ValueError, match=r'is \(16, 16\), should be'):
    mapping.to_flax(tensors, shapes['unet'], diffusers_maps.UNET)


def test_long_lists_are_cut(shapes):
  with pytest.raises(ValueError, match=r'\d+ missing: .* and \d+ more') as e:
    mapping.to_flax({}, shapes['unet'], diffusers_maps.UNET)
  assert str(e.value).count('.weight') + str(e.value).count('.bias') == 5


def test_parameters_of_another_model_are_refused(params, shapes):
  spoilt = dict(params['unet'])
  spoilt['conv_in'] = {'kernel': np.ones((3, 3, 4, 8), np.float32)}
  spoilt['more'] = {'bias': np.ones(1, np.float32)}
  with pytest.raises(ValueError) as error:
    mapping.from_flax(spoilt, diffusers_maps.UNET, target=shapes['unet'])
  for words in (
    '1 missing: conv_in/bias',
    '1 extra: more/bias',
    'conv_in/kernel is (3, 3, 4, 8), should be (3, 3, 4, 16)',
  ):
    assert words in str(error.value)
