import json
import os

import jax
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.weights import diffusers_maps, pipeline, safetensors_io

WEIGHTS = {
  'unet': 'unet/diffusion_pytorch_model.safetensors',
  'vae': 'vae/diffusion_pytorch_model.safetensors',
  'text_encoder': 'text_encoder/model.safetensors',
}
FAMILIES = ['sd', 'xl', 'refiner']


@pytest.fixture
def params(family_params):
  """Those of a StableDiffusionPipeline."""
  return family_params['sd']


def _same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _edit(path, **changes):
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | changes))


def test_create_then_load(folder, params, configs):
  loaded = pipeline.load(folder)
  _same(loaded.params, params)
  assert loaded.folder == folder
  assert loaded.class_name == 'StableDiffusionPipeline'
  assert loaded.scheduler_config == configs['scheduler']
  assert loaded.configs['unet'].cross_attention_dim == 16
  assert loaded.configs['vae'].downscale == 2
  assert loaded.configs['text_encoder'].eos_token_id == 19
  assert loaded.tokenizer_folders == (folder / 'tokenizer',)
  assert not loaded.force_zeros_for_empty_prompt
  assert not loaded.requires_aesthetics_score


def test_the_refiner_has_the_second_text_encoder_only(make_folder):
  folder = make_folder('refiner')
  loaded = pipeline.load(folder)
  assert list(loaded.params) == ['unet', 'vae', 'text_encoder_2']
  assert loaded.tokenizer_folders == (folder / 'tokenizer_2',)
  assert loaded.requires_aesthetics_score
  assert not loaded.force_zeros_for_empty_prompt
  index = json.loads((folder / 'model_index.json').read_text())
  assert index['text_encoder'] == index['tokenizer'] == [None, None]


def test_sdxl_has_both_text_encoders(make_folder):
  folder = make_folder('xl')
  loaded = pipeline.load(folder)
  names = ['unet', 'vae', 'text_encoder', 'text_encoder_2']
  assert list(loaded.params) == list(loaded.configs) == names
  assert loaded.tokenizer_folders == (
    folder / 'tokenizer',
    folder / 'tokenizer_2',
  )
  assert loaded.force_zeros_for_empty_prompt
  # The defaults of diffusers, where the file says nothing.
  path = folder / 'model_index.json'
  index = json.loads(path.read_text())
  del index['force_zeros_for_empty_prompt']
  path.write_text(json.dumps(index))
  assert pipeline.load(folder).force_zeros_for_empty_prompt
  _edit(path, force_zeros_for_empty_prompt=False)
  assert not pipeline.load(folder).force_zeros_for_empty_prompt


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_save_then_load_is_bitwise(
  dtype, family, make_folder, family_params, tmp_path
):
  folder, params = make_folder(family), family_params[family]
  out = tmp_path / 'deep' / 'out'
  pipeline.save(out, base=folder, params=params, dtype=dtype)
  loaded = pipeline.load(out)
  _same(loaded.params, params)
  again = tmp_path / 'again'
  pipeline.save(again, base=out, params=loaded.params, dtype=dtype)
  files = sorted(out.rglob('*.safetensors'))
  assert len(files) == len(params)
  for path in files:
    kinds = {str(x.dtype) for x in safetensors_io.load(path).values()}
    assert kinds == {dtype}
    copy = again / path.relative_to(out)
    assert copy.read_bytes() == path.read_bytes()
  # All that is no weight is copied.
  for path in folder.rglob('*.*'):
    if path.suffix not in ('.safetensors', '.md'):
      copy = out / path.relative_to(folder)
      assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_load_casts_to_the_dtype_asked_for(dtype, folder, params):
  kind = diffusers_maps.DTYPES[dtype]
  loaded = pipeline.load(folder, dtype=dtype).params
  _same(loaded, jax.tree.map(lambda x: x.astype(kind), params))
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(kind)}
  mixed = pipeline.load(folder, dtype={'vae': dtype}).params
  kinds = {
    name: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}
    for name, tree in mixed.items()
  }
  assert kinds == {
    'unet': {'float32'},
    'vae': {dtype},
    'text_encoder': {'float32'},
  }


def test_load_refuses_a_dtype_that_cannot_hold_the_values(folder, params):
  path = folder / WEIGHTS['unet']
  tensors = safetensors_io.load(path)
  tensors['conv_in.bias'] = tensors['conv_in.bias'] * 1e6
  safetensors_io.save(path, tensors)
  pipeline.load(folder, dtype='bfloat16')
  words = r"safetensors as float16: tensor 'conv_in.bias' holds 16 NaN or inf"
  with pytest.raises(ValueError, match=words):
    pipeline.load(folder, dtype='float16')


def test_load_refuses_wrong_arguments(folder):
  with pytest.raises(ValueError, match="'int4'; allowed: float32"):
    pipeline.load(folder, dtype='int4')
  with pytest.raises(ValueError, match=r"dtype .*component 'unett'; allowed"):
    pipeline.load(folder, dtype={'unett': 'float16'})
  with pytest.raises(ValueError, match=r"without .*component 'unett'; allowed"):
    pipeline.load(folder, without=('unett',))
  with pytest.raises(ValueError, match=r"variant='\.\./x': not a word"):
    pipeline.load(folder, variant='../x')


@pytest.mark.parametrize('family', FAMILIES)
def test_configs_alone_are_enough_without_weights(family, make_folder):
  folder = make_folder(family)
  for path in folder.rglob('*.safetensors'):
    path.unlink()
  loaded = pipeline.load(folder, without=tuple(diffusers_maps.COMPONENTS))
  assert loaded.params == {}
  assert loaded.configs['unet'].in_channels == 4


def test_parameters_go_where_place_says(make_folder, family_params):
  mesh = sharding.make_mesh(data=2, fsdp=4)
  asked = {}

  def place(name, shapes):
    asked[name] = shapes
    if name == 'vae':
      return None
    return sharding.state_shardings(shapes, mesh, min_size=64)

  loaded = pipeline.load(make_folder('xl'), place=place)
  _same(jax.device_get(loaded.params), family_params['xl'])
  assert asked.keys() == loaded.params.keys()
  for name, tree in loaded.params.items():
    kind = np.ndarray if name == 'vae' else jax.Array
    assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(tree))
  kernel = loaded.params['unet']['conv_in']['kernel']
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(
    None, None, None, 'fsdp'
  )


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
  for words in (
    'pipeline_tag: text-to-image',
    '| base | tiny |',
    '| changed | unet |',
    '| weights | unet in float32; vae, text_encoder as in the base |\n\n',
    "StableDiffusionPipeline.from_pretrained('out')",
    'Win rate 0.7.',
    'That of the base, see LICENSE.md.',
  ):
    assert words in card
  assert 'base_model' not in card and str(tmp_path) not in card
  assert sorted(os.listdir(tmp_path)) == ['out', 'tiny']


@pytest.mark.parametrize('family', FAMILIES)
def test_the_card_names_class_and_base(
  family, make_folder, family_params, tmp_path
):
  out = tmp_path / 'out'
  params = {'unet': family_params[family]['unet']}
  base = 'stabilityai/some-model'
  pipeline.save(out, base=make_folder(family), params=params, base_name=base)
  card = (out / 'README.md').read_text()
  name = pipeline.load(out).class_name
  assert f'{name}.from_pretrained' in card and f'import {name}' in card
  assert f'base_model: {base}' in card and f'| base | {base} |' in card
  is_refiner = family == 'refiner'
  assert ('pipeline_tag: image-to-image' in card) == is_refiner
  assert ('image=init_image' in card) == is_refiner
  assert 'Licence' not in card


def test_safety_checker_and_friends_are_copied_and_never_read(
  folder, params, tmp_path
):
  _edit(
    folder / 'model_index.json',
    safety_checker=['stable_diffusion', 'StableDiffusionSafetyChecker'],
    feature_extractor=['transformers', 'CLIPImageProcessor'],
    _diffusers_version='0.6.0',
  )
  (folder / 'safety_checker').mkdir()
  weights = folder / 'safety_checker' / 'model.safetensors'
  weights.write_bytes(b'no safetensors at all')
  (folder / 'feature_extractor').mkdir()
  (folder / 'feature_extractor' / 'preprocessor_config.json').touch()
  _same(pipeline.load(folder).params, params)
  out = tmp_path / 'out'
  pipeline.save(out, base=folder, params={})
  copy = out / 'safety_checker' / 'model.safetensors'
  assert copy.read_bytes() == weights.read_bytes()
  assert (out / 'feature_extractor' / 'preprocessor_config.json').is_file()
  card = (out / 'README.md').read_text()
  assert '| changed | nothing |' in card
  assert '| weights | unet, vae, text_encoder as in the base |' in card


def test_the_card_tells_what_changed_and_what_is_missing(
  folder, params, tmp_path
):
  """As of a base of configs only, whose weights came from elsewhere."""
  for path in folder.rglob('*.safetensors'):
    path.unlink()
  out = tmp_path / 'out'
  pipeline.save(out, base=folder, params=params, changed=('unet',))
  card = (out / 'README.md').read_text()
  assert '| changed | unet |' in card
  assert '| weights | unet, vae, text_encoder in float32 |\n\n' in card
  pipeline.save(out, base=folder, params={'vae': params['vae']})
  card = (out / 'README.md').read_text()
  assert '| weights | vae in float32 |\n' in card
  assert '| no weights yet | unet, text_encoder |\n' in card
  with pytest.raises(ValueError, match=r"changed .*'vae'; allowed: unet$"):
    pipeline.save(
      out, base=folder, params={'unet': params['unet']}, changed=('vae',)
    )


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
  (folder / 'vae').rename(folder / 'moved')
  with pytest.raises(ValueError, match=r'vae.config.json: no such file'):
    save()
  (folder / 'moved').rename(folder / 'vae')
  occupied = tmp_path / 'photos'
  occupied.mkdir()
  (occupied / 'cat.jpg').touch()
  with pytest.raises(ValueError, match='not a pipeline'):
    save(occupied)
  assert (occupied / 'cat.jpg').exists()


def test_create_refuses_wrong_arguments(
  configs, family_params, tokenizer_dir, tmp_path
):
  params = family_params['sd']

  def create(**changes):
    given = {
      'unet': configs['unet'],
      'vae': configs['vae'],
      'text_encoder': configs['text_encoder'],
      'scheduler': configs['scheduler'],
      'tokenizer_dir': tokenizer_dir,
      'params': params,
    }
    pipeline.create(tmp_path / 'out', **(given | changes))

  with pytest.raises(ValueError, match='no parameters for vae'):
    create(params={k: v for k, v in params.items() if k != 'vae'})
  with pytest.raises(ValueError, match='_class_name'):
    create(scheduler={})
  with pytest.raises(ValueError, match='no tokenizer'):
    create(tokenizer_dir=tmp_path / 'nothing')
  with pytest.raises(ValueError, match=r'given: none; needed: tokenizer$'):
    create(tokenizer_dir=None)
  with pytest.raises(ValueError, match='given: tokenizer, tokenizer_2; need'):
    create(tokenizer_2_dir=tokenizer_dir)
  with pytest.raises(ValueError, match='act_fn'):
    create(unet=configs['unet'] | {'act_fn': 'relu'})
  with pytest.raises(ValueError, match='FluxPipeline'):
    create(class_name='FluxPipeline')
  with pytest.raises(ValueError, match='XLPipeline needs text_encoder_2'):
    create(class_name='StableDiffusionXLPipeline')
  with pytest.raises(ValueError, match='Pipeline has no text_encoder_2'):
    create(text_encoder_2=configs['text_encoder_2'])
  with pytest.raises(ValueError, match=r"no option 'zeros'; allowed: none"):
    create(flags={'zeros': True})
  with pytest.raises(ValueError, match='latent_channels=8'):
    create(vae=configs['vae'] | {'latent_channels': 8})
  assert list(tmp_path.iterdir()) == []
