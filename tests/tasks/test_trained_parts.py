"""Training a part of the UNet: some of its leaves, or adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import cases
from dpo_jax import trees
from dpo_jax.models import lora
from dpo_jax.tasks import parts, reference
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib

BETA, PAIRS = 100.0, 4
CROSS = 'attn2/to_[kv]'
SETTINGS = lora.Settings(targets=lora.DEFAULT_TARGETS, rank=2, alpha=3.0)


@pytest.fixture(scope='module')
def params():
  return cases.random_params('nano')


def _moved(tree, size=0.02, seed=3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: leaf + size * rng.standard_normal(leaf.shape, np.float32), tree
  )


def _task(params, **options):
  return cases.make_task('nano', params, beta=BETA, **options)


def _run(task, policy):
  """(mean loss, gradient, metrics) on one batch."""

  def mean_loss(policy):
    loss, metrics = task.loss(
      policy, task.frozen, cases.random_batch('nano', PAIRS), jax.random.key(0)
    )
    return jnp.mean(loss), metrics

  (loss, metrics), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(
    policy
  )
  return loss, jax.device_get(grads), metrics


def _step(task, optimizer):
  state = state_lib.init_state(task.params, optimizer, use_ema=False)
  step = jax.jit(step_lib.make_step(task.loss, optimizer))
  batch = cases.random_batch('nano', PAIRS)
  return step(state, task.frozen, batch, jax.random.key(0))


def _paths():
  return [
    {'compute_errs': reference.separate},
    {'compute_errs': reference.loop},
    {'compute_errs': reference.loop, 'remat': 'full', 'stack_layers': True},
  ]


@pytest.mark.parametrize('options', _paths(), ids=['separate', 'loop', 'stack'])
def test_the_gradient_of_a_part_is_the_whole_ones(params, options):
  whole = _task(params, **options)
  part = _task(params, trainable=CROSS, **options)
  names = trees.leaf_names(part.params)
  assert names and all('attn2/to_' in name for name in names)
  moved = _moved(trees.split(params, CROSS)[0])
  policy = trees.join(moved, trees.split(params, CROSS)[1])
  loss, grads, _ = _run(part, {'unet': moved})
  whole_loss, whole_grads, _ = _run(whole, {'unet': policy})
  # Both round alike but for what the compiler fuses.
  np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
  wanted, _ = trees.split(whole_grads['unet'], CROSS)
  # By leaf, not by number: small ones are sums that cancel, and how far these
  # round apart hangs on the processor.
  off = jax.tree.map(
    lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b),
    grads['unet'],
    wanted,
  )
  assert max(jax.tree.leaves(off)) < 3e-5


def test_policy_and_reference_share_what_is_not_trained(params):
  task = _task(params, trainable=CROSS)
  shared = {id(leaf) for leaf in jax.tree.leaves(params)}
  assert all(id(leaf) in shared for leaf in jax.tree.leaves(task.frozen))
  assert trees.count(task.frozen['ref']) == trees.count(task.params)
  total = trees.count(task.frozen['fixed']) + trees.count(task.params)
  assert total == trees.count(params)


def test_a_step_moves_the_named_leaves_alone(params):
  task = _task(params, trainable=CROSS)
  state, _ = _step(task, optax.adamw(1e-2))
  whole = task.complete(state.params, {'unet': params})['unet']
  for (path, before), after in zip(
    jax.tree_util.tree_leaves_with_path(params),
    jax.tree.leaves(whole),
    strict=True,
  ):
    named = 'attn2/to_k' in trees.leaf_name(path) or 'attn2/to_v' in (
      trees.leaf_name(path)
    )
    assert np.array_equal(before, after) != named, trees.leaf_name(path)


@pytest.mark.parametrize('dora', [False, True], ids=['lora', 'dora'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('path', [reference.separate, reference.loop])
def test_adapters_start_at_the_reference_to_the_bit(params, dora, dtype, path):
  settings = lora.Settings(SETTINGS.targets, rank=2, alpha=3.0, dora=dora)
  task = _task(params, adapters=settings, dtype=dtype, compute_errs=path)
  loss, grads, metrics = _run(task, task.params)
  if (path, dtype) != (reference.separate, 'bfloat16'):
    # XLA rounds separate passes in bfloat16 apart.
    assert not np.any(metrics['reward/margin'])
    assert float(loss) == pytest.approx(np.log(2), abs=1e-7)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    name = trees.leaf_name(path)
    assert np.any(leaf) == ('lora_down' not in name), name


def test_no_second_network_is_kept_for_adapters(params):
  task = _task(params, adapters=SETTINGS)
  shared = {id(leaf) for leaf in jax.tree.leaves(params)}
  own = [
    leaf for leaf in jax.tree.leaves(task.frozen) if id(leaf) not in shared
  ]
  assert sum(leaf.size for leaf in own) < 2 * trees.count(task.params)
  assert trees.count(task.params) < 0.2 * trees.count(params)


@pytest.mark.parametrize('options', _paths(), ids=['separate', 'loop', 'stack'])
def test_adapters_compute_what_their_merged_network_does(params, options):
  task = _task(params, adapters=SETTINGS, **options)
  adapters = {'unet': _moved(task.params['unet'], 0.05)}
  _, grads, metrics = _run(task, adapters)
  merged = task.complete(adapters, {'unet': params})
  _, _, wanted = _run(_task(params, **options), merged)
  assert np.std(wanted['reward/margin']) > 1e-3
  np.testing.assert_allclose(
    metrics['reward/margin'], wanted['reward/margin'], rtol=1e-3, atol=2e-4
  )
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_dropout_is_of_training_alone_and_another_for_every_batch(params):
  settings = lora.Settings(SETTINGS.targets, rank=2, alpha=3.0, dropout=0.5)
  task = _task(params, adapters=settings)
  adapters = {'unet': _moved(task.params['unet'], 0.05)}
  batch = cases.random_batch('nano', PAIRS)

  def margins(fn, epoch=0):
    given = {**batch, 'epoch': np.full(PAIRS, epoch, np.uint32)}
    _, metrics = jax.jit(fn)(adapters, task.frozen, given, jax.random.key(0))
    return np.asarray(metrics['reward/margin'])

  plain = _task(params, adapters=SETTINGS)
  # The evaluator drops no caption, and here nor does the loss.
  np.testing.assert_allclose(
    margins(task.evaluators['pairs']), margins(plain.loss), atol=1e-5
  )
  dropped = margins(task.loss)
  assert np.max(np.abs(dropped - margins(plain.loss))) > 1e-3
  np.testing.assert_array_equal(dropped, margins(task.loss))
  assert np.max(np.abs(dropped - margins(task.loss, 1))) > 1e-3


def test_layers_trained_unlike_are_not_stacked(params):
  first = parts.matching(params, 'transformer_blocks_0/')
  every = parts.matching(params, 'attn1')
  deep = any(
    'transformer_blocks_1/' in name for name in trees.leaf_names(params)
  )
  assert parts.can_stack(every)
  assert parts.can_stack(first) != deep


def test_a_pattern_that_matches_nothing_is_told(params):
  with pytest.raises(ValueError, match=r'optim.trainable.*matches no'):
    _task(params, trainable='attentive')
