"""Advice on logs of healthy, flat and collapsing runs, with noise."""

import numpy as np
import pytest

from dpo_jax.train import advice

STEPS = [10 * (i + 1) for i in range(40)]
REF = 0.2


def _values(win=0.0, lose=0.0, accuracy=0.7, margin=0.3):
  """One window; win and lose are shares of the reference's error."""
  return {
    'err/delta_win': win * REF,
    'err/delta_lose': lose * REF,
    'err/ref_win': REF,
    'err/ref_lose': REF,
    'reward/accuracy': accuracy,
    'reward/margin': margin,
  }


def _run(make, *, warmup_steps=20, steps=STEPS):
  """(step, line) of all advice of a run; make: place in [0, 1] -> values."""
  looks = advice.Collapse(warmup_steps=warmup_steps)
  said = [
    (step, looks.look(step, make(i / len(steps))))
    for i, step in enumerate(steps)
  ]
  return [(step, line) for step, line in said if line]


def _noisy(seed, scale):
  rng = np.random.default_rng(seed)
  return lambda: float(rng.normal(0, scale))


def test_a_healthy_run_gets_no_advice():
  assert _run(lambda x: _values(win=-0.05 * x, lose=0.3 * x)) == []
  assert _run(lambda x: _values(win=0.02 * x, lose=0.5 * x)) == []


@pytest.mark.parametrize('seed', range(5))
def test_a_collapse_is_seen_once_with_what_to_change(seed):
  noise = _noisy(seed, 0.01)
  said = _run(lambda x: _values(win=0.9 * x + noise(), lose=1.2 * x + noise()))
  assert len(said) == 1
  step, line = said[0]
  # Both are above the share from 0.111 of the run on; then the windows.
  assert 10 * (4 + advice.WINDOWS) <= step <= 10 * (12 + advice.WINDOWS)
  assert line.startswith(f'step {step}: ') and '\n' not in line
  for key in (
    'objective.numbers.beta',
    'optim.lr',
    'objective.safeguard',
    'objective.sft_weight',
  ):
    assert key in line


def test_the_line_tells_both_rises():
  said = _run(lambda x: _values(win=0.2 + 0.8 * x, lose=0.3 + 2 * x))
  # The twelfth of 40 windows.
  assert said[0][0] == 120 and '(+42% and +85%)' in said[0][1]


@pytest.mark.parametrize('seed', range(20))
def test_noise_around_a_high_level_does_not_trigger(seed):
  noise = _noisy(seed, 0.03)
  assert _run(lambda x: _values(win=0.4 + noise(), lose=0.5 + noise())) == []


@pytest.mark.parametrize('seed', range(20))
def test_noise_around_the_reference_does_not_trigger(seed):
  noise = _noisy(seed, 0.3)
  assert _run(lambda x: _values(win=noise(), lose=noise())) == []


def test_errors_that_doubled_are_told_at_once_however_they_got_there():
  """Shares of the collapsing run of docs/healthy_run.md, every 5 steps."""
  wins = [0.0, 0.03, 0.9, 4.7, 15.0, 51.4, 82.2, 110.0, 95.0, 152.0, 141.0]
  loses = [0.0, 0.04, 1.1, 5.5, 20.7, 73.4, 119.2, 160.0, 190.0, 217.0, 242.0]
  looks = advice.Collapse(warmup_steps=0)
  said = [
    looks.look(i, _values(win=win, lose=lose))
    for i, (win, lose) in enumerate(zip(wins, loses, strict=True))
  ]
  # The third window above one.
  assert [bool(line) for line in said].index(True) == 5
  assert sum(map(bool, said)) == 1 and 'both rise' in said[5]


def test_a_loser_that_doubled_alone_is_no_collapse():
  assert _run(lambda x: _values(win=0.5, lose=9.0)) == []
  assert _run(lambda x: _values(win=9.0, lose=0.5)) == []


def test_both_must_rise_and_stand_above_the_share():
  assert _run(lambda x: _values(win=0.5, lose=0.2 + 2 * x)) == []
  assert _run(lambda x: _values(win=0.2 + 2 * x, lose=0.5)) == []
  assert _run(lambda x: _values(win=0.5 - 0.3 * x, lose=0.5 - 0.3 * x)) == []
  assert _run(lambda x: _values(win=0.09 * x, lose=0.3 + 2 * x)) == []


def test_a_flat_run_is_told_once_and_only_after_the_warmup():
  noise = _noisy(0, 0.003)
  said = _run(
    lambda x: _values(accuracy=0.5 + noise(), margin=noise()), warmup_steps=50
  )
  assert len(said) == 1
  # Windows count from step 110 on, twice the warmup being 100.
  step, line = said[0]
  assert step == 100 + 10 * advice.WINDOWS
  assert 'nothing is learnt' in line and 'optim.lr' in line


@pytest.mark.parametrize(
  'values',
  [
    {'accuracy': 0.5, 'margin': 0.05},
    {'accuracy': 0.4, 'margin': -0.3},
  ],
)
def test_a_run_that_moves_is_not_flat(values):
  assert _run(lambda x: _values(**values)) == []


@pytest.mark.parametrize('accuracy', [0.4, 0.56, 0.75])
def test_tiny_margins_are_flat_whatever_their_signs(accuracy):
  """The flat run of docs/healthy_run.md ended at 0.75, with margin 0.004."""
  said = _run(lambda x: _values(accuracy=accuracy, margin=0.004 * x))
  assert len(said) == 1 and f'accuracy {accuracy:.3f}' in said[0][1]


def test_one_window_that_moves_begins_the_count_again():
  looks = advice.Collapse(warmup_steps=0)
  flat, moved = _values(accuracy=0.5, margin=0.0), _values()
  sequence = [flat] * 11 + [moved] + [flat] * 11
  assert all(looks.look(i + 1, v) is None for i, v in enumerate(sequence))
  assert 'nothing is learnt' in looks.look(24, flat)


def test_windows_without_the_numbers_are_passed_over():
  looks = advice.Collapse(warmup_steps=0)
  absent = _values(win=float('nan'), accuracy=float('nan'))
  lines = []
  for i in range(advice.WINDOWS):
    if i == 5:
      # No window of the twelve, and none that ends them.
      assert looks.look(i, {'loss': 0.5}) is None
      assert looks.look(i, absent) is None
    lines.append(
      looks.look(i, _values(win=0.3 + 0.05 * i, lose=0.3 + 0.05 * i))
    )
  assert lines[:-1] == [None] * (advice.WINDOWS - 1)
  assert 'both rise' in lines[-1]
