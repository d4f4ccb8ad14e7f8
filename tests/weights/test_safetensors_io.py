import json
import pickle
import re
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax.weights import safetensors_io

TENSORS = {
  'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
  'b.half': np.ones((3,), np.float16),
  'c.brain': np.full((2, 2), 1.5, ml_dtypes.bfloat16),
  'd.ids': np.arange(4, dtype=np.int64),
  'e.scalar': np.float32(2.0).reshape(()),
}


class Bomb:
  """Leaves a mark when unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (str(self.path), 'w'))


def _raw(path, header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)
  return path


def test_round_trip_is_bitwise_and_deterministic(tmp_path):
  first, second = tmp_path / 'a.safetensors', tmp_path / 'b.safetensors'
  safetensors_io.save(first, TENSORS)
  loaded = safetensors_io.load(first)
  assert loaded.keys() == TENSORS.keys()
  for name, tensor in TENSORS.items():
    assert loaded[name].dtype == tensor.dtype
    assert loaded[name].shape == tensor.shape
    assert loaded[name].tobytes() == tensor.tobytes()
  safetensors_io.save(second, dict(reversed(TENSORS.items())))
  assert first.read_bytes() == second.read_bytes()


def test_transposed_views_are_written_in_order(tmp_path):
  view = TENSORS['a.weight'].T
  safetensors_io.save(tmp_path / 'a.safetensors', {'x': view})
  loaded = safetensors_io.load(tmp_path / 'a.safetensors')
  np.testing.assert_array_equal(loaded['x'], view)


def test_the_bytes_are_those_of_the_library(tmp_path):
  ours, theirs = tmp_path / 'a.safetensors', tmp_path / 'b.safetensors'
  rng = np.random.default_rng(0)
  tensors = {
    name + code: (3 * rng.standard_normal((2, 3))).astype(kind)
    for code, kind in safetensors_io.DTYPES.items()
    for name in ('z', 'a', 'B', '\u00e9', '"', '\\', '\x01', '\x7f', '\u2028')
  } | {
    'scalar': np.array(2, np.float32),
    'odd': np.zeros(3, np.int8),
    'empty': np.zeros((0, 3), np.float32),
  }
  safetensors_io.save(ours, tensors)
  safetensors.numpy.save_file(tensors, theirs, metadata={'format': 'pt'})
  assert ours.read_bytes() == theirs.read_bytes()


def test_save_casts(tmp_path):
  path = tmp_path / 'a.safetensors'
  safetensors_io.save(path, {'x': np.float32([1, 2])}, dtype=np.float16)
  assert safetensors_io.load(path)['x'].dtype == np.float16
  with pytest.raises(ValueError, match="'x' has dtype 'complex64'; allowed"):
    safetensors_io.save(path, {'x': np.ones(2, np.complex64)})
  with pytest.raises(ValueError, match=r"'x' holds 1 NaN or inf.* of 2"):
    safetensors_io.save(path, {'x': np.float32([1, 1e6])}, dtype=np.float16)
  # What was there stays, and nothing is left over.
  assert safetensors_io.load(path)['x'].tolist() == [1, 2]
  assert [entry.name for entry in tmp_path.iterdir()] == ['a.safetensors']


def test_several_files_are_one(tmp_path):
  one, two = tmp_path / 'one.safetensors', tmp_path / 'two.safetensors'
  safetensors_io.save(one, {'x': np.float32([1, 2])})
  safetensors_io.save(two, {'y': np.float16([3])})
  files = safetensors_io.TensorFiles([one, two])
  assert list(files.keys()) == ['x', 'y']
  assert files.source == str(one)
  assert files.path('y') == two and files.shape('y') == (1,)
  assert files.dtype('y') == np.float16
  assert files.read('y').tolist() == [3] and files.read('x').tolist() == [1, 2]
  with pytest.raises(ValueError, match=r"one\.safetensors: no tensor 'z'"):
    files.read('z')
  safetensors_io.save(two, {'x': np.float16([3])})
  with pytest.raises(ValueError, match=r"two.*: tensor 'x' is in one\.safe"):
    safetensors_io.TensorFiles([one, two])


def test_files_are_checked_before_anything_is_read(tmp_path):
  path = tmp_path / 'a.safetensors'
  safetensors_io.save(path, TENSORS)
  path.write_bytes(path.read_bytes() + b'more')
  with pytest.raises(ValueError, match=r'a\.safetensors: malformed safeten'):
    safetensors_io.TensorFiles([path])


def test_files_are_closed_every_so_often(tmp_path, monkeypatch):
  """Else all that was read would stay in memory."""
  path = tmp_path / 'a.safetensors'
  tensors = {f'x{i}': np.full(4, i, np.float32) for i in range(10)}
  safetensors_io.save(path, tensors)
  opened, original = [], safetensors.safe_open

  def safe_open(*args, **options):
    opened.append(args)
    return original(*args, **options)

  monkeypatch.setattr(safetensors, 'safe_open', safe_open)
  monkeypatch.setattr(safetensors_io, 'WINDOW', 40)
  files = safetensors_io.TensorFiles([path])
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(files.read(name), tensor)
  # Once to check it, then for every third tensor of 16 bytes.
  assert len(opened) == 1 + 4


def test_random_damage_is_found_or_harmless(tmp_path):
  path = tmp_path / 'a.safetensors'
  safetensors_io.save(path, TENSORS)
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(500):
    data = bytearray(whole)
    for position in rng.integers(0, len(whole), 3):
      data[position] = rng.integers(256)
    path.write_bytes(data)
    try:
      safetensors_io.load(path)
    except ValueError as error:
      assert str(error).startswith(f'{path}: ')
      refused += 1
  assert 400 < refused < 500


def test_some_names_only(tmp_path):
  path = tmp_path / 'a.safetensors'
  safetensors_io.save(path, TENSORS)
  assert list(safetensors_io.load(path, ['b.half'])) == ['b.half']
  with pytest.raises(ValueError, match=r"a\.safetensors: no tensor 'z'"):
    safetensors_io.load(path, ['b.half', 'z'])


def test_pytorch_reads_it_and_the_metadata(tmp_path):
  pytest.importorskip('torch')
  safetensors_torch = pytest.importorskip('safetensors.torch')
  path = tmp_path / 'a.safetensors'
  safetensors_io.save(path, TENSORS, {'made': 'here'})
  loaded = safetensors_torch.load_file(path)
  np.testing.assert_array_equal(loaded['a.weight'], TENSORS['a.weight'])
  with safetensors_torch.safe_open(path, 'pt') as file:
    assert file.metadata() == {'format': 'pt', 'made': 'here'}


@pytest.mark.parametrize('suffix', ['.bin', '.pt', '.ckpt', '.pkl', '.pth'])
def test_pickle_suffixes_are_refused(suffix, tmp_path):
  path = tmp_path / f'model{suffix}'
  path.write_bytes(pickle.dumps(Bomb(tmp_path / 'mark')))
  with pytest.raises(ValueError, match=r'by its suffix .*convert it to'):
    safetensors_io.load(path)
  assert not (tmp_path / 'mark').exists()


@pytest.mark.parametrize('protocol', [2, 3, 4, 5, 'zip'])
def test_renamed_pickles_are_refused(protocol, tmp_path):
  path = tmp_path / 'model.safetensors'
  if protocol == 'zip':
    path.write_bytes(b'PK\x03\x04' + bytes(100))
  else:
    path.write_bytes(pickle.dumps(Bomb(tmp_path / 'mark'), protocol=protocol))
  with pytest.raises(ValueError, match=r'pickle.*convert it to safetensors'):
    safetensors_io.load(path)
  assert not (tmp_path / 'mark').exists()


def test_header_length_that_looks_like_a_pickle_is_read(tmp_path):
  # 0x0280 bytes of header: the file begins as a pickle of protocol 2 does.
  header = {'x': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}}
  text = json.dumps(header).encode().ljust(0x0280)
  path = _raw(tmp_path / 'x.safetensors', text, struct.pack('<f', 7))
  assert path.read_bytes()[:2] == b'\x80\x02'
  assert safetensors_io.load(path)['x'] == 7


def _entry(dtype='F32', shape=(2,), offsets=(0, 8)):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


@pytest.mark.parametrize(
  'header, words',
  [
    ({'x': _entry(dtype='F8_E4M3')}, "'x' has dtype 'F8_E4M3'"),
    ({'x': _entry(shape=(3,))}, "'x' of shape [3]"),
    ({'x': _entry(offsets=(8, 16))}, "'x' ends at byte 16 of 8"),
    ({'x': {'dtype': 'F32'}}, "'x': bad header entry"),
    ({'x': _entry(), 'y': _entry()}, "'y' begins at byte 0 of the data, sho"),
    ({'x': _entry(shape=(1,), offsets=(4, 8))}, "'x' begins at byte 4"),
    ({'x': _entry(shape=(1,), offsets=(0, 4))}, 'malformed safetensors'),
    ({'x': _entry(offsets=('0', '8'))}, "'x': bad header entry"),
    ({'x': _entry(offsets=(8, 0))}, "'x' of shape [2] and dtype F32 cannot"),
    ({'x': _entry(offsets=(-8, 0))}, "'x': bad header entry"),
    ({'x': _entry(shape=(-1, -2))}, "'x': bad header entry"),
    ({'x': _entry(shape=(2.0,))}, "'x': bad header entry"),
    ({'x': _entry(dtype=['F32'])}, "'x' has dtype ['F32']"),
    ({'x': 7}, "'x': bad header entry"),
    (b'{"x": ', 'header is not JSON'),
    (b'["x"]', 'not a safetensors file'),
  ],
)
def test_malformed_headers_are_named(header, words, tmp_path):
  path = _raw(tmp_path / 'x.safetensors', header, bytes(8))
  with pytest.raises(ValueError, match=re.escape(words)) as error:
    safetensors_io.load(path)
  assert str(path) in str(error.value)


def test_truncated_file_names_the_tensor(tmp_path):
  path = tmp_path / 'a.safetensors'
  safetensors_io.save(path, TENSORS)
  whole = path.read_bytes()
  path.write_bytes(whole[:-1])
  with pytest.raises(ValueError, match=r"tensor '.*' ends at .* truncated"):
    safetensors_io.load(path)
  path.write_bytes(whole[:40])
  with pytest.raises(ValueError, match=r'header of .* truncated'):
    safetensors_io.load(path)
  path.write_bytes(b'')
  with pytest.raises(ValueError, match=r'not a safetensors file \(0 bytes\)'):
    safetensors_io.load(path)


def test_huge_header_is_refused_before_it_is_read(tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(struct.pack('<Q', 2**62) + b'{}')
  with pytest.raises(ValueError, match='header of 4611686018427387904 bytes'):
    safetensors_io.load(path)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match=r'x\.safetensors: no such file'):
    safetensors_io.load(tmp_path / 'x.safetensors')


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_named(value, dtype, tmp_path):
  path = tmp_path / 'x.safetensors'
  tensors = {'good': np.ones(2, dtype), 'bad': np.array([1, value], dtype)}
  with pytest.raises(ValueError, match=r"'bad' holds 1 NaN or inf.* of 2"):
    safetensors_io.save(path, tensors)
  assert not path.exists()
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError, match=r"'bad' holds 1 NaN or inf.* of 2"):
    safetensors_io.load(path)
