"""The best step by known medians: kept, written down, and found again."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
import test_loop

from dpo_jax import sharding
from dpo_jax import task as task_lib
from dpo_jax.train import best, checkpoint, loop, preemption

# Of the steps 2, 4, 6 and 8: the best is in the middle, and comes twice.
MEDIANS = {2: 1.0, 4: 3.0, 6: 3.0, 8: 2.0}
ABOUT = {'scorer': {'name': 'known'}, 'prompts': {'n': 1}}


class _Killed(Exception):
  pass


def _selection(medians=MEDIANS, asked=None, about=ABOUT):
  def score(state):
    step = int(state.step)
    if asked is not None:
      asked.append(step)
    # The mean tells the state that was scored.
    mean = float(state.params['w'])
    return {best.MEDIAN: medians[step], f'{best.GROUP}mean': mean}

  return best.Selection(score, about)


def _run(workdir, selection=None, should_stop=lambda step: False, **changes):
  numbers = {
    'seed': 0,
    'num_steps': 8,
    'batch_size': 8,
    'accumulate': 1,
    'ema_decay': 0.0,
    'log_every': 3,
    'eval_every': 2,
    'checkpoint_every': 3,
    'keep': 1,
  }
  return loop.run(
    task=task_lib.Task(
      params={'w': np.zeros((), np.float32)}, frozen={}, loss=test_loop._loss
    ),
    optimizer=optax.sgd(0.1),
    schedule=lambda step: 0.1,
    loader=test_loop._Loader(),
    eval_batches=lambda: [],
    options=loop.Options(**numbers | changes),
    mesh=sharding.make_mesh(data=2, devices=jax.devices()[:2]),
    workdir=workdir,
    should_stop=should_stop,
    selection=selection,
  )


def _steps(workdir):
  names = [path.name for path in (workdir / 'checkpoints').iterdir()]
  assert all(name.isdigit() for name in names), names
  return sorted(map(int, names))


def _scores(workdir):
  """Lines of scores as they stand, but for their order."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return sorted(line for line in lines if best.MEDIAN in line)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir, asked = tmp_path_factory.mktemp('whole'), []
  result = _run(workdir, _selection(asked=asked))
  assert asked == [2, 4, 6, 8]
  return result, workdir


def test_the_first_of_the_largest_medians_is_kept_and_written(whole):
  result, workdir = whole
  # Of the newest one is kept; 4 is no multiple of checkpoint_every.
  assert _steps(workdir) == [4, 8]
  record = json.loads((workdir / 'best.json').read_text())
  assert record == result.best == best.read(workdir)
  params, _ = checkpoint.restore_params(workdir, step=4)
  assert record == {'step': 4, 'median': 3.0, 'mean': params['w']} | ABOUT
  rows = [json.loads(line) for line in _scores(workdir)]
  assert {row['step']: row[best.MEDIAN] for row in rows} == MEDIANS


def test_without_a_judge_nothing_is_chosen(whole, tmp_path):
  result = _run(tmp_path)
  assert result.best is None and not (tmp_path / 'best.json').exists()
  assert _steps(tmp_path) == [8]
  assert float(result.state.params['w']) == float(whole[0].state.params['w'])


@pytest.mark.parametrize('last', [1, 2, 3, 4, 5, 6, 7])
def test_after_a_stop_the_same_is_found(whole, tmp_path, last):
  with pytest.raises(preemption.Preempted):
    _run(tmp_path, _selection(), should_stop=lambda step: step == last)
  asked = []
  result = _run(tmp_path, _selection(asked=asked))
  # The step that was stopped at was saved at once, and is measured now.
  assert asked == [step for step in MEDIANS if step >= last]
  assert result.best == whole[0].best
  assert best.read(tmp_path) == whole[0].best
  assert _scores(tmp_path) == _scores(whole[1])
  assert _steps(tmp_path) == [4, 8]


@pytest.mark.parametrize('step', [3, 4, 6, 8])
@pytest.mark.parametrize('when', ['before', 'in', 'after'])
def test_after_a_kill_the_same_is_found(
  whole, tmp_path, monkeypatch, step, when
):
  """Killed before a save, between its manifest and best.json, and after."""
  real = checkpoint.Checkpointer.save

  def save(self, number, *arguments):
    if number == step and when == 'before':
      raise _Killed
    if number == step and when == 'in':
      monkeypatch.setattr(self, '_note_best', lambda: None)
    real(self, number, *arguments)
    if number == step:
      self.wait()
      raise _Killed

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, 'save', save)
    with pytest.raises(_Killed):
      _run(tmp_path, _selection())
  asked = []
  result = _run(tmp_path, _selection(asked=asked))
  if when != 'before':
    assert asked == [number for number in MEDIANS if number > step]
  assert result.best == whole[0].best == best.read(tmp_path)
  assert _scores(tmp_path) == _scores(whole[1])
  assert _steps(tmp_path) == [4, 8]


def test_the_best_stays_while_a_better_one_is_being_saved(
  tmp_path, monkeypatch
):
  """Whatever is killed, best.json names a checkpoint that is whole."""
  real, seen = checkpoint.Checkpointer._complete, []

  def complete(self, step):
    record = best.read(tmp_path)
    seen.append((step, record and record['step']))
    assert record is None or record['step'] in _saved(tmp_path)
    real(self, step)

  monkeypatch.setattr(checkpoint.Checkpointer, '_complete', complete)
  rising = {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0}
  _run(tmp_path, _selection(rising), checkpoint_every=1, log_every=1)
  # A step is written down when its own save is done, and not before.
  assert seen == [(step, (step - 1) // 2 * 2 or None) for step in range(1, 9)]
  assert _steps(tmp_path) == [8]


def _saved(workdir):
  return {
    int(path.parent.name)
    for path in (workdir / 'checkpoints').glob('*/manifest.json')
  }


def test_a_lost_best_is_replaced_aloud(tmp_path, capsys):
  _run(tmp_path, _selection())
  shutil.rmtree(tmp_path / 'checkpoints' / '4')
  result = _run(tmp_path, _selection())
  assert result.best['step'] == 8 == best.read(tmp_path)['step']
  assert 'step 4 has no checkpoint any more' in capsys.readouterr().err


def test_metrics_that_are_gone_do_not_lose_the_best(whole, tmp_path):
  with pytest.raises(preemption.Preempted):
    _run(tmp_path, _selection(), should_stop=lambda step: step == 5)
  (tmp_path / 'metrics.jsonl').unlink()
  assert _run(tmp_path, _selection()).best == whole[0].best


@pytest.mark.parametrize('last', [5, 6])
def test_a_run_that_goes_on_without_its_judge_keeps_the_best(tmp_path, last):
  with pytest.raises(preemption.Preempted):
    _run(tmp_path, _selection(), should_stop=lambda step: step == last)
  record = best.read(tmp_path)
  assert _run(tmp_path).best == record == best.read(tmp_path)
  assert record['step'] == 4 and _steps(tmp_path) == [4, 8]


def test_a_damaged_file_is_one_line(tmp_path):
  for text in ('{', '[]', '{"step": 1}', '{"step": "x", "median": 1}'):
    (tmp_path / 'best.json').write_text(text)
    with pytest.raises(ValueError, match=r'best\.json: is damaged; remove it'):
      best.read(tmp_path)
  assert best.read(tmp_path / 'nowhere') is None


def test_a_nan_stops_the_run_before_it_is_scored(tmp_path, monkeypatch):
  loader = test_loop._Loader(bad=4)
  monkeypatch.setattr(test_loop, '_Loader', lambda: loader)
  asked = []
  with pytest.raises(loop.NonFiniteLossError):
    _run(tmp_path, _selection(asked=asked))
  assert asked == [2]
