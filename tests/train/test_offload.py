"""The optimizer's state on the host: where it lies; no value changes."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding, trees
from dpo_jax import task as task_lib
from dpo_jax.train import changes, checkpoint, loop, offload
from dpo_jax.train import optimizer as optimizer_lib
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib

CASES = {
  'adamw': {'name': 'adamw'},
  'adamw, bfloat16 moment': {'name': 'adamw', 'mu_dtype': 'bfloat16'},
  'adafactor': {'name': 'adafactor', 'parameter_scale': True},
}
# Twelve weights of 128 x 256, and one that stays on the device.
LAYERS, WIDTH = 6, 128


def _loss(params, frozen, batch, key):
  hidden = batch['x']
  for layer in params['layers'].values():
    hidden = jnp.tanh(hidden @ layer['in']) @ layer['out'] + hidden
  return jnp.mean(jnp.square(hidden * params['scale'] - 1), -1), {}


def _params():
  rng = np.random.default_rng(0)

  def kernel(rows, columns):
    normal = rng.standard_normal((rows, columns), np.float32)
    return jnp.asarray(normal / np.sqrt(rows))

  return {
    'layers': {
      f'{i}': {
        'in': kernel(WIDTH, 2 * WIDTH),
        'out': kernel(2 * WIDTH, WIDTH),
      }
      for i in range(LAYERS)
    },
    'scale': jnp.ones((WIDTH,)),
  }


def _optimizer(*, is_offloaded, **options):
  return optimizer_lib.make_optimizer(
    schedule=lambda count: 1e-2 / (1 + count),
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=1e-2,
    clip_norm=0.1,
    offload=is_offloaded,
    **options,
  )


def _start(optimizer, mesh, *, is_offloaded):
  """(state on the mesh, its placement)."""

  def init(params):
    return state_lib.init_state(params, optimizer, use_ema=True)

  shapes = jax.eval_shape(init, _params())
  placement = sharding.state_shardings(shapes, mesh)
  if is_offloaded:
    placement = offload.place(placement, shapes)
  return jax.jit(init, out_shardings=placement)(_params()), placement


def _train(is_offloaded, options, mesh, steps=3):
  optimizer = _optimizer(is_offloaded=is_offloaded, **options)
  state, placement = _start(optimizer, mesh, is_offloaded=is_offloaded)
  step = jax.jit(
    step_lib.make_step(_loss, optimizer, ema_decay=0.9),
    donate_argnums=0,
    out_shardings=(placement, None),
  )
  rng, norms = np.random.default_rng(1), []
  for _ in range(steps):
    batch = {'x': rng.standard_normal((16, WIDTH), np.float32)}
    state, metrics = step(
      state, {}, sharding.put_batch(batch, mesh), jax.random.key(0)
    )
    norms.append(float(metrics['norm/updates']))
  assert norms[-1] > 0
  return state


def test_one_device_differs_in_the_order_of_divisions_only():
  # XLA makes mu / (c * sqrt(nu)) of (mu / c) / sqrt(nu) in one of the two
  # programs: units of 2^-24, which Adam's first steps enlarge tenfold or so.
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  plain = _train(False, CASES['adamw'], mesh)
  found = _train(True, CASES['adamw'], mesh)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5 * np.abs(b).max()
    ),
    found.params,
    plain.params,
  )


def _kinds(tree):
  return {
    trees.leaf_name(path): leaf.sharding.memory_kind
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize('case', CASES)
def test_every_bit_is_that_of_the_plain_step(case):
  mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  plain = _train(False, CASES[case], mesh)
  found = _train(True, CASES[case], mesh)
  assert jax.tree.structure(found) == jax.tree.structure(plain)
  assert trees.digest(found) == trees.digest(plain)


def test_large_arrays_of_the_optimizer_lie_on_the_host_before_and_after():
  mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
  optimizer = _optimizer(is_offloaded=True, name='adamw')
  start, _ = _start(optimizer, mesh, is_offloaded=True)
  for state in (start, _train(True, CASES['adamw'], mesh, steps=1)):
    kinds = _kinds(state)
    hosted = [name for name, kind in kinds.items() if kind == offload.HOST]
    # Two moments of every kernel; counts, the scale's, weights and EMA stay.
    assert len(hosted) == 2 * 2 * LAYERS
    assert all('opt_state' in name and 'layers' in name for name in hosted)
    kernel = state.opt_state[1][0].mu['layers']['0']['in']
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size


def test_a_checkpoint_is_of_either_kind_and_comes_back_to_the_host(tmp_path):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  state = _train(True, CASES['adamw'], mesh, steps=1)
  saver = checkpoint.Checkpointer(tmp_path, every=1, keep=2)
  saver.save(1, state, {'position': 1})
  saver.wait()
  for is_offloaded in (True, False):
    optimizer = _optimizer(is_offloaded=is_offloaded, name='adamw')
    target, _ = _start(optimizer, mesh, is_offloaded=is_offloaded)
    restored, _ = saver.restore(target)
    assert trees.digest(restored) == trees.digest(state)
    assert _kinds(restored) == _kinds(target)
  saver.close()


class _Loader:
  """Batches of random rows, each of its position."""

  def __init__(self):
    self._position = 0

  def __next__(self):
    rng = np.random.default_rng(self._position)
    self._position += 1
    return {
      'x': rng.standard_normal((16, WIDTH), np.float32),
      'id': np.arange(16, dtype=np.uint32),
      'epoch': np.zeros(16, np.uint32),
    }

  def get_state(self):
    return self._position

  def set_state(self, position):
    self._position = position


def test_a_run_goes_on_with_its_state_on_the_host(tmp_path):
  mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])

  def run(folder, num_steps, is_offloaded):
    numbers = dict.fromkeys(('log_every', 'checkpoint_every', 'keep'), 1)
    result = loop.run(
      task=task_lib.Task(params=_params(), frozen={}, loss=_loss),
      optimizer=_optimizer(is_offloaded=is_offloaded, name='adamw'),
      schedule=lambda step: 1e-2,
      loader=_Loader(),
      eval_batches=lambda: [],
      options=loop.Options(
        seed=0,
        num_steps=num_steps,
        batch_size=16,
        accumulate=1,
        ema_decay=0.0,
        eval_every=0,
        offload=is_offloaded,
        **numbers,
      ),
      mesh=mesh,
      workdir=tmp_path / folder,
    )
    return result.state

  plain = run('plain', 3, False)
  first = run('moved', 2, True)
  assert offload.HOST in _kinds(first).values()
  # The key may change when a run goes on.
  assert 'optim.offload' in changes.FREE
  found = run('moved', 3, True)
  assert trees.digest(found) == trees.digest(plain)


def test_parts_are_in_order_and_no_larger_than_the_share():
  assert offload._split([4, 1, 1, 2, 9, 1], 3) == [[0, 1, 2], [3], [4], [5]]
  assert offload._split([1, 1], 32) == [[0], [1]]
  assert offload._split([1] * 5, 1) == [[0, 1, 2, 3, 4]]


def test_devices_without_such_memory_are_named():
  device = types.SimpleNamespace(
    platform='abacus',
    addressable_memories=lambda: [types.SimpleNamespace(kind='device')],
  )
  mesh = types.SimpleNamespace(devices=np.array([[device]], object))
  with pytest.raises(ValueError, match=r'offload=True: abacus .*have device'):
    offload.check(mesh)
  offload.check(sharding.make_mesh())


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs libtpu'
)
def test_on_a_tpu_it_leaves_the_device():
  # A process of its own: libtpu allows one at a time to hold it.
  done = subprocess.run(
    [sys.executable, pathlib.Path(__file__).parent / 'offload_on_tpu.py'],
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': os.pathsep.join([*sys.path]),
      'TPU_SKIP_MDS_QUERY': '1',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  kept, moved = (
    tuple(map(int, line.split())) for line in done.stdout.splitlines()
  )
  # Each of two devices along fsdp has half of two moments in float32.
  weights = 16 * 1024 * 1024
  assert moved[1] == 2 * 4 * weights / 2 and kept[1] == 0
  assert kept[0] - moved[0] == moved[1]
  # At the peak two parts of them are back, in and out.
  assert moved[2] < kept[2] - 0.5 * moved[1]
