"""The loop on a task of one number: windows, stops, and what is ahead."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import sharding
from dpo_jax import task as task_lib
from dpo_jax.train import feed as feed_lib
from dpo_jax.train import loop, preemption, profile, totals


class _Loader:
  """Batch i has 8 rows of the value i + 1; NaN where i + 1 is `bad`."""

  def __init__(self, bad=None):
    self.position, self._bad = 0, bad

  def __next__(self):
    self.position += 1
    value = np.nan if self.position == self._bad else self.position
    return {
      'x': np.full(8, value, np.float32),
      'id': np.arange(8, dtype=np.uint32) + 100 * self.position,
      'epoch': np.zeros(8, np.uint32),
    }

  def get_state(self):
    return self.position

  def set_state(self, position):
    self.position = position


def _loss(params, frozen, batch, key):
  loss = (params['w'] - batch['x']) ** 2
  rare = jnp.where(batch['x'] % 2 == 0, batch['x'], jnp.nan)
  return loss, {'x': batch['x'], 'rare': rare}


def _run(workdir, loader=None, should_stop=lambda step: False, **changes):
  numbers = {
    'seed': 0,
    'num_steps': 8,
    'batch_size': 8,
    'accumulate': 1,
    'ema_decay': 0.0,
    'log_every': 4,
    'eval_every': 0,
    'checkpoint_every': 4,
    'keep': 3,
  }
  return loop.run(
    task=task_lib.Task(
      params={'w': np.zeros((), np.float32)}, frozen={}, loss=_loss
    ),
    optimizer=optax.sgd(0.1),
    schedule=lambda step: 0.1,
    loader=loader or _Loader(),
    eval_batches=lambda: [],
    options=loop.Options(**numbers | changes),
    mesh=sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4]),
    workdir=workdir,
    should_stop=should_stop,
  )


def _lines(workdir):
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith('time/')}
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]


def _w(result):
  return float(result.state.params['w'])


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir, loader = tmp_path_factory.mktemp('whole'), _Loader()
  result = _run(workdir, loader)
  # Nothing was loaded that no step took.
  assert loader.position == 8
  return result, workdir


def test_a_line_is_the_mean_over_its_window(whole):
  result, workdir = whole
  w, losses = 0.0, []
  for step in range(1, 9):
    losses.append((w - step) ** 2)
    w -= 0.1 * 2 * (w - step)
  assert _w(result) == pytest.approx(w, rel=1e-6)
  lines = _lines(workdir)
  assert [line['step'] for line in lines] == [1, 4, 8]
  for line, (low, high) in zip(lines, ((0, 1), (1, 4), (4, 8)), strict=True):
    assert line['loss'] == pytest.approx(np.mean(losses[low:high]), rel=1e-6)
    assert line['x'] == np.mean(range(low + 1, high + 1))
  # Only even steps have it: none in the first line.
  assert 'rare' not in lines[0]
  assert [line['rare'] for line in lines[1:]] == [3.0, 7.0]
  assert result.position == 8 and result.steps == 8


def test_the_host_looks_at_results_where_it_logs_only(tmp_path, monkeypatch):
  seen = []
  real = jax.device_get
  monkeypatch.setattr(
    jax, 'device_get', lambda tree: seen.append(tree) or real(tree)
  )
  _run(tmp_path, num_steps=12, log_every=6, checkpoint_every=12)
  # Steps 1, 6 and 12.
  assert sum(isinstance(tree, totals.Totals) for tree in seen) == 3


@pytest.mark.parametrize('last', [3, 4, 6])
def test_a_stop_within_a_window_leaves_no_seam(whole, tmp_path, last):
  result, workdir = whole
  with pytest.raises(preemption.Preempted) as stop:
    _run(tmp_path, should_stop=lambda step: step == last)
  assert stop.value.step == last
  following = _run(tmp_path)
  assert following.steps == 8 - last and following.position == 8
  assert _w(following) == _w(result)
  assert _lines(tmp_path) == _lines(workdir)


def test_a_nan_is_named_with_its_examples_and_nothing_is_kept(tmp_path):
  loader = _Loader(bad=6)
  with pytest.raises(loop.NonFiniteLossError) as error:
    _run(tmp_path, loader)
  words = str(error.value)
  assert words.startswith('step 6: loss and norm/grads is not finite')
  assert 'last good checkpoint: step 4' in words
  record = json.loads((tmp_path / 'nonfinite_step_6.json').read_text())
  assert record['ids'] == [600 + i for i in range(8)]
  assert record['bad'] == ['loss', 'norm/grads']
  # The next two steps ran on good numbers, and nothing of them was kept.
  assert [line['step'] for line in _lines(tmp_path)] == [1, 4]
  kept = {path.name for path in (tmp_path / 'checkpoints').iterdir()}
  assert '8' not in kept and '4' in kept


def test_after_a_bad_step_the_totals_stand_still():
  @flax.struct.dataclass
  class Numbers:
    step: jax.Array

  def step(state, frozen, batch, key):
    return state.replace(step=state.step + 1), {
      'loss': batch,
      'norm/grads': jnp.ones(()),
    }

  adding = jax.jit(totals.add_to(step))
  state = Numbers(jnp.zeros((), jnp.int32))
  sums = totals.empty(['loss', 'norm/grads'])
  for value in (1.0, 2.0, np.inf, 5.0, np.nan):
    state, sums = adding(state, sums, None, jnp.float32(value), None)
  assert int(sums.bad_step) == 3
  assert bool(sums.bad['loss']) and not bool(sums.bad['norm/grads'])
  assert float(sums.counts['norm/grads']) == 3


def test_rows_are_kept_until_the_host_has_looked(tmp_path):
  window = loop._Window(tmp_path)
  window.rows[1] = {'id': np.zeros(1), 'epoch': np.zeros(1)}
  window.read(totals.empty([]), None)
  assert window.rows == {}


def test_totals_go_through_json_exactly():
  names = ['a', 'b']
  before = totals.empty(names).replace(
    sums={'a': np.float32(0.1), 'b': np.float32(0)},
    counts={'a': np.float32(3), 'b': np.float32(0)},
  )
  record = json.loads(json.dumps(totals.to_record(before)))
  after = totals.from_record(record, names=names)
  assert after.sums['a'] == np.float32(0.1)
  assert totals.means(after) == {'a': float(np.float32(0.1)) / 3}


def test_the_next_batch_is_on_the_devices_before_it_is_asked_for():
  mesh = sharding.make_mesh(data=4, devices=jax.devices()[:4])
  loader = _Loader()
  feed = feed_lib.Feed(loader, mesh)
  assert feed.position == loader.position == 0
  feed.load()
  feed.load()
  assert loader.position == 1 and feed.position == 0
  assert feed.peek()['x'].sharding == sharding.batch_sharding(mesh)
  rows, batch = feed.take()
  assert feed.position == 1 and set(rows) == {'id', 'epoch'}
  np.testing.assert_array_equal(batch['x'], np.ones(8))
  assert rows['id'][0] == 100
  _, batch = feed.take()
  np.testing.assert_array_equal(batch['x'], 2 * np.ones(8))


def test_a_window_of_steps_is_traced(tmp_path):
  _run(tmp_path, profile_from=3, profile_steps=2)
  traces = list((tmp_path / 'profile').rglob('*.xplane.pb'))
  assert len(traces) == 1 and traces[0].stat().st_size > 1000


def test_the_tracer_follows_its_window(monkeypatch, tmp_path):
  calls = []
  monkeypatch.setattr(
    jax.profiler, 'start_trace', lambda folder: calls.append('start')
  )
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))

  def steps(start, last, /, **window):
    calls.clear()
    with profile.Profiler(tmp_path, **window) as profiler:
      for step in range(start, last + 1):
        profiler.before(step)
        calls.append(step)
        profiler.after(step, None)
    return list(calls)

  assert steps(1, 4, first=2, count=2) == [1, 'start', 2, 3, 'stop', 4]
  # The run ends, or begins, within the window; or there is none.
  assert steps(1, 2, first=2, count=9) == [1, 'start', 2, 'stop']
  assert steps(3, 4, first=2, count=9) == [3, 4]
  assert steps(1, 2, first=0, count=5) == [1, 2]
