"""The whole command on a tiny pipeline: outputs, resume, and bad input."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dpo_jax import main
from dpo_jax.weights import pipeline

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 8


def _metrics(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def _losses(workdir):
  return {r['step']: r['loss'] for r in _metrics(workdir) if 'loss' in r}


def test_a_run_leaves_everything_promised(arguments, tmp_path, tiny_folder):
  workdir = tmp_path / 'run'
  assert main.run(arguments()) == 0
  config = json.loads((workdir / 'config.json').read_text())
  assert config['train']['num_steps'] == STEPS
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == [
    '7',
    '8',
  ]
  assert list((workdir / 'tensorboard').glob('events*'))
  assert list((workdir / 'samples').glob('*.png'))
  report = json.loads((workdir / 'report.json').read_text())
  # No judge was configured: these are null and say why.
  assert report['style_share'] is None and report['win_rate'] is None
  assert 'eval.judge' in report['reasons']['win_rate']
  assert set(report['retrieval']) >= {'base', 'aligned'}
  assert 0 <= report['implicit_accuracy'] <= 1
  assert report['settings']['seed'] == 0 and report['seconds'] > 0
  assert report['data']['ties_dropped'] > 0
  html = (workdir / 'report.html').read_text()
  assert '<html' in html and 'http://' not in html.replace(
    'http://www.w3.org', ''
  )
  first, *_ = _metrics(workdir)
  assert first['loss'] == pytest.approx(np.log(2), abs=1e-6)
  wanted = {
    'reward/win',
    'reward/lose',
    'reward/margin',
    'reward/accuracy',
    'reward/sigmoid_neg_margin',
    'err/policy_win',
    'err/delta_win',
    'err/delta_lose',
    'norm/grads',
    'norm/updates',
    'lr',
  }
  assert wanted <= set(first)
  assert any('reward/accuracy_t' in key for r in _metrics(workdir) for key in r)
  before = pipeline.load(tiny_folder).params
  after = pipeline.load(workdir / 'export').params
  for name in ('vae', 'text_encoder'):
    jax.tree.map(np.testing.assert_array_equal, before[name], after[name])
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), before['unet'], after['unet']
  )
  assert min(jax.tree.leaves(moved)) >= 0
  assert max(jax.tree.leaves(moved)) > 0


def test_a_run_in_bfloat16_throughout_starts_without_a_margin(
  arguments, tmp_path
):
  argv = arguments(
    model__dtype='bfloat16',
    model__ref_dtype='bfloat16',
    model__param_dtype='bfloat16',
    model__remat='dots',
    optim__mu_dtype='bfloat16',
    optim__ema_decay=0.5,
    train__num_steps=3,
    train__accumulate=1,
    train__eval_every=0,
  )
  assert main.run(argv) == 0
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  first, *later = [json.loads(line) for line in lines]
  assert first['margin_noise/sd'] == first['margin_noise/max'] == 0.0
  assert first['loss'] == pytest.approx(0.6931472, abs=1e-6)
  assert later and not any('margin_noise/sd' in line for line in later)
  assert (tmp_path / 'run' / 'export' / 'unet').is_dir()


def test_sft_and_denoise_run_through_the_same_command(
  arguments, tmp_path, tiny_folder
):
  short = {'train__num_steps': 2, 'train__eval_every': 0}
  assert main.run(arguments('configs/quickstart.py:sft', **short)) == 0
  workdir = tmp_path / 'denoise'
  argv = arguments(
    'configs/emoji_base.py:unet',
    workdir,
    model__random_init="('unet','text_encoder')",
    **short,
  )
  assert main.run(argv) == 0
  quality = json.loads((workdir / 'quality.json').read_text())
  assert quality['n'] == 8 and 0 <= quality['retrieval'] <= 1
  before = pipeline.load(tiny_folder).params
  after = pipeline.load(workdir / 'export').params
  jax.tree.map(np.testing.assert_array_equal, before['vae'], after['vae'])


def test_autoencode_and_classify_run_and_their_results_are_used(
  arguments, tmp_path
):
  short = {'train__num_steps': 2, 'train__eval_every': 0}
  vae_dir = tmp_path / 'vae'
  argv = arguments(
    'configs/emoji_base.py:vae', vae_dir, model__random_init="('vae',)", **short
  )
  assert main.run(argv) == 0
  config = json.loads((vae_dir / 'export/vae/config.json').read_text())
  assert config['scaling_factor'] not in (0.7, 1.0)
  judge_dir = tmp_path / 'judge'
  argv = arguments(
    'configs/emoji_judge.py', judge_dir, model__folder=None, **short
  )
  assert main.run(argv) == 0
  argv = arguments(
    model__folder=vae_dir / 'export',
    eval__judge=judge_dir / 'export',
    eval__preferred='twemoji',
    **short,
  )
  assert main.run(argv) == 0
  report = json.loads((tmp_path / 'run' / 'report.json').read_text())
  rate = report['win_rate']
  assert rate['n'] == 8 and rate['low'] <= rate['value'] <= rate['high']
  assert set(report['style_share']) >= {'base', 'aligned'}


def test_one_device_and_eight_have_equal_losses(arguments, tmp_path):
  losses = []
  for data in (1, 8):
    workdir = tmp_path / f'devices{data}'
    # Adam's first steps have the size of the rate whatever the gradient is,
    # so rounding moves a weight by it, and beta multiplies what comes of it:
    # at beta 5000 the losses agree to 1e-4 and no better.
    argv = arguments(
      workdir=workdir,
      train__num_steps=4,
      objective__numbers__beta=100.0,
      objective__reward_beta=100.0,
    )
    log = tmp_path / 'log'
    assert _start(argv, log, devices=data).wait(600) == 0, log.read_text()
    losses.append(_losses(workdir))
  assert losses[0].keys() == losses[1].keys() == {1, 2, 3, 4}
  np.testing.assert_allclose(
    list(losses[0].values()), list(losses[1].values()), rtol=1e-5
  )


def _start(argv, log, *, devices=2):
  """Starts the command; its standard error goes to the file `log`.

  Not to a pipe: nobody would read it while the test waits.
  """
  environment = os.environ | {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'PYTHONPATH': str(ROOT),
  }
  with log.open('w') as stream:
    return subprocess.Popen(
      [sys.executable, '-m', 'dpo_jax.main', *argv[1:]],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=stream,
    )


def _logged_step(workdir):
  try:
    return max(_losses(workdir), default=0)
  except (OSError, ValueError):
    return 0


def test_killed_five_times_ends_bit_identical(arguments, tmp_path):
  calm, killed = tmp_path / 'calm', tmp_path / 'killed'
  steps = 12
  log = tmp_path / 'log'
  process = _start(arguments(workdir=calm, train__num_steps=steps), log)
  assert process.wait(600) == 0, log.read_text()
  dice = random.Random(0)
  kills = 0
  for number in range(5):
    process = _start(arguments(workdir=killed, train__num_steps=steps), log)
    target = min(steps - 1, _logged_step(killed) + dice.randint(1, 2))
    while _logged_step(killed) < target and process.poll() is None:
      time.sleep(0.002)
    time.sleep(dice.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    kills += process.wait() == -signal.SIGKILL
    assert number + 1 == kills, 'the run ended before it was killed'
  process = _start(arguments(workdir=killed, train__num_steps=steps), log)
  assert process.wait(600) == 0, log.read_text()
  final = [
    json.loads((path / 'final.json').read_text()) for path in (calm, killed)
  ]
  assert final[0] == final[1]
  assert final[0]['step'] == final[0]['data_position'] == steps
  assert _losses(calm) == _losses(killed)
  left = [
    path.name
    for path in (killed / 'checkpoints').iterdir()
    if not path.name.isdigit()
  ]
  assert not left


def test_three_plus_three_steps_equal_six_bitwise(arguments, tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  options = {'train__num_steps': 6, 'train__eval_every': 0}
  assert main.run(arguments(workdir=whole, **options)) == 0
  import dpo_jax.train.loop as loop_lib

  class _Stop(Exception):
    pass

  real = loop_lib.checkpoint_lib.Checkpointer.save

  def stop_after(self, step, state, position):
    real(self, step, state, position)
    if step == 3:
      self.wait()
      raise _Stop

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop_lib.checkpoint_lib.Checkpointer, 'save', stop_after)
    with pytest.raises(_Stop):
      main.run(arguments(workdir=parts, **options))
  assert main.run(arguments(workdir=parts, **options)) == 0
  final = [
    json.loads((path / 'final.json').read_text()) for path in (whole, parts)
  ]
  assert final[0] == final[1]
  assert _losses(whole) == _losses(parts)


def test_a_nan_stops_the_run_and_names_step_and_examples(
  arguments, tmp_path, capsys
):
  argv = arguments(optim__lr=1e30, optim__warmup_steps=0, optim__clip_norm=0.0)
  assert main.run(argv) == 3
  workdir = tmp_path / 'run'
  (dump,) = workdir.glob('nonfinite_step_*.json')
  record = json.loads(dump.read_text())
  assert len(record['ids']) == len(record['epochs']) == 8
  step = record['step']
  error = capsys.readouterr().err
  assert f'step {step}: ' in error and 'is not finite' in error
  assert str(record['ids'][0]) in error
  assert f'last good checkpoint: step {step - 1}' in error
  kept = max(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert kept == step - 1


def test_the_process_exits_with_2_and_no_traceback(arguments, tmp_path):
  log = tmp_path / 'log'
  assert _start(arguments(optim__l=1), log).wait(300) == 2
  error = log.read_text()
  assert 'Traceback' not in error and 'did you mean optim.lr?' in error
