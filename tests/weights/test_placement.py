"""Weights read straight into a sharding: which bytes, how much memory."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax import sharding
from dpo_jax.weights import diffusers_maps, mapping, safetensors_io

ROOT = pathlib.Path(__file__).parent.parent.parent
RULES = mapping.Rules(indexed=('layers',))
MEASURE = """
import json, sys
import numpy as np
import jax
from dpo_jax.weights import mapping, safetensors_io

path, shape, count, kind = json.loads(sys.argv[1])
target = {
  f'layers_{i}': {'kernel': jax.ShapeDtypeStruct(shape, np.float32)}
  for i in range(count)
}
place = None
if kind != 'numpy':
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  place = jax.tree.map(lambda _: device, target)
  jax.block_until_ready(jax.numpy.zeros(1))
def memory(kind):
  # Not ru_maxrss, which begins at the peak of the process that forked.
  for line in open('/proc/self/status'):
    if line.startswith(kind + ':'):
      return int(line.split()[1]) * 1024
before = memory('VmRSS')
tensors = safetensors_io.TensorFiles([path])
params = mapping.to_flax(
  tensors, target, mapping.Rules(indexed=('layers',)), place=place
)
print(json.dumps([before, memory('VmRSS'), memory('VmHWM')]))
"""

TWO = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from dpo_jax.weights import mapping, safetensors_io

address, number, path = sys.argv[1:]
jax.distributed.initialize(address, 2, int(number))
mesh = Mesh(np.array(jax.devices()), 'x')
assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
sizes = {}
class Counted(safetensors_io.TensorFiles):
  def read(self, name, index=None):
    tensor = super().read(name, index)
    sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return tensor

target = {
  'conv': {
    'kernel': jax.ShapeDtypeStruct((3, 2, 8, 16), np.float32),
    'bias': jax.ShapeDtypeStruct((16,), np.float32),
  }
}
place = {
  'conv': {
    'kernel': NamedSharding(mesh, PartitionSpec(None, None, None, 'x')),
    'bias': NamedSharding(mesh, PartitionSpec()),
  }
}
rules = mapping.Rules(indexed=(), ignored=('dense|table|scalar',))
loaded = mapping.to_flax(Counted([path]), target, rules, place=place)
kernel = loaded['conv']['kernel']
starts = sorted(shard.index[3].start for shard in kernel.addressable_shards)
print(json.dumps([sizes['conv.weight'], sizes['conv.bias'], starts]))
"""


class Counted(safetensors_io.TensorFiles):
  """Notes what is read."""

  def __init__(self, paths):
    super().__init__(paths)
    self.reads = []

  def read(self, name, index=None):
    tensor = super().read(name, index)
    self.reads.append((name, tensor.shape, tensor.nbytes))
    return tensor


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(data=2, fsdp=4)


@pytest.fixture
def small(tmp_path):
  """(file, target, NumPy parameters) of one leaf of each kind."""
  rng = np.random.default_rng(0)
  params = {
    'conv': {
      'kernel': rng.standard_normal((3, 2, 8, 16), dtype=np.float32),
      'bias': rng.standard_normal(16, dtype=np.float32),
    },
    'dense': {'kernel': rng.standard_normal((8, 12), dtype=np.float32)},
    'table': {'embedding': rng.standard_normal((8, 5), dtype=np.float32)},
    'scalar': {'scale': np.float32(3).reshape(())},
  }
  path = tmp_path / 'small.safetensors'
  safetensors_io.save(path, mapping.from_flax(params, RULES))
  return path, jax.eval_shape(lambda: params), params


def test_a_slice_is_that_of_the_whole(small):
  path, _, params = small
  files = safetensors_io.TensorFiles([path])
  whole = params['conv']['kernel'].transpose(3, 2, 0, 1)
  index = (slice(4, 8), slice(None), slice(1, 3), slice(0, 1))
  part = files.read('conv.weight', index)
  np.testing.assert_array_equal(part, whole[index])
  assert files.shape('conv.weight') == (16, 8, 3, 2)
  assert files.dtype('conv.weight') == np.float32
  arrays = safetensors_io.TensorArrays({'conv.weight': whole})
  np.testing.assert_array_equal(arrays.read('conv.weight', index), whole[index])
  laid_out = mapping.ParamTensors(params, RULES)
  assert laid_out.shape('conv.weight') == whole.shape
  np.testing.assert_array_equal(
    laid_out.read('conv.weight', index), whole[index]
  )


# Leaf, its axes on the mesh, shape of what a device holds, reads: (out, in,
# h, w) and (out, in) in the file are (h, w, in, out) and (in, out) here.
@pytest.mark.parametrize(
  'path, spec, shape, reads',
  [
    ('conv/kernel', (None, None, None, 'fsdp'), (4, 8, 3, 2), 4),
    ('conv/kernel', (None, None, 'fsdp', None), (16, 2, 3, 2), 4),
    ('conv/kernel', (None, 'data', 'fsdp', None), (16, 2, 3, 1), 8),
    ('conv/kernel', (), (16, 8, 3, 2), 1),
    ('conv/bias', ('fsdp',), (4,), 4),
    ('dense/kernel', ('fsdp', None), (12, 2), 4),
    ('dense/kernel', ('data', 'fsdp'), (3, 4), 8),
    ('table/embedding', ('fsdp', None), (2, 5), 4),
    ('scalar/scale', (), (), 1),
  ],
)
def test_only_the_parts_of_local_devices_are_read(
  path, spec, shape, reads, small, mesh
):
  file, target, params = small
  module, leaf = path.split('/')
  replicated = NamedSharding(mesh, PartitionSpec())
  place = jax.tree.map(lambda _: replicated, target)
  place[module][leaf] = NamedSharding(mesh, PartitionSpec(*spec))
  tensors = Counted([file])
  loaded = mapping.to_flax(tensors, target, RULES, place=place)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded), params)
  name = f'{module}.{"bias" if leaf == "bias" else "weight"}'
  found = [read for read in tensors.reads if read[0] == name]
  assert [found_shape for _, found_shape, _ in found] == [shape] * reads
  array = loaded[module][leaf]
  assert array.sharding == place[module][leaf]
  assert len(array.addressable_shards) == 8
  # What a device holds is what was read for it, and each byte once.
  held = array.addressable_shards[0].data.nbytes
  assert {size for _, _, size in found} == {held}
  assert sum(size for _, _, size in found) == params[module][leaf].nbytes


def test_a_sharded_component_is_the_numpy_one(
  folder, family_params, mesh, write_shards
):
  """Bitwise, with shards and float16 in the files."""
  unet = folder / 'unet'
  (path,) = unet.glob('*.safetensors')
  half = {
    name: tensor.astype(np.float16)
    for name, tensor in safetensors_io.load(path).items()
  }
  safetensors_io.save(path, half)
  write_shards(unet)

  def place(name, shapes):
    assert name == 'unet'
    return sharding.state_shardings(shapes, mesh, min_size=64)

  _, loaded = diffusers_maps.load_component('unet', unet, place=place)
  split = [
    leaf
    for leaf in jax.tree.leaves(loaded)
    if not leaf.sharding.is_fully_replicated
  ]
  assert len(split) > 80
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(loaded),
    family_params['sd']['unet'],
  )
  _, brain = diffusers_maps.load_component(
    'unet', unet, place=place, dtype='bfloat16'
  )
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(brain)} == {'bfloat16'}


def test_arrays_are_not_copied_again_on_a_cpu(small):
  """Half the memory traffic, and no holes in the heap."""
  file, target, _ = small
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  arrays = mapping.to_flax(safetensors_io.load(file), target, RULES)
  for leaf in jax.tree.leaves(arrays):
    assert leaf.ctypes.data % mapping.ALIGNMENT == 0
    assert leaf.flags.c_contiguous
    taken = jax.device_put(leaf, device)
    assert taken.unsafe_buffer_pointer() == leaf.ctypes.data


def test_nothing_is_read_before_all_names_and_shapes_fit(small, mesh):
  file, target, _ = small
  tensors = Counted([file])
  target['more'] = {'bias': jax.ShapeDtypeStruct((1,), np.float32)}
  replicated = NamedSharding(mesh, PartitionSpec())
  place = jax.tree.map(lambda _: replicated, target)
  with pytest.raises(ValueError, match=f'{file}: 1 missing: more.bias'):
    mapping.to_flax(tensors, target, RULES, place=place)
  del target['more']
  with pytest.raises(ValueError, match='place has other leaves'):
    mapping.to_flax(tensors, target, RULES, place=place)
  assert tensors.reads == []


def test_each_process_reads_its_own_slices(small):
  """Two processes of 4 devices each: half of what is split over all eight."""
  file, _, params = small
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  running = [
    subprocess.Popen(
      [sys.executable, '-c', TWO, address, str(i), str(file)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
      env=os.environ
      | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'},
    )
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in running]
  for process, (_, errors) in zip(running, outputs, strict=True):
    assert process.returncode == 0, errors
  whole = params['conv']['kernel'].nbytes
  for i, (text, _) in enumerate(outputs):
    split, replicated, starts = json.loads(text.splitlines()[-1])
    assert split == whole // 2
    assert replicated == params['conv']['bias'].nbytes
    assert starts == [8 * i, 8 * i + 2, 8 * i + 4, 8 * i + 6]


@pytest.fixture(scope='module')
def big(tmp_path_factory):
  """(file of 600 MB, shape of a leaf, number of leaves)."""
  if not pathlib.Path('/proc/self/status').is_file():
    pytest.skip('the peak is read from Linux')
  path = tmp_path_factory.mktemp('big') / 'big.safetensors'
  shape, count = (3, 3, 512, 1024), 32
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((1024, 512, 3, 3), dtype=np.float32)
  safetensors_io.save(
    path, {f'layers.{i}.weight': kernel for i in range(count)}
  )
  yield path, shape, count
  path.unlink()


@pytest.mark.parametrize('kind', ['numpy', 'placed'])
def test_peak_memory_of_loading(kind, big):
  """A 600 MB file is loaded with less than 1.3 times that."""
  path, shape, count = big
  size = path.stat().st_size
  assert size > 600e6
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      MEASURE,
      json.dumps([str(path), shape, count, kind]),
    ],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  before, after, peak = json.loads(done.stdout)
  # JAX itself, which is `before`, would be a third of so small a file.
  assert after - before > 0.95 * size
  assert peak - before < 1.3 * size


def test_memory_of_saving_is_one_tensor(tmp_path):
  """Layouts and casts are made one tensor at a time, never all together."""
  live = []

  class Watched(mapping.ParamTensors):
    def read(self, name, index=None):
      tensor = super().read(name, index)
      live.append(
        np.shares_memory(tensor, params[name.split('.')[0]]['kernel'])
      )
      return tensor

  params = {
    name: {'kernel': np.ones((4, 4), np.float32)} for name in ('a', 'b')
  }
  path = tmp_path / 'x.safetensors'
  safetensors_io.save(path, Watched(params, RULES), dtype=np.float16)
  assert live == [True, True]
  assert safetensors_io.load(path)['a.weight'].dtype == np.float16
