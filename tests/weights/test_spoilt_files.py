"""RELIABILITY.md X1 and X2, wherever weights are read."""

import json
import pickle
import re
import struct

import jax
import numpy as np
import pytest

from dpo_jax.models import classifier
from dpo_jax.weights import classifiers, pipeline, safetensors_io

STEM = 'diffusion_pytorch_model'
JUDGE = dict(classes=['a', 'b'], widths=[8, 8], image_size=8)


class Bomb:
  """Leaves a mark when unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (str(self.path), 'w'))


def _make_judge(folder):
  settings = classifier.ImageClassifierConfig.from_dict(JUDGE)
  params = classifier.ImageClassifier(settings).init(
    jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32)
  )['params']
  classifiers.save(folder, config=JUDGE, params=params)


@pytest.fixture(params=['file', 'shard', 'second text encoder', 'judge'])
def place(request, make_folder, write_shards, tmp_path):
  """(a file of weights, what reads it)."""
  if request.param == 'judge':
    folder = tmp_path / 'judge'
    _make_judge(folder)
    classifiers.load(folder)
    return folder / 'model.safetensors', lambda: classifiers.load(folder)
  folder = make_folder('xl')
  path = folder / 'unet' / f'{STEM}.safetensors'
  if request.param == 'shard':
    write_shards(folder / 'unet')
    path = path.with_name(f'{STEM}-00002-of-00002.safetensors')
  if request.param == 'second text encoder':
    path = folder / 'text_encoder_2' / 'model.safetensors'
  pipeline.load(folder)
  return path, lambda: pipeline.load(folder)


def _refused(place, words, *, named):
  """The one line of the error, which has `words` and names `named`."""
  path, load = place
  with pytest.raises(ValueError, match=words) as error:
    load()
  text = str(error.value)
  assert '\n' not in text
  assert str(path.parent) in text
  for name in named:
    assert name in text
  return text


def _split(path):
  """(header, data)"""
  data = path.read_bytes()
  end = 8 + int.from_bytes(data[:8], 'little')
  return json.loads(data[8:end]), data[end:]


def _join(path, header, data):
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)


@pytest.mark.parametrize('protocol', [0, 2, 3, 4, 5])
def test_x1_a_renamed_pickle(protocol, place, tmp_path):
  path, _ = place
  path.write_bytes(pickle.dumps(Bomb(tmp_path / 'mark'), protocol=protocol))
  _refused(place, 'not .*safetensors', named=[path.name])
  assert not (tmp_path / 'mark').exists()


@pytest.mark.parametrize('suffix', ['.bin', '.pt', '.ckpt', '.pkl'])
def test_x1_a_pickle_instead(suffix, place, tmp_path):
  path, _ = place
  path.with_suffix(suffix).write_bytes(pickle.dumps(Bomb(tmp_path / 'mark')))
  path.unlink()
  _refused(place, r'no such file|is not there|is refused', named=[])
  assert not (tmp_path / 'mark').exists()


@pytest.mark.parametrize('left', [0, 4, 9, 100, -1])
def test_x2_truncated(left, place):
  path, _ = place
  path.write_bytes(path.read_bytes()[:left])
  words = 'truncated' if left in (9, 100, -1) else 'not a safetensors file'
  text = _refused(place, words, named=[path.name])
  if left == -1:
    assert re.search(r"tensor '.+' ends at byte \d+ of \d+", text)


def test_x2_a_huge_header(place):
  path, _ = place
  path.write_bytes(struct.pack('<Q', 2**62) + path.read_bytes()[8:])
  _refused(place, 'header of 4611686018427387904 bytes', named=[path.name])


def test_x2_a_deep_header(place):
  path, _ = place
  text = b'{"a":' + b'[' * 200_000
  path.write_bytes(struct.pack('<Q', len(text)) + text)
  _refused(place, 'header is not JSON', named=[path.name])


def test_x2_overlapping_tensors(place):
  path, _ = place
  header, data = _split(path)
  # A tensor of its own at the end, which is moved onto others.
  header['zz'] = {'dtype': 'U8', 'shape': [8], 'data_offsets': [8, 16]}
  _join(path, header, data)
  words = r"tensor '.+' begins at byte \d+ of the data, should be \d+"
  _refused(place, words, named=[path.name, 'overlap'])


def test_x2_bytes_that_no_tensor_has(place):
  path, _ = place
  header, data = _split(path)
  # The library finds this; all tensors named in the header are whole.
  _join(path, header, data + bytes(8))
  _refused(place, 'malformed safetensors', named=[path.name])


def _edit(path, change):
  tensors = safetensors_io.load(path)
  name = sorted(tensors)[0]
  change(tensors, name)
  safetensors_io.save(path, tensors)
  return name


def test_x2_a_wrong_shape(place):
  path, _ = place

  def change(tensors, name):
    tensors[name] = np.concatenate([tensors[name], tensors[name]])

  name = _edit(path, change)
  _refused(place, 'is \\(|has shape', named=[name])


def test_x2_a_missing_tensor(place):
  path, _ = place
  name = _edit(path, lambda tensors, name: tensors.pop(name))
  _refused(place, 'missing|not in|has shape None', named=[name])


def test_x2_an_extra_tensor(place):
  path, _ = place

  def change(tensors, _):
    tensors['surplus'] = np.ones(3, np.float32)

  _edit(path, change)
  _refused(place, '1 extra|missing from|asks for None', named=['surplus'])


def test_x2_integers(place):
  path, _ = place

  def change(tensors, name):
    tensors[name] = tensors[name].astype(np.int32)

  name = _edit(path, change)
  _refused(place, 'int32, should be a float', named=[name])


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_x2_values_that_are_not_finite(value, place):
  path, _ = place
  header, data = _split(path)
  name = sorted(set(header) - {'__metadata__'})[-1]
  begin = header[name]['data_offsets'][0]
  assert header[name]['dtype'] == 'F32'
  data = data[:begin] + struct.pack('<f', value) + data[begin + 4 :]
  _join(path, header, data)
  words = r'holds 1 NaN or infinite values of \d+'
  _refused(place, words, named=[path.name, name])
