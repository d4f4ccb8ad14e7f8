"""Rewards through the command: labels in, an ensemble and a report out."""

import json
import shutil

import numpy as np
import pytest

from dpo_jax import build, flags, main, reward_results
from dpo_jax.weights import rewards

SMALL = {
  'data__resolution': 8,
  'reward__per_class': 3,
  'reward__networks': 2,
  'reward__widths': '(8,)',
  'objective__numbers__beta': None,
  'objective__reward_beta': None,
  'optim__warmup_steps': None,
  'train__eval_every': 0,
}


@pytest.fixture
def reward_arguments(arguments, make_labels):
  def make(variant, workdir=None, *, folder, labels=None, **overrides):
    values = {'model__folder': folder, 'data__path': labels or make_labels()}
    return arguments(
      f'configs/reward.py:{variant}', workdir, **SMALL | values | overrides
    )

  return make


def _error(argv, capsys):
  capsys.readouterr()
  assert main.run(argv) == 2
  (line,) = [
    line
    for line in capsys.readouterr().err.splitlines()
    if line.startswith('error: ')
  ]
  return line


def test_a_run_on_x_t_goes_on_bitwise_and_leaves_an_ensemble(
  reward_arguments, tiny_pixel_folder, make_labels, tmp_path, capsys
):
  argv = reward_arguments(
    'mnist',
    folder=tiny_pixel_folder,
    labels=make_labels(),
    train__num_steps=6,
    train__checkpoint_every=3,
  )
  assert main.run(argv) == 0, capsys.readouterr().err
  run = tmp_path / 'run'
  final = json.loads((run / 'final.json').read_text())
  loaded = rewards.load(run / 'export')
  assert loaded.config.kind == 'time' and len(loaded.members) == 2
  # A grey model's, of 13 labels 40% are held out.
  assert loaded.config.in_channels == 1
  assert loaded.record == {
    'space': 'pixels',
    'size': [8, 8],
    'place': 'x_t',
    'model': {'name': str(tiny_pixel_folder), 'revision': ''},
    'num_train_timesteps': 1000,
    'labels': {'benign': 5, 'malign': 3},
    'clip': None,
    # a = 0.02 for as many benign labels as malign ones.
    'odds': [0.02, 0.02],
  }
  kernels = [one['logit']['kernel'] for one in loaded.members]
  assert (np.abs(kernels) > 0).any() and (kernels[0] != kernels[1]).any()
  report = json.loads((run / 'report.json').read_text())
  assert report['data']['held_out_labels'] == 5
  for name, count in (('training', 8), ('held_out', 5)):
    assert [level['t'] for level in report[name]] == [0, 250, 500, 750]
    for level in report[name]:
      assert len(level['members']) == 2
      for one in (level['ensemble'], *level['members']):
        assert one['accuracy']['n'] == count
        assert all(
          part['low'] <= part['value'] <= part['high'] for part in one.values()
        )
    assert (run / 'samples' / f'{name}.png').is_file()

  # As if it had been killed after step 3.
  shutil.rmtree(run / 'checkpoints' / '6')
  (run / 'final.json').unlink()
  assert main.run(argv) == 0, capsys.readouterr().err
  assert json.loads((run / 'final.json').read_text()) == final


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'reward__kind': 'noise'}, "reward.kind='noise': allowed are time"),
    ({'reward__variant': 'all'}, 'allowed are single, union, ensemble'),
    ({'reward__variant': 'single'}, 'reward.networks=2: reward.variant=single'),
    ({'reward__per_class': 4}, 'per_class=4: there are 3 malign labels'),
    ({'reward__widths': '(12,)'}, 'reward.widths=(12,): 12 is no multiple'),
    ({'reward__copies': 1}, 'reward.rotation=20.0: changes copies'),
    ({'reward__rotation': 0.0}, 'reward.copies=10: they are all equal'),
    ({'reward__rotation': 200.0}, 'reward.rotation=200.0: must be at least 0'),
    ({'reward__loss': 'pairwise'}, 'reward.benign_weight=0.02: is for'),
    ({'reward__space': 'latents'}, "space='latents': "),
    ({'model__folder': ''}, 'model.folder is empty: a reward of reward.kind'),
    ({'noise__t_min': 3}, 'noise.t_min=3: with task=reward timesteps'),
    ({'export__dtype': 'float16'}, "export.dtype='float16': with task=reward"),
    ({'data__path': ''}, 'data.path is empty: name the labels'),
    ({'data__path': 'tests'}, 'likes.jsonl: no such file'),
  ],
)
def test_bad_settings_are_one_line(
  reward_arguments, tiny_pixel_folder, capsys, changes, words
):
  argv = reward_arguments('mnist', folder=tiny_pixel_folder, **changes)
  assert words in _error(argv, capsys)


def test_pairs_of_a_latent_model_in_latents(
  reward_arguments, tiny_folder, make_labels, tmp_path, capsys
):
  argv = reward_arguments(
    'sd',
    folder=tiny_folder,
    data__eval_path=make_labels('more', seed=1, benign=2, malign=1),
    train__num_steps=1,
    reward__loss='pairwise',
    reward__benign_weight=1.0,
    reward__variant='single',
    reward__networks=1,
  )
  assert main.run(argv) == 0, capsys.readouterr().err
  loaded = rewards.load(tmp_path / 'run' / 'export')
  assert loaded.record['space'] == 'latents'
  assert loaded.record['place'] == 'x_0_hat' and not loaded.record['odds']
  assert loaded.record['size'] == [2, 2] and loaded.config.in_channels == 4
  assert loaded.record['model']['name'] == str(tiny_folder)
  report = json.loads((tmp_path / 'run' / 'report.json').read_text())
  (level,) = report['held_out']
  assert level['ensemble']['accuracy']['n'] == 3 and 'members' not in level


def test_pixels_need_no_generator(reward_arguments):
  argv = reward_arguments('church', folder=None, data__holdout=0.0)
  job = build.build(flags.parse(argv)[0])
  assert job.opened is None and job.reward.shape == (8, 8, 3)
  assert job.reward.describe({}, None)['model'] is None
  # Held out is nothing: all are trained on, and looked at.
  assert job.counts['held_out_labels'] == 0 and len(job.data.held) == 13
  batch = next(job.loop_arguments['loader'])
  job.loop_arguments['loader'].close()
  assert batch['images'].shape == (8, 8, 8, 3)
  assert batch['members'].shape == (8, 2)


@pytest.mark.parametrize(
  # Two networks share 3 malign labels, and the union has 3 benign ones of each.
  ('variant', 'odds'),
  [('ensemble', [0.1, 0.1]), ('union', [0.2])],
)
def test_odds_are_of_the_labels_a_network_has(reward_arguments, variant, odds):
  argv = reward_arguments(
    'church', folder=None, data__holdout=0.0, reward__variant=variant
  )
  job = build.build(flags.parse(argv)[0])
  job.loop_arguments['loader'].close()
  np.testing.assert_allclose(reward_results.find_odds(job), odds)
