"""Checkpoints of the Stability layout beside diffusers' own converters."""

import math

import jax
import ldm_layout
import numpy as np
import pytest

from dpo_jax.weights import (
  diffusers_maps,
  mapping,
  released,
  safetensors_io,
  single_file,
  single_file_maps,
  single_file_tensors,
)

FAMILIES = list(ldm_layout.FULL)


@pytest.fixture(params=FAMILIES)
def family(request):
  return request.param


def _parse(values):
  return {
    name: diffusers_maps.COMPONENTS[name].make_config(options)
    for name, options in values.items()
  }


def _tiny(family):
  return _parse(ldm_layout.tiny_configs(family))


def _converted(family, arrays, configs):
  """What diffusers' converters make of the arrays, by component."""
  torch = pytest.importorskip('torch')
  pytest.importorskip('diffusers')
  from diffusers.loaders import single_file_utils as reference

  tensors = {
    name: torch.as_tensor(array)
    if any(array.strides)
    # One number, repeated by strides of 0, is so there too.
    else torch.full((1,) * array.ndim, array.flat[0]).expand(array.shape)
    for name, array in arrays.items()
  }
  found = {
    'unet': reference.convert_ldm_unet_checkpoint(tensors, configs['unet']),
    'vae': reference.convert_ldm_vae_checkpoint(tensors, configs['vae']),
  }
  prefixes = single_file.PREFIXES[family]
  for name in list(prefixes)[2:]:
    if prefixes[name].endswith('transformer.'):
      found[name] = reference.convert_ldm_clip_checkpoint(tensors)
    else:
      # The width that it cuts in_proj by is that of text_projection.
      found[name] = reference.convert_open_clip_checkpoint(
        None, tensors, prefix=prefixes[name]
      )
  for name in ('text_encoder', 'text_encoder_2'):
    found.get(name, {}).pop('text_model.embeddings.position_ids', None)
  if family == 'sd2':
    # diffusers knows the unused layer by its number at full size only.
    unused = f'.layers.{configs["text_encoder"]["num_hidden_layers"]}.'
    found['text_encoder'] = {
      key: tensor
      for key, tensor in found['text_encoder'].items()
      if unused not in key and not key.startswith('text_projection')
    }
  return found


def test_every_tensor_at_full_size(family, tmp_path):
  # Counts and sizes are those that the issue and DESIGN.md give.
  counts = {
    'sd1': {'unet': 686, 'vae': 248, 'text_encoder': 196},
    'sd2': {'unet': 686, 'vae': 248, 'text_encoder': 372},
    'sdxl': {
      'unet': 1680,
      'vae': 248,
      'text_encoder': 196,
      'text_encoder_2': 517,
    },
    'sdxl_refiner': {'unet': 1220, 'vae': 248, 'text_encoder_2': 517},
  }[family]
  shapes = ldm_layout.checkpoint(family, ldm_layout.FULL[family])
  path = ldm_layout.write_header(tmp_path / 'full.safetensors', shapes)
  assert single_file.detect(path) == family
  configs = _parse(released.model_configs(family, 'epsilon'))
  found = single_file.open_checkpoint(path, configs)
  sizes = {}
  for name, tensors in found.tensors.items():
    component = diffusers_maps.COMPONENTS[name]
    wanted = mapping.file_shapes(
      component.init_shapes(configs[name]), component.rules
    )
    assert {key: tensors.shape(key) for key in tensors.keys()} == wanted
    assert len(wanted) == counts[name]
    sizes[name] = sum(math.prod(shape) for shape in wanted.values())
  # Of a fused tensor three were made.
  fused = sum(
    name.rpartition('.')[2] in single_file_maps.FUSED for name in shapes
  )
  fused -= 2 * (family == 'sd2')  # In the unused layer.
  assert len(shapes) == sum(counts.values()) - 2 * fused + len(found.unread)
  assert sizes['vae'] == 83_653_863
  if family == 'sd1':
    assert sizes['unet'] == 859_520_964
    assert sizes['text_encoder'] == 123_060_480
    assert len(found.unread) == 686 + 2 + 12 + 1
  if family == 'sdxl':
    assert sizes['unet'] == 2_567_463_684
    assert sizes['text_encoder_2'] == 694_659_840
  if family == 'sd2':
    # Layer 23, the projection, the temperature and the schedule's tables.
    assert len(found.unread) == 12 + 1 + 1 + 12


def test_every_name_at_full_size_is_diffusers_own(family):
  pytest.importorskip('torch')
  shapes = ldm_layout.checkpoint(family, ldm_layout.FULL[family])
  # The value says which tensor it was; the arrays take no memory.
  arrays = {
    name: np.broadcast_to(np.float32(i), shape)
    for i, (name, shape) in enumerate(shapes.items())
  }
  configs = released.model_configs(family, 'epsilon')
  expected = _converted(family, arrays, configs)
  file = safetensors_io.TensorArrays(arrays)
  for name, config in _parse(configs).items():
    prefix = single_file.PREFIXES[family][name]
    tensors = _rename(file, family, name, config)
    theirs = expected[name]
    assert set(tensors.keys()) == set(theirs)
    for key in tensors.keys():
      corner = tuple(slice(0, 1) for _ in tensors.shape(key))
      assert tensors.shape(key) == tuple(theirs[key].shape), key
      value = tensors.read(key, corner).item()
      assert value == theirs[key].flatten()[0].item(), (prefix, key)


def _rename(file, family, name, config):
  prefix = single_file.PREFIXES[family][name]
  names = [
    raw[len(prefix) :]
    for raw in file.keys()
    if raw.startswith(prefix) and not single_file.UNREAD.fullmatch(raw)
  ]
  modules = single_file.modules_of(family, name)(config)
  origins, _ = single_file_maps.find_origins(names, modules)
  return single_file_tensors.RenamedTensors(file, prefix, origins)


def test_values_are_those_of_diffusers_converters(family, tmp_path):
  pytest.importorskip('torch')
  values = ldm_layout.tiny_configs(family)
  configs = _parse(values)
  params = single_file.load_params(ldm_layout.write(tmp_path, family), configs)
  expected = _converted(family, ldm_layout.make_arrays(family), values)
  assert params.keys() == expected.keys() == values.keys()
  for name, tensors in expected.items():
    component = diffusers_maps.COMPONENTS[name]
    theirs = mapping.to_flax(
      {key: tensor.numpy() for key, tensor in tensors.items()},
      component.init_shapes(configs[name]),
      component.rules,
    )
    jax.tree.map(np.testing.assert_array_equal, params[name], theirs)
    _load_strictly(name, values[name], tensors)


def _load_strictly(name, options, tensors):
  """PyTorch's own models take these tensors and no others."""
  import diffusers
  import transformers

  component = diffusers_maps.COMPONENTS[name]
  if component.library == 'diffusers':
    model = getattr(diffusers, component.class_name)(**options)
  else:
    config = transformers.CLIPTextConfig(**options)
    model = getattr(transformers, component.class_name)(config)
    if not hasattr(model, 'text_model'):
      tensors = {k.removeprefix('text_model.'): v for k, v in tensors.items()}
  model.load_state_dict(tensors, strict=True)


class Recording(safetensors_io.TensorArrays):
  """Counts the values that are read."""

  count = 0

  def read(self, name, index=None):
    part = super().read(name, index)
    self.count += part.size
    return part


def test_parts_of_a_tensor_are_read_alone(family):
  file = Recording(ldm_layout.make_arrays(family))
  rng = np.random.default_rng(1)
  for name, config in _tiny(family).items():
    tensors = _rename(file, family, name, config)
    for key in tensors.keys():
      whole, index = tensors.read(key), []
      assert whole.shape == tensors.shape(key)
      for n in whole.shape:
        start = rng.integers(n)
        index.append(slice(start, rng.integers(start, n) + 1))
      file.count = 0
      part = tensors.read(key, tuple(index))
      np.testing.assert_array_equal(part, whole[tuple(index)])
      assert file.count == part.size


def test_straight_into_shardings(tmp_path):
  path, configs = ldm_layout.write(tmp_path, 'sdxl'), _tiny('sdxl')
  mesh = jax.make_mesh((4,), ('x',), devices=jax.devices()[:4])

  def place(name, shapes):
    assert name in configs

    def spec(leaf):
      axes = [n % 4 == 0 for n in leaf.shape]
      axis = axes.index(True) if any(axes) else None
      names = ['x' if i == axis else None for i in range(len(axes))]
      return jax.NamedSharding(mesh, jax.P(*names))

    return jax.tree.map(spec, shapes)

  placed = single_file.load_params(path, configs, place=place)
  plain = single_file.load_params(path, configs)
  jax.tree.map(np.testing.assert_array_equal, placed, plain)
  leaves = jax.tree.leaves(placed)
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  split = [leaf for leaf in leaves if not leaf.is_fully_replicated]
  assert len(split) > 0.9 * len(leaves)


def test_some_components_alone(tmp_path):
  configs = _tiny('sdxl')
  path = ldm_layout.write(tmp_path, 'sdxl')
  whole = single_file.load_params(path, configs)
  part = single_file.load_params(path, {'vae': configs['vae']})
  assert part.keys() == {'vae'}
  jax.tree.map(np.testing.assert_array_equal, part['vae'], whole['vae'])


def _only(name):
  return {name: _tiny('sd1')[name]}


def test_files_of_the_first_transformers_have_no_prefix(tmp_path):
  arrays, at = ldm_layout.make_arrays('sd1'), 'cond_stage_model.transformer.'
  changes = {}
  for name, array in arrays.items():
    if name.startswith(at):
      changes[name] = None
      changes[name.replace('text_model.', '')] = array
  configs = _only('text_encoder')
  old = single_file.load_params(
    ldm_layout.write(tmp_path, 'sd1', changes), configs
  )
  new = single_file.load_params(ldm_layout.write(tmp_path, 'sd1'), configs)
  jax.tree.map(np.testing.assert_array_equal, old, new)


def test_attention_of_the_vae_as_matrices_already(tmp_path):
  changes = {
    name: array[..., 0, 0]
    for name, array in ldm_layout.make_arrays('sd1').items()
    if '.attn_1.' in name and array.ndim == 4
  }
  assert len(changes) == 8
  configs = _only('vae')
  old = single_file.load_params(
    ldm_layout.write(tmp_path, 'sd1', changes), configs
  )
  new = single_file.load_params(ldm_layout.write(tmp_path, 'sd1'), configs)
  jax.tree.map(np.testing.assert_array_equal, old, new)


def test_all_layers_of_sd2_if_the_config_has_them(tmp_path):
  values = ldm_layout.tiny_configs('sd2')
  configs = _parse(values)
  path = ldm_layout.write(tmp_path, 'sd2')
  unread = single_file.open_checkpoint(path, configs).unread
  at = 'cond_stage_model.model.'
  assert f'{at}transformer.resblocks.2.ln_1.weight' in unread
  assert f'{at}text_projection' in unread
  values['text_encoder']['num_hidden_layers'] = 3
  more = single_file.open_checkpoint(path, _parse(values)).unread
  assert len(unread) - len(more) == 12
  values['text_encoder']['num_hidden_layers'] = 1
  with pytest.raises(ValueError, match=r'12 tensors .*resblocks\.2\.') as error:
    single_file.open_checkpoint(path, _parse(values))
  assert '\n' not in str(error.value)
