import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import sharding, trees
from dpo_jax.train import checkpoint, metrics, progress, workdir
from dpo_jax.train import state as state_lib


def _state():
  return state_lib.init_state(
    {'w': jnp.arange(4.0)}, optax.adamw(1e-3), use_ema=True
  )


def _save(path, steps=(2, 4)):
  saver = checkpoint.Checkpointer(path, every=2, keep=2)
  state = _state()
  for step in steps:
    state = state.replace(step=jnp.int32(step))
    saver.save(step, state, {'position': 10 * step})
  saver.close()
  return state


def test_round_trip_is_bitwise_and_keeps_the_position(tmp_path):
  state = _save(tmp_path)
  saver = checkpoint.Checkpointer(tmp_path, every=2, keep=2)
  restored, record = saver.restore(_state())
  assert record == {'position': 40}
  assert trees.digest(restored) == trees.digest(state)
  assert not any(path.suffix for path in (tmp_path / 'checkpoints').iterdir())


def test_only_the_newest_are_kept(tmp_path):
  _save(tmp_path, steps=(2, 4, 6))
  found = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
  assert found == ['4', '6']


def test_temporary_folders_of_a_killed_save_are_removed(tmp_path):
  _save(tmp_path)
  torn = tmp_path / 'checkpoints' / '6.orbax-checkpoint-tmp'
  torn.mkdir()
  saver = checkpoint.Checkpointer(tmp_path, every=2, keep=2)
  assert not torn.exists() and saver.latest_step() == 4


def test_saves_fall_on_multiples_and_on_the_last_step(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path, every=5, keep=1)
  due = [s for s in range(1, 13) if saver.due(s, last=s == 12)]
  assert due == [5, 10, 12]


def test_window_averages_what_is_there():
  window = metrics.Window()
  window.add({'a': 1.0, 'b': float('nan')})
  window.add({'a': 3.0, 'b': 5.0, 'c': float('nan')})
  assert window.take() == {'a': 2.0, 'b': 5.0}
  assert window.take() == {}


def test_a_resumed_log_has_each_step_once(tmp_path):
  writer = metrics.Writer(tmp_path, step=0)
  for step in (5, 10, 15):
    writer.write(step, {'loss': float(step)})
  writer.close()
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 20, "lo')
  writer = metrics.Writer(tmp_path, step=10)
  writer.write(15, {'loss': 1.5})
  writer.close()
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line['step'] for line in lines] == [5, 10, 15]
  assert lines[-1]['loss'] == 1.5
  assert list((tmp_path / 'tensorboard').glob('events*'))


def test_progress_off_a_terminal_prints_lines_with_eta(capsys):
  with progress.Progress(0, 10) as bar:
    bar.update(5, {'loss': 0.5, 'reward/margin': 1.0})
  line = capsys.readouterr().err
  assert 'train 5/10' in line and 'ETA 0:00:00' in line
  assert 'loss 0.5' in line and 'reward/margin 1' in line


def test_workdir_refuses_another_config_by_key(tmp_path):
  first = {'seed': 0, 'optim': {'lr': 1e-3}, 'eval': {'num_steps': 5}}
  with workdir.Workdir(tmp_path, config={'seed': 7}):
    # Of a start that failed nothing is kept.
    pass
  with workdir.Workdir(tmp_path, config=first) as place:
    place.keep_config()
  with workdir.Workdir(tmp_path, config=first):
    pass
  changed = {'seed': 0, 'optim': {'lr': 2e-3}, 'eval': {'num_steps': 5}}
  # Kept, so that it is not the garbage collector that frees the lock.
  refused = workdir.Workdir(tmp_path, config=changed)
  with pytest.raises(ValueError, match=r'optim\.lr: 0\.001 -> 0\.002'):
    refused.__enter__()
  # How it is evaluated may change.
  free = {'seed': 0, 'optim': {'lr': 1e-3}, 'eval': {'num_steps': 9}}
  with workdir.Workdir(tmp_path, config=free) as place:
    place.keep_config()
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert saved['eval']['num_steps'] == 9


def test_second_run_on_a_workdir_is_refused_and_names_the_first(tmp_path):
  with (
    workdir.Workdir(tmp_path, config={}),
    pytest.raises(ValueError, match=r'pid \d+ on .* is running here'),
  ):
    workdir.Workdir(tmp_path, config={}).__enter__()
  with workdir.Workdir(tmp_path, config={}):
    pass


def test_damaged_config_json_is_one_line(tmp_path):
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='not JSON'):
    workdir.Workdir(tmp_path, config={}).__enter__()


def test_digest_sees_values_names_and_dtypes():
  tree = {'a': jnp.arange(3), 'b': jax.random.key(1)}
  same = {'a': jnp.arange(3), 'b': jax.random.key(1)}
  assert trees.digest(tree) == trees.digest(same)
  for other in (
    {'a': jnp.arange(3), 'b': jax.random.key(2)},
    {'a': jnp.arange(3.0), 'b': jax.random.key(1)},
    {'c': jnp.arange(3), 'b': jax.random.key(1)},
    {'a': jnp.arange(3).at[0].set(9), 'b': jax.random.key(1)},
  ):
    assert trees.digest(tree) != trees.digest(other)


def test_tree_sizes_and_names():
  tree = {'a': jnp.zeros((2, 3)), 'b': {'c': jnp.zeros(4, jnp.bfloat16)}}
  assert trees.count(tree) == 10 and trees.num_bytes(tree) == 32
  cast = trees.cast_floats({'x': jnp.ones(1), 'n': jnp.arange(1)}, 'bfloat16')
  assert cast['x'].dtype == jnp.bfloat16 and cast['n'].dtype == jnp.int32
  norm = trees.global_norm({'a': jnp.array([3.0]), 'b': jnp.array([[4.0]])})
  assert float(norm) == 5.0
  (path, _), *_ = jax.tree_util.tree_leaves_with_path({'b': {'c': 1}})
  assert trees.leaf_name(path) == 'b/c'


@pytest.mark.parametrize(
  ('data', 'fsdp', 'shape'),
  [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (1, -1, (1, 8)), (4, 2, (4, 2))],
)
def test_meshes_cover_all_devices(data, fsdp, shape):
  mesh = sharding.make_mesh(data=data, fsdp=fsdp)
  assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize(('data', 'fsdp'), [(3, 1), (-1, 3), (-1, -1), (0, 8)])
def test_meshes_that_do_not_fit_are_refused(data, fsdp):
  with pytest.raises(ValueError, match='8 devices'):
    sharding.make_mesh(data=data, fsdp=fsdp)


def test_batch_size_message_suggests_one():
  sharding.check_batch_size(32, 2, 8)
  with pytest.raises(ValueError, match=r'20 .* multiple of 16.* 16'):
    sharding.check_batch_size(20, 2, 8)


def test_state_is_sharded_along_a_divisible_axis():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  tree = {
    'big': np.zeros((7, 4096)),
    'odd': np.zeros((131, 137)),
    'small': np.zeros((8,)),
  }
  placed = sharding.state_shardings(tree, mesh)
  assert placed['big'].spec == jax.sharding.PartitionSpec(None, 'fsdp')
  assert (
    placed['odd'].spec == placed['small'].spec == (jax.sharding.PartitionSpec())
  )
