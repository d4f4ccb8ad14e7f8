"""The recipes of SDXL, its refiner, Turbo and SD 2.x through the command."""

import json
import shutil

import numpy as np
import pytest

from dpo_jax import main
from dpo_jax.tools import arguments as tools
from dpo_jax.tools import generate


def _with_scheduler(folder, target, **changes):
  copy = shutil.copytree(folder, target)
  path = copy / 'scheduler' / 'scheduler_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  return copy


@pytest.mark.parametrize(
  'recipe, changes',
  [
    ('sdxl.py', {}),
    ('sdxl.py:refiner', {'data__micro_cond': 'true_size'}),
    ('sdxl_turbo.py', {}),
    ('sd21.py:paper', {}),
  ],
)
def test_a_recipe_trains_reports_and_exports(
  arguments,
  tiny_folder,
  tiny_xl_folder,
  tiny_refiner_folder,
  tmp_path,
  recipe,
  changes,
):
  folder = tiny_refiner_folder if 'refiner' in recipe else tiny_xl_folder
  if recipe.startswith('sd21'):
    folder = _with_scheduler(
      tiny_folder, tmp_path / 'v', prediction_type='v_prediction'
    )
  argv = arguments(
    recipe=f'configs/{recipe}',
    model__folder=folder,
    model__dtype='float32',
    train__num_steps=2,
    train__eval_every=0,
    **changes,
  )
  assert main.run(argv) == 0
  workdir = tmp_path / 'run'
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  losses = [r['loss'] for r in map(json.loads, lines) if 'loss' in r]
  assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
  assert losses[1] != losses[0]
  report = json.loads((workdir / 'report.json').read_text())
  assert report['settings']['source']['name'] == str(folder)
  index = [
    json.loads((path / 'model_index.json').read_text())
    for path in (folder, workdir / 'export')
  ]
  assert index[0] == index[1]

  diffusers = pytest.importorskip('diffusers')
  pytest.importorskip('torch')
  cls = getattr(diffusers, index[0]['_class_name'])
  assert cls.from_pretrained(workdir / 'export').unet is not None


def test_pictures_of_a_run_by_its_workdir(
  arguments, tiny_xl_folder, tmp_path, capsys
):
  argv = arguments(
    recipe='configs/sdxl.py',
    model__folder=tiny_xl_folder,
    model__dtype='float32',
    train__num_steps=2,
    train__eval_every=0,
  )
  assert main.run(argv) == 0
  prompts = tmp_path / 'p.txt'
  prompts.write_text('red apple\n')
  for out, more in (
    ('base', []),
    ('of_run', [f'--weights={tmp_path / "run"}']),
    ('export', [f'--weights={tmp_path / "run" / "export"}']),
  ):
    code = tools.run(
      generate.main,
      [
        f'--model={tiny_xl_folder}',
        f'--prompts={prompts}',
        f'--out={tmp_path / out}',
        '--steps=2',
        '--size=16',
        '--batch=8',
        *more,
      ],
    )
    assert code == 0, capsys.readouterr().err
  base, run, export = (
    json.loads((tmp_path / out / 'settings.json').read_text())['unet_sha256']
    for out in ('base', 'of_run', 'export')
  )
  assert base != run and run == export


def test_a_run_is_bound_to_the_model_it_began_with(
  arguments, tmp_path, capsys, monkeypatch
):
  argv = arguments(train__num_steps=1, train__eval_every=0)
  # It is bound from its start on: there is no need of its end.
  monkeypatch.setattr(main.finish, 'finish', lambda *_: None)
  assert main.run(argv) == 0
  path = tmp_path / 'run' / 'source.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'revision': 'x'}))
  assert main.run(argv) == 2
  assert 'this run began with' in capsys.readouterr().err
