"""PyTorch diffusers opens what is written here, and the other way round."""

import jax
import numpy as np
import pytest

from dpo_jax.weights import diffusers_maps, pipeline

FAMILIES = ['sd', 'xl', 'refiner']
# How diffusers writes a folder: arguments of save_pretrained. The largest
# shard makes two or more files of every component.
WRITERS = {
  'plain': {},
  'sharded': {'max_shard_size': '8KB'},
  'fp16': {'variant': 'fp16'},
  'sharded fp16': {'variant': 'fp16', 'max_shard_size': '4KB'},
}


def _same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def open_in_torch():
  """Folder to a pipeline of PyTorch diffusers, in float32."""
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')

  def open_folder(folder, **options):
    name = pipeline.load(folder, without=tuple(diffusers_maps.COMPONENTS))
    opened = getattr(diffusers, name.class_name).from_pretrained(
      folder, dtype=torch.float32, **options
    )
    opened.set_progress_bar_config(disable=True)
    return opened

  return open_folder


def _run(opened):
  """One small picture."""
  torch = pytest.importorskip('torch')
  options = {'height': 16, 'width': 16}
  if 'Img2Img' in type(opened).__name__:
    options = {'image': torch.zeros(1, 3, 16, 16), 'strength': 1.0}
  return opened(
    'a b c',
    num_inference_steps=2,
    output_type='np',
    generator=torch.Generator().manual_seed(0),
    **options,
  ).images


def _tensors(opened, name):
  """The state dict of a component, copied."""
  state = getattr(opened, name).state_dict()
  return {key: tensor.numpy().copy() for key, tensor in state.items()}


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_diffusers_opens_what_was_written(
  dtype, family, make_folder, family_params, open_in_torch, tmp_path
):
  params = family_params[family]
  out = tmp_path / 'out'
  pipeline.save(out, base=make_folder(family), params=params, dtype=dtype)
  opened = open_in_torch(out)
  assert opened.scheduler.config.beta_schedule == 'scaled_linear'
  tokenizer = opened.tokenizer or opened.tokenizer_2
  assert tokenizer('a b').input_ids == [18, 8, 9, 19]
  if family == 'refiner':
    assert opened.config.requires_aesthetics_score
    assert not opened.config.force_zeros_for_empty_prompt
  images = _run(opened)
  assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()
  # Back from PyTorch: nothing was dropped and nothing invented on the way.
  for name in params:
    getattr(opened, name).save_pretrained(tmp_path / name)
    _, back = diffusers_maps.load_component(name, tmp_path / name)
    _same(back, params[name])


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('writer', WRITERS)
def test_what_diffusers_writes_is_read_and_written_again(
  writer, family, make_folder, family_params, open_in_torch, tmp_path
):
  torch = pytest.importorskip('torch')
  params, options = family_params[family], WRITERS[writer]
  theirs = open_in_torch(make_folder(family))
  before = {name: _tensors(theirs, name) for name in params}
  if 'variant' in options:
    theirs.to(dtype=torch.float16)
  base = tmp_path / 'base'
  theirs.save_pretrained(base, **options)
  if 'max_shard_size' in options:
    for name in params:
      assert list((base / name).glob('*.safetensors.index*.json'))
  _same(pipeline.load(base).params, params)
  if 'variant' in options:
    _same(pipeline.load(base, variant='fp16').params, params)
  changed = jax.tree.map(lambda x: x / 2, params['unet'])
  for number, given in enumerate(({}, {'unet': changed}, params)):
    out = tmp_path / f'out{number}'
    pipeline.save(out, base=base, params=given)
    _same(pipeline.load(out).params, params | given)
    again = open_in_torch(out)
    for name in params:
      factor = 0.5 if number == 1 and name == 'unet' else 1.0
      _same(
        _tensors(again, name),
        {key: factor * tensor for key, tensor in before[name].items()},
      )
