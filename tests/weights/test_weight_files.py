import json
import re

import jax
import numpy as np
import pytest

from dpo_jax.weights import (
  diffusers_maps,
  pipeline,
  safetensors_io,
  weight_files,
)

STEM = 'diffusion_pytorch_model'
# The names that diffusers 0.42 and transformers 5 write, and those of old
# releases of diffusers.
NAMES = {
  'plain': {},
  'fp16': dict(
    index='{stem}.safetensors.index.fp16.json',
    shard='{stem}.fp16-{i:05}-of-{n:05}.safetensors',
  ),
  'old fp16': dict(
    index='{stem}.safetensors.fp16.index.json',
    shard='{stem}-{i:05}-of-{n:05}.fp16.safetensors',
  ),
}


def _same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _edit_map(index, **changes):
  values = json.loads(index.read_text())
  weight_map = values['weight_map'] | changes
  values['weight_map'] = {k: v for k, v in weight_map.items() if v is not None}
  index.write_text(json.dumps(values))


@pytest.mark.parametrize('kind', NAMES)
@pytest.mark.parametrize('n', [1, 3])
def test_shards_are_read_as_one(kind, n, folder, family_params, write_shards):
  for name in ('unet', 'vae', 'text_encoder'):
    write_shards(folder / name, n, **NAMES[kind])
  _same(pipeline.load(folder).params, family_params['sd'])
  if kind != 'plain':
    _same(pipeline.load(folder, variant='fp16').params, family_params['sd'])


@pytest.mark.parametrize('kind', NAMES)
def test_an_export_has_the_plain_names(
  kind, folder, family_params, write_shards, tmp_path
):
  params = family_params['sd']
  write_shards(folder / 'unet', **NAMES[kind])
  write_shards(folder / 'vae', **NAMES[kind])
  if kind != 'plain':
    path = folder / 'text_encoder' / 'model.safetensors'
    path.rename(path.with_suffix('.fp16.safetensors'))
  out = tmp_path / 'out'
  pipeline.save(out, base=folder, params={'unet': params['unet']})
  assert sorted(path.name for path in (out / 'unet').iterdir()) == [
    'config.json',
    f'{STEM}.safetensors',
  ]
  assert sorted(path.name for path in (out / 'vae').iterdir()) == [
    'config.json',
    f'{STEM}-00001-of-00002.safetensors',
    f'{STEM}-00002-of-00002.safetensors',
    f'{STEM}.safetensors.index.json',
  ]
  assert (out / 'text_encoder' / 'model.safetensors').is_file()
  _same(pipeline.load(out).params, params)


def test_full_precision_comes_before_float16(folder, write_shards):
  unet = folder / 'unet'
  whole = unet / f'{STEM}.safetensors'
  half = {
    name: (2 * tensor).astype(np.float16)
    for name, tensor in safetensors_io.load(whole).items()
  }
  full = pipeline.load(folder).params['unet']
  safetensors_io.save(unet / f'{STEM}.fp16.safetensors', half)
  _same(pipeline.load(folder).params['unet'], full)
  _, doubled = diffusers_maps.load_component('unet', unet, variant='fp16')
  _same(doubled, jax.tree.map(lambda x: 2 * x, full))


def test_a_variant_that_is_named_must_be_there(folder):
  with pytest.raises(ValueError) as error:
    pipeline.load(folder, variant='fp16')
  assert str(error.value) == (
    f'{folder}/unet: no {STEM}.fp16.safetensors, nor an index of shards; there'
    f' is {STEM}.safetensors'
  )


def test_an_export_holds_the_variant_that_was_loaded(
  folder, family_params, write_shards, tmp_path
):
  half = jax.tree.map(lambda x: x / 2, family_params['sd'])
  for name, component in diffusers_maps.COMPONENTS.items():
    if name not in half:
      continue
    tensors = mapping_of(name, half[name])
    stem = component.stem
    path = folder / name / f'{stem}.fp16.safetensors'
    safetensors_io.save(path, tensors)
  plain = folder / 'vae' / f'{STEM}.safetensors'
  fp16 = folder / 'vae' / f'{STEM}.fp16.safetensors'
  fp16.rename(folder / 'vae' / 'aside')
  write_shards(folder / 'vae', n=3)
  (folder / 'vae' / 'aside').rename(fp16)
  assert not plain.exists()
  out = tmp_path / 'out'
  pipeline.save(out, base=folder, params={}, variant='fp16')
  _same(pipeline.load(out).params, half)
  # The weights that had the plain names are gone, shards and all.
  assert [path.name for path in (out / 'vae').glob('*.safetensors*')] == [
    plain.name
  ]
  out = tmp_path / 'both'
  pipeline.save(out, base=folder, params={})
  _same(pipeline.load(out).params, family_params['sd'])
  _same(pipeline.load(out, variant='fp16').params, half)


def mapping_of(name, params):
  rules = diffusers_maps.COMPONENTS[name].rules
  return diffusers_maps.mapping.from_flax(params, rules)


def test_a_file_and_shards_may_differ(folder, write_shards):
  unet = folder / 'unet'
  whole = (unet / f'{STEM}.safetensors').read_bytes()
  write_shards(unet)
  (unet / f'{STEM}.safetensors').write_bytes(whole)
  words = f'unet: has both {STEM}.safetensors and {STEM}.safetensors.index.json'
  with pytest.raises(ValueError, match=re.escape(words)):
    pipeline.load(folder)


@pytest.mark.parametrize('name', ['unet', 'vae', 'text_encoder'])
def test_weights_that_are_not_there(name, folder):
  (path,) = (folder / name).glob('*.safetensors')
  path.unlink()
  with pytest.raises(ValueError, match=f'{name}: no {path.name}'):
    pipeline.load(folder)
  path.with_suffix('.bin').touch()
  with pytest.raises(ValueError, match=r'\.bin is refused: .*pickle.*convert'):
    pipeline.load(folder)


@pytest.mark.parametrize(
  'file',
  [
    '../vae/diffusion_pytorch_model.safetensors',
    '/etc/passwd',
    'sub/part.safetensors',
    '..\\part.safetensors',
    '.safetensors',
    'part.bin',
    'part\n.safetensors',
    '',
    7,
    ['part.safetensors'],
  ],
)
def test_an_index_names_plain_files_only(file, folder, write_shards):
  index = write_shards(folder / 'unet')
  _edit_map(index, **{'conv_in.bias': file})
  words = f"{index}: tensor 'conv_in.bias' is said to be in {file!r}; allowed"
  with pytest.raises(ValueError, match=re.escape(words)):
    pipeline.load(folder)


@pytest.mark.parametrize(
  'text, words',
  [
    ('{', 'not JSON'),
    ('[' * 100_000, 'not JSON'),
    ('[]', 'not a JSON object'),
    ('{}', 'no weight_map'),
    ('{"weight_map": []}', 'no weight_map'),
    ('{"weight_map": {}}', 'no weight_map'),
  ],
)
def test_an_index_that_is_none(text, words, folder, write_shards):
  index = write_shards(folder / 'unet')
  index.write_text(text)
  with pytest.raises(ValueError, match=f'{re.escape(str(index))}: {words}'):
    pipeline.load(folder)


def _spoil(case, index):
  """Makes index and shards differ; the words of the error."""
  one, two = (
    index.parent / f'{STEM}-0000{i}-of-00002.safetensors' for i in (1, 2)
  )
  first, second = safetensors_io.load(one), safetensors_io.load(two)
  name = 'conv_in.bias'
  assert name in first
  if case == 'shard not there':
    two.unlink()
    return f'{index}: names {two.name}, which is not there'
  if case == 'not in its shard':
    del first[name]
    safetensors_io.save(one, first)
    return f"{index}: tensor '{name}' is not in {one.name}"
  if case == 'in another shard':
    _edit_map(index, **{name: two.name})
    return f"{index}: tensor '{name}' is in {one.name}, not in {two.name}"
  if case == 'in both shards':
    safetensors_io.save(two, second | {name: first[name]})
    return f"{two}: tensor '{name}' is in {one.name} too"
  if case == 'not in the index':
    _edit_map(index, **{name: None})
    return f"{one}: tensor '{name}' is missing from {index.name}"
  if case == 'unknown tensor':
    _edit_map(index, surplus=two.name)
    return f"{index}: tensor 'surplus' is not in {two.name}"
  safetensors_io.save(two, second | {'surplus': np.ones(1, np.float32)})
  return f"{two}: tensor 'surplus' is missing from {index.name}"


@pytest.mark.parametrize(
  'case',
  [
    'shard not there',
    'not in its shard',
    'in another shard',
    'in both shards',
    'not in the index',
    'unknown tensor',
    'extra tensor',
  ],
)
def test_an_index_and_its_shards_must_agree(case, folder, write_shards):
  words = _spoil(case, write_shards(folder / 'unet'))
  with pytest.raises(ValueError, match=re.escape(words)):
    pipeline.load(folder)


def test_shards_of_links_are_read(folder, family_params, write_shards):
  # huggingface_hub's cache keeps a pipeline as links into a store.
  unet = folder / 'unet'
  write_shards(unet)
  for i, path in enumerate(sorted(unet.glob('*.safetensors'))):
    stored = folder / f'blob{i}'
    path.rename(stored)
    path.symlink_to(stored)
  _same(pipeline.load(folder).params, family_params['sd'])


def test_find_says_which_file(folder, write_shards):
  unet = folder / 'unet'
  found = weight_files.find(unet, STEM)
  assert found == unet / f'{STEM}.safetensors'
  assert weight_files.find(unet, STEM, variant='') == found
  index = write_shards(unet)
  assert weight_files.find(unet, STEM) == index
