"""Rewards by two processes: learnt, and used, as one process does."""

import json

import numpy as np
import pytest
import reward_folder
import two_processes

from dpo_jax import main
from dpo_jax.tools import arguments as tool_arguments
from dpo_jax.tools import generate
from dpo_jax.weights import rewards

# On a busy machine two processes compile for minutes.
pytestmark = pytest.mark.timeout(1800)


def test_two_processes_train_the_reward_of_one(
  arguments, tiny_pixel_folder, make_labels, tmp_path
):
  labels, found = make_labels(), []
  for name in ('two', 'alone'):
    argv = arguments(
      'configs/reward.py:mnist',
      tmp_path / name,
      model__folder=tiny_pixel_folder,
      data__path=labels,
      data__resolution=8,
      reward__per_class=3,
      reward__networks=2,
      reward__widths='(8,)',
      objective__numbers__beta=None,
      objective__reward_beta=None,
      optim__warmup_steps=None,
      train__eval_every=0,
      train__num_steps=3,
    )
    if name == 'alone':
      assert main.run(argv) == 0
    else:
      codes, logs = two_processes.run(
        'dpo_jax.main', argv[1:], tmp_path / 'logs', devices=4
      )
      assert codes == [0, 0], logs
      assert '2 processes' in logs[0]
    run = tmp_path / name
    lines = map(json.loads, (run / 'metrics.jsonl').open())
    found.append(
      (
        [line['loss'] for line in lines if 'loss' in line],
        rewards.load(run / 'export'),
        json.loads((run / 'report.json').read_text()),
      )
    )
  (losses, ours, report), (wanted, theirs, their_report) = found
  assert len(losses) == 3
  np.testing.assert_allclose(losses, wanted, rtol=1e-5)
  for one, other in zip(ours.members, theirs.members, strict=True):
    np.testing.assert_allclose(
      one['logit']['kernel'], other['logit']['kernel'], atol=1e-4
    )
  for name in ('training', 'held_out'):
    counts = [
      [level['ensemble']['accuracy']['n'] for level in one[name]]
      for one in (report, their_report)
    ]
    assert counts[0] == counts[1] != []


def test_two_processes_draw_what_one_draws(tiny_pixel_folder, tmp_path):
  reward = reward_folder.write(
    tmp_path / 'reward', 'time', 1, (8, 8), 'latents'
  )
  prompts = tmp_path / 'prompts.txt'
  prompts.write_text('a\nb\n')
  ways = {
    'guided': ['--reward_scale=3', '--recurrence=2'],
    'kept': ['--reject=0.5', '--reject_tries=40'],
  }
  for name, more in ways.items():
    argv = [
      f'--model={tiny_pixel_folder}',
      f'--prompts={prompts}',
      f'--reward={reward}',
      '--steps=2',
      '--size=8',
      '--batch=8',
      '--images_per_prompt=5',
      *more,
    ]
    two, alone = tmp_path / f'{name}2', tmp_path / f'{name}1'
    codes, logs = two_processes.run(
      'dpo_jax.tools.generate',
      [*argv, f'--out={two}'],
      tmp_path / f'logs_{name}',
      devices=4,
    )
    assert codes == [0, 0], logs
    assert '10 pictures in' in logs[0] and 'pictures in' not in logs[1]
    argv = [*argv, f'--out={alone}']
    assert tool_arguments.run(generate.main, argv) == 0
    entries = [
      [json.loads(line) for line in (out / 'manifest.jsonl').open()]
      for out in (two, alone)
    ]
    assert len(entries[0]) == 10
    for ours, theirs in zip(*entries, strict=True):
      assert ours['file'] == theirs['file']
      assert ours.get('tries') == theirs.get('tries')
      assert ours['log_reward'] == pytest.approx(theirs['log_reward'], abs=1e-4)
