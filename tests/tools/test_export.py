"""Exports of checkpoints, and what the generate tool makes of a run."""

import json

import jax
import numpy as np
import optax
import pytest

from configs import common
from dpo_jax.tools import arguments, export
from dpo_jax.train import checkpoint
from dpo_jax.train import state as state_lib
from dpo_jax.weights import pipeline, safetensors_io


@pytest.fixture
def run_folder(tiny_folder, tmp_path):
  """A run with checkpoints of steps 1 and 2, whose EMA is the step's number."""
  config = common.get_config()
  config.model.folder = str(tiny_folder)
  config.export.dtype = 'float16'
  workdir = tmp_path / 'run'
  workdir.mkdir()
  (workdir / 'config.json').write_text(config.to_json())
  params = {'unet': pipeline.load(tiny_folder).params['unet']}
  keeper = checkpoint.Checkpointer(workdir, every=1, keep=3)
  for step in (1, 2):
    state = state_lib.init_state(params, optax.sgd(0.1), use_ema=True)
    ema = jax.tree.map(lambda leaf, n=step: 0.0 * leaf + n, state.ema)
    keeper.save(step, state.replace(ema=ema), {})
  keeper.close()
  return workdir


def _export(workdir, out, *more):
  argv = [f'--workdir={workdir}', f'--out={out}', *more]
  return arguments.run(export.main, argv)


@pytest.mark.parametrize('more, value', [([], 2.0), (['--step=1'], 1.0)])
def test_the_running_mean_of_a_step_is_written(
  run_folder, tiny_folder, tmp_path, more, value
):
  out = tmp_path / 'out'
  assert _export(run_folder, out, *more) == 0
  params = pipeline.load(out).params
  assert all(np.all(leaf == value) for leaf in jax.tree.leaves(params['unet']))
  base = pipeline.load(tiny_folder).params
  jax.tree.map(np.testing.assert_array_equal, params['vae'], base['vae'])
  tensors = safetensors_io.load(
    out / 'unet' / 'diffusion_pytorch_model.safetensors'
  )
  assert {str(tensor.dtype) for tensor in tensors.values()} == {'float16'}
  card = (out / 'README.md').read_text()
  assert f'Step {value:.0f} of a dpo_jax run of task preference' in card


def test_without_a_running_mean_the_parameters_are_written(
  run_folder, tmp_path
):
  params = {'unet': {'a': np.arange(3.0, dtype=np.float32)}}
  keeper = checkpoint.Checkpointer(tmp_path / 'plain', every=1, keep=3)
  state = state_lib.init_state(params, optax.adam(0.1), use_ema=False)
  keeper.save(5, state, {})
  keeper.close()
  found, step = checkpoint.restore_params(tmp_path / 'plain')
  assert step == 5
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_dtype_and_errors(run_folder, tmp_path, capsys):
  assert _export(run_folder, tmp_path / 'o', '--dtype=float32') == 0
  tensors = safetensors_io.load(
    tmp_path / 'o' / 'unet' / 'diffusion_pytorch_model.safetensors'
  )
  assert {str(tensor.dtype) for tensor in tensors.values()} == {'float32'}
  capsys.readouterr()
  assert _export(run_folder, tmp_path / 'p', '--step=3') == 2
  assert 'no checkpoint of step 3; there are 1, 2' in capsys.readouterr().err
  assert _export(tmp_path / 'nowhere', tmp_path / 'p') == 2
  assert 'config.json: cannot be read' in capsys.readouterr().err
  record = json.loads((run_folder / 'config.json').read_text())
  record['task'] = 'autoencode'
  (run_folder / 'config.json').write_text(json.dumps(record))
  assert _export(run_folder, tmp_path / 'p') == 2
  assert 'exported when it ends' in capsys.readouterr().err
  assert not (tmp_path / 'p').exists()
