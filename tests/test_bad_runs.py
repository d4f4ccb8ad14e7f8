"""Bad input of the whole command: one line, and exit code 2."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax import main
from dpo_jax.weights import pipeline, safetensors_io


def _error(argv, capsys):
  """Runs a command that must fail on its input; returns its one line."""
  capsys.readouterr()
  assert main.run(argv) == 2
  text = capsys.readouterr().err
  lines = [line for line in text.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1 and 'Traceback' not in text
  return lines[0]


@pytest.mark.parametrize(
  ('overrides', 'words'),
  [
    ({'optim__l': 1}, ['--config.optim.l', 'did you mean optim.lr?']),
    ({'trian__num_steps': 1}, ['trian.num_steps', 'train.num_steps?']),
    ({'train__num_steps': 'many'}, ['train.num_steps=many', 'must be int']),
    ({'train__num_steps': 1.5}, ['train.num_steps=1.5', 'must be int']),
    ({'optim__lr': 'fast'}, ['optim.lr=fast', 'must be float']),
    ({'data__flip': 'perhaps'}, ['data.flip=perhaps', 'true or false']),
    ({'optim__name': 'lion'}, ["optim.name='lion'", 'adamw, adafactor']),
    ({'data__holdout': 1.5}, ['data.holdout=1.5', 'below 1']),
    ({'train__batch_size': 0}, ['train.batch_size=0', 'at least 1']),
    ({'train__log_every': 2}, ['checkpoint_every=1', 'log_every=2']),
    ({'train__batch_size': 12}, ['batch_size=12', '8 devices', 'multiple']),
    ({'eval__batch_size': 12}, ['eval.batch_size=12', '8 devices']),
    ({'mesh__data': 3}, ['mesh.data=3', '8 devices']),
    ({'data__path': '/no/such.parquet'}, ['/no/such.parquet']),
    ({'model__folder': '/no/such'}, ["'/no/such'", 'diffusers']),
    ({'eval__judge': '/no/judge'}, ["eval.judge='/no/judge'"]),
    ({'data__resolution': 18}, ['data.resolution=18', 'multiple']),
    ({'model__remat': 'some'}, ['model.remat', 'none, full, dots, names']),
    ({'model__ref_path': 'x'}, ['model.ref_path', 'auto, loop, separate']),
    ({'model__ref_dtype': 'float16'}, ['ref_dtype', 'float32, bfloat16']),
    ({'model__param_dtype': ''}, ['model.param_dtype', 'float32, bfloat16']),
    ({'optim__mu_dtype': 'int8'}, ['optim.mu_dtype', 'float32, bfloat16']),
    (
      {'optim__parameter_scale': True},
      ['optim.parameter_scale=True', 'optim.name=adafactor'],
    ),
    (
      {'optim__mu_dtype': 'bfloat16', 'optim__name': 'adafactor'},
      ["optim.mu_dtype='bfloat16'", 'is for optim.name=adamw'],
    ),
    (
      {'train__sequential': True, 'task': 'denoise'},
      ['train.sequential=True', 'is for task=preference'],
    ),
    (
      {'model__stack_layers': 'always', 'model__ref_dtype': 'int8'},
      ["model.stack_layers='always'", 'model.ref_dtype=int8'],
    ),
    (
      {'model__residual_dtype': 'float32'},
      ["model.residual_dtype='float32'", 'is for model.dtype=bfloat16'],
    ),
  ],
)
def test_bad_settings_are_one_line(arguments, capsys, overrides, words):
  line = _error(arguments(**overrides), capsys)
  assert all(word in line for word in words), line


def test_all_problems_come_at_once(arguments, capsys):
  line = _error(arguments(optim__name='x', train__keep=0, task='y'), capsys)
  for word in ('optim.name', 'train.keep', 'task'):
    assert word in line
  line = _error(arguments(optim__l=1, train__stepz=2), capsys)
  assert 'optim.l:' in line and 'train.stepz' in line


def test_missing_flags_are_named(capsys):
  assert 'config' in _error(['main', '--workdir=x'], capsys)
  line = _error(['main', '--config=configs/sd15.py'], capsys)
  assert '--workdir' in line
  assert 'none.py' in _error(['main', '--config=none.py'], capsys)
  line = _error(['main', '--config=configs/sd15.py', '--wokdir=x'], capsys)
  assert 'wokdir' in line
  bad = ['main', '--config=configs/sd15.py:fast', '--workdir=x']
  line = _error(bad, capsys)
  assert "variant 'fast': allowed are official_code, paper" in line


def test_objective_numbers_are_checked(arguments, capsys):
  argv = arguments('configs/quickstart.py:sft')
  argv.append('--config.objective.name=dpo')
  assert 'dpo takes beta' in _error(argv, capsys)


def test_another_config_in_the_workdir_is_refused(
  small_arguments, tmp_path, capsys
):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  assert main.run(small_arguments(workdir, train__num_steps=1)) == 0
  argv = small_arguments(workdir, train__num_steps=1, optim__lr=5e-4)
  line = _error(argv, capsys)
  assert 'optim.lr: 0.001 -> 0.0005' in line


def _change(table, name, array):
  return table.set_column(table.schema.get_field_index(name), name, array)


@pytest.mark.parametrize(
  ('damage', 'words'),
  [
    ('truncated', ['not a parquet']),
    ('no_caption', ['caption']),
    ('text_label', ['label_0']),
    ('bad_label', ['row 3', '0.3']),
  ],
)
def test_bad_parquet_is_one_line(
  arguments, tiny_pairs, tmp_path, capsys, damage, words
):
  path = tmp_path / 'bad.parquet'
  table = pq.read_table(tiny_pairs)
  if damage == 'no_caption':
    table = table.drop_columns(['caption'])
  elif damage == 'text_label':
    table = _change(table, 'label_0', pa.array(['1'] * len(table)))
  elif damage == 'bad_label':
    labels = table['label_0'].to_pylist()
    labels[3] = 0.3
    table = _change(table, 'label_0', pa.array(labels))
  pq.write_table(table, path)
  if damage == 'truncated':
    path.write_bytes(path.read_bytes()[:-100])
  line = _error(arguments(data__path=path), capsys)
  assert 'bad.parquet' in line
  assert all(word.lower() in line.lower() for word in words), line


@pytest.mark.parametrize('damage', ['missing', 'extra', 'shape', 'pickle'])
def test_bad_weights_are_one_line(
  arguments, tiny_folder, tmp_path, capsys, damage
):
  folder = tmp_path / 'broken'
  pipeline.save(folder, base=tiny_folder, params={})
  path = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
  tensors = safetensors_io.load(path)
  if damage == 'missing':
    del tensors['conv_in.bias']
  elif damage == 'extra':
    tensors['conv_in.extra'] = np.zeros(3, np.float32)
  elif damage == 'shape':
    tensors['conv_in.bias'] = np.zeros(3, np.float32)
  path.unlink()
  if damage == 'pickle':
    path.write_bytes(b'\x80\x04K\x01.')
  else:
    safetensors_io.save(path, tensors)
  line = _error(arguments(model__folder=folder), capsys)
  assert 'diffusion_pytorch_model.safetensors' in line
  if damage != 'pickle':
    assert 'conv_in.' in line
  else:
    assert 'pickle' in line
