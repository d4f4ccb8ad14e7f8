"""A faithful Pick-a-Pic file from prepare to the report, and what stops it."""

import json

import jax
import numpy as np
import pickapic_file
import pytest

from dpo_jax import main
from dpo_jax.tools import inspect, prepare, verify

SIZE = 16
SETTINGS = {
  'data__holdout': 0.3,
  'data__resolution': SIZE,
  'eval__retrieval': False,
  # The rate of configs/sd15.py.
  'optim__lr': 2.048e-5,
  # That of its :paper. At 5000 rounding latents to float16 moves the losses of
  # random networks by up to 1.1e-3.
  'objective__numbers__beta': 2000.0,
}


@pytest.fixture(scope='module', params=['tiny_folder', 'tiny_xl_folder'])
def model(request):
  return request.getfixturevalue(request.param)


@pytest.fixture(scope='module')
def prepared(model, tmp_path_factory):
  """The faithful file, prepared with latents in 3 shards."""
  folder = tmp_path_factory.mktemp('faithful')
  source = pickapic_file.write(folder / 'a.parquet', pickapic_file.rows())
  flags = ['--format=pickapic', '--shards=3', f'--model={model}']
  prepare.main(
    [f'--source={source}', f'--out={folder / "out"}', *flags, f'--size={SIZE}']
  )
  return folder / 'out'


def losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return {r['step']: r['loss'] for r in found if 'loss' in r}


def errors(argv, capsys):
  capsys.readouterr()
  assert main.run(argv) == 2
  lines = capsys.readouterr().err.splitlines()
  (line,) = [line for line in lines if line.startswith('error: ')]
  return line


def test_prepare_inspect_verify_train(
  prepared, model, arguments, tmp_path, capsys
):
  counts = pickapic_file.COUNTS
  report = json.loads((prepared / 'build_report.json').read_text())
  # The model's own tokenizers count long captions.
  assert report['counts'] == counts
  assert verify.run([f'--data={prepared}']) == 0
  inspect.main([f'--data={prepared}', f'--out={tmp_path / "page"}'])
  seen = json.loads((tmp_path / 'page' / 'inspect.json').read_text())
  for name, count in {
    'records': counts['kept'],
    'captions': 18,
    'images_shown': 2 * counts['kept'],
    # Rows 14 and 15 show the images of row 0 again.
    'images': 2 * counts['kept'] - 4,
    'images_undecodable': 0,
  }.items():
    assert seen['counts'][name] == count
  assert seen['repeats']['repeated'] == counts['duplicates']
  assert seen['repeats']['conflicting'] == [[0, 4, 5]]
  assert seen['labels']['first'] == 16
  # Rows 1, 14, 29 and 30.
  assert seen['labels']['second'] == 4
  assert seen['build'] == report
  runs = {}
  for name, overrides in {
    'cached': {'data__posterior': 'mean'},
    'decoded': {'data__posterior': 'mean', 'data__use_cache': False},
  }.items():
    workdir = tmp_path / name
    argv = arguments(
      workdir=workdir,
      model__folder=model,
      data__path=prepared,
      train__num_steps=20,
      train__checkpoint_every=10,
      **SETTINGS,
      **overrides,
    )
    assert main.run(argv) == 0
    runs[name] = losses(workdir)
    data = json.loads((workdir / 'report.json').read_text())['data']
    assert data['pairs'] == counts['kept']
    for given, shown in {
      'rows': 'rows',
      'ties': 'ties_dropped',
      'unlabelled': 'unlabelled_dropped',
      'identical': 'identical_dropped',
      'unreadable': 'unreadable_dropped',
      'over_token_limit': 'pairs_with_cut_captions',
    }.items():
      assert data[shown] == counts[given]
    assert data['training_pairs'] + data['held_out_pairs'] == counts['kept']
  assert len(runs['cached']) == 20
  assert runs['cached'][1] == pytest.approx(np.log(2), abs=1e-6)
  for step, loss in runs['decoded'].items():
    assert runs['cached'][step] == pytest.approx(loss, rel=1e-3)


def test_a_cache_of_another_model_is_refused(
  prepared, model, arguments, tiny_folder, tiny_xl_folder, capsys
):
  other = tiny_xl_folder if model == tiny_folder else tiny_folder
  argv = arguments(model__folder=other, data__path=prepared, **SETTINGS)
  line = errors(argv, capsys)
  assert str(prepared) in line and 'its cache is of the model' in line
  assert str(model) in line and str(other) in line


def test_what_does_not_go_together(
  prepared, model, arguments, tiny_pairs, capsys
):
  for overrides, words in [
    ({'eval__retrieval': True}, 'eval.retrieval=True'),
    ({'data__random_crop': True}, 'data.random_crop=False'),
    ({'data__resolution': 32}, 'data.resolution=32'),
    ({'data__weights': '(1,2)'}, 'data.weights=(1, 2)'),
    ({'data__path': f'{prepared},{tiny_pairs}'}, 'is no prepared folder'),
    ({'data__path': tiny_pairs, 'data__weights': '(1,)'}, 'data.weights=(1,)'),
    ({'data__path': tiny_pairs, 'data__eval_path': 'x'}, 'data.eval_path=x'),
    ({'data__eval_path': '/no/such'}, '/no/such: no such folder'),
    ({'data__posterior': 'mode'}, 'sample, mean'),
    ({'task': 'denoise'}, 'task=preference'),
  ]:
    base = {'data__path': prepared, 'model__folder': model}
    argv = arguments(**(base | SETTINGS | overrides))
    assert words in errors(argv, capsys)


def test_damage_is_counted_and_other_data_are_refused(
  arguments, tiny_pairs, tmp_path, capsys
):
  out = tmp_path / 'out'
  prepare.main([f'--source={tiny_pairs}', f'--out={out}', '--format=pickapic'])
  (shard,) = (out / 'pairs' / '1.0.0').glob('*array_record*')
  data = bytearray(shard.read_bytes())
  # In the middle of a picture.
  place = data.index(b'\x89PNG', len(data) // 2) + 200
  data[place : place + 8] = b'overwrit'
  shard.write_bytes(data)
  assert verify.run([f'--data={out}']) == 1
  assert '1 damaged records' in capsys.readouterr().out
  settings = SETTINGS | {'data__holdout': 0.0, 'data__path': out}
  assert main.run(arguments(train__num_steps=10, **settings)) == 0
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  shares = [json.loads(line).get('data/substituted', 0) for line in lines]
  kept = json.loads((tmp_path / 'run' / 'report.json').read_text())
  epochs = 10 * 8 // kept['data']['pairs']
  # One pair of one record, in each epoch.
  assert sum(shares) * 8 == pytest.approx(epochs, abs=1) and sum(shares) > 0
  sums = out / 'checksums.json'
  sums.write_text(sums.read_text() + ' ')
  line = errors(arguments(train__num_steps=10, **settings), capsys)
  assert 'data.json' in line and 'began with another data' in line
  assert jax.device_count() == 8
