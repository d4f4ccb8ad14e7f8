"""Objectives in the task: what they need is measured, and nothing more."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import cases
from dpo_jax import trees
from dpo_jax.objectives import duo, kto, mapo, registry, sft, soft, wrappers
from dpo_jax.planning import flops
from dpo_jax.tasks import likes, moving_ref, pair_loss
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib

BETA, PAIRS = 100.0, 4
KTO = {'beta': BETA, 'weight_liked': 1.0, 'weight_disliked': 1.0}


@pytest.fixture(scope='module')
def params():
  return cases.random_params('nano')


@pytest.fixture(scope='module')
def moved(params):
  rng = np.random.default_rng(7)
  return {
    'unet': jax.tree.map(
      lambda leaf: leaf * (1 + 0.02 * rng.standard_normal(leaf.shape, 'f4')),
      params,
    )
  }


def _loss(name='dpo', **options):
  numbers = options.pop('numbers', {'beta': BETA})
  return pair_loss.PairLoss(
    objective=registry.OBJECTIVES[name],
    numbers=numbers,
    reward_beta=BETA,
    **options,
  )


def _task(params, loss=None, **options):
  return cases.make_task('nano', params, loss=loss or _loss(), **options)


def _batch(**more):
  return cases.random_batch('nano', PAIRS) | more


def _run(fn, policy, frozen, batch):
  loss, metrics = jax.jit(fn)(policy, frozen, batch, jax.random.key(0))
  return np.asarray(loss), jax.device_get(metrics)


def test_without_a_reference_there_is_none_in_memory_nor_in_compute(
  params, moved
):
  plain = _task(params)
  numbers = {'scale': 0.5, 'weight': 0.1, 'timesteps': 1000.0}
  for task in (
    _task(params, _loss('sft', numbers={})),
    _task(params, _loss('mapo', numbers=numbers)),
  ):
    assert not task.frozen

    def count(task):
      def total(policy):
        return jnp.mean(
          task.loss(policy, task.frozen, _batch(), jax.random.key(0))[0]
        )

      return flops.count(jax.grad(total), moved)

    # Six of eight passes are the policy's.
    assert count(task) / count(plain) == pytest.approx(0.75, abs=0.01)
  loss, metrics = _run(task.loss, moved, task.frozen, _batch())
  err = np.stack([metrics['err/policy_win'], metrics['err/policy_lose']], 1)
  wanted, _ = mapo.mapo(jnp.asarray(err), **numbers)
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  assert 'reward/margin' not in metrics
  # Against the start all the same, once it is given.
  frozen = {**task.frozen, **task.baseline({'unet': params})}
  _, found = _run(task.evaluators['pairs'], moved, frozen, _batch())
  _, wanted = _run(plain.evaluators['pairs'], moved, plain.frozen, _batch())
  np.testing.assert_allclose(
    found['reward/margin'], wanted['reward/margin'], rtol=1e-4, atol=1e-5
  )


def test_likes_of_pairs_are_both_pictures_or_one_of_them():
  ids = np.arange(2000, dtype=np.uint32)
  batch = {
    'images': np.stack([ids, ids + 10_000], axis=1)[..., None],
    'id': ids,
    'epoch': np.zeros(2000, np.uint32),
  }
  both = likes.of_pairs(batch)
  np.testing.assert_array_equal(both['liked'][:3], [[1, 0]] * 3)
  one = likes.one_of_pairs(batch, jax.random.key(0), share=0.8)
  assert one['images'].shape == (2000, 1, 1) and one['liked'].shape == (2000, 1)
  liked = np.asarray(one['liked'][:, 0], bool)
  assert np.mean(liked) == pytest.approx(0.8, abs=0.03)
  chosen = np.asarray(one['images'][:, 0, 0])
  np.testing.assert_array_equal(chosen, np.where(liked, ids, ids + 10_000))
  later = likes.one_of_pairs(
    {**batch, 'epoch': np.ones(2000, np.uint32)}, jax.random.key(0), share=0.8
  )
  assert 0.2 < np.mean(later['liked'] != one['liked']) < 0.45
  turned = {name: value[::-1] for name, value in batch.items()}
  again = likes.one_of_pairs(turned, jax.random.key(0), share=0.8)
  np.testing.assert_array_equal(again['liked'][::-1], one['liked'])


@pytest.mark.parametrize('share', [0.0, 0.8])
def test_kto_on_pairs_takes_its_pictures_and_is_evaluated_on_both(
  params, moved, share
):
  task = _task(params, _loss('kto', numbers=KTO), liked_share=share)
  plain = _task(params)
  loss, metrics = _run(task.loss, moved, task.frozen, _batch())
  _, pair = _run(plain.loss, moved, plain.frozen, _batch())
  err = {
    name: np.stack([pair[f'err/{name}_win'], pair[f'err/{name}_lose']], 1)
    for name in ('policy', 'ref')
  }
  liked = np.array([[1.0, 0.0]] * PAIRS)
  if share:
    liked_row = ~np.isnan(metrics['reward/liked'])
    np.testing.assert_array_equal(
      np.isnan(metrics['reward/disliked']), liked_row
    )
    side = np.where(liked_row, 0, 1)[:, None]
    err = {name: np.take_along_axis(e, side, 1) for name, e in err.items()}
    liked = np.take_along_axis(liked, side, 1)
  wanted, _ = kto.kto(err['policy'], err['ref'], jnp.asarray(liked), **KTO)
  np.testing.assert_allclose(loss, wanted, rtol=1e-3, atol=1e-4)
  _, found = _run(task.evaluators['pairs'], moved, task.frozen, _batch())
  assert found['reward/margin'].shape == (PAIRS,)


def test_kto_takes_single_pictures_too(params, moved):
  batch = {
    name: value[:, :1] if name in ('moments', 'sizes') else value
    for name, value in _batch().items()
  }
  batch['liked'] = np.array([1, 0, 0, 1], np.float32)
  task = _task(params, _loss('kto', numbers=KTO))
  for fn in (task.loss, task.evaluators['pairs']):
    _, metrics = _run(fn, moved, task.frozen, batch)
    np.testing.assert_array_equal(
      np.isnan(metrics['err/policy_liked']), batch['liked'] == 0
    )


def test_duo_measures_how_far_the_last_timestep_drifts(params, moved):
  numbers = {'beta': BETA, 'weight': 3.0}
  task = _task(params, _loss('duo', numbers=numbers))
  _, metrics = _run(task.loss, {'unet': params}, task.frozen, _batch())
  np.testing.assert_allclose(metrics['err/drift'], 0, atol=1e-9)
  loss, metrics = _run(task.loss, moved, task.frozen, _batch())
  assert np.all(metrics['err/drift'] > 0)
  plain_loss, plain = _run(_task(params).loss, moved, task.frozen, _batch())
  for name in ('err/policy_win', 'err/ref_lose'):
    np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-4)
  wanted, _ = duo.duo(
    jnp.stack([plain['err/policy_win'], plain['err/policy_lose']], 1),
    jnp.stack([plain['err/ref_win'], plain['err/ref_lose']], 1),
    jnp.asarray(metrics['err/drift']),
    **numbers,
  )
  np.testing.assert_allclose(loss, wanted, rtol=1e-3)
  assert np.all(loss > plain_loss)


def test_the_drift_is_a_mean_of_squares():
  rng = np.random.default_rng(0)
  ours, theirs = rng.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
  err = np.full((3, 2), 0.1, np.float32)
  loss = _loss('duo', numbers={'beta': BETA, 'weight': 3.0})
  _, metrics = loss(
    {'err': jnp.asarray(err), 'last': jnp.asarray(ours)},
    {'err': jnp.asarray(err), 'last': jnp.asarray(theirs)},
    {},
  )
  wanted = [np.mean((a - b) ** 2) for a, b in zip(ours, theirs, strict=True)]
  np.testing.assert_allclose(metrics['err/drift'], wanted, rtol=1e-5)


def test_the_safeguard_changes_gradients_and_no_value(params, moved):
  def gradient(loss):
    task = _task(params, loss)

    def total(policy):
      value, metrics = task.loss(
        policy, task.frozen, _batch(), jax.random.key(0)
      )
      return jnp.sum(value), (value, metrics)

    return jax.jit(jax.grad(total, has_aux=True))(moved)

  plain, (plain_loss, _) = gradient(_loss())
  safe, (loss, metrics) = gradient(_loss(safeguard=0.9))
  np.testing.assert_allclose(loss, plain_loss, rtol=1e-4)
  scale = metrics['safeguard/scale']
  assert np.all((0 < scale) & (scale <= 1)) and np.any(scale < 0.9)
  apart = trees.global_norm(jax.tree.map(jnp.subtract, plain, safe))
  assert apart > 0.05 * trees.global_norm(plain)


def test_errors_are_weighted_by_timestep(params, moved):
  table = np.linspace(0.5, 1.5, 1000, dtype=np.float32)
  batch = _batch()
  task = _task(params, timestep_weights=table)
  _, weighted = _run(task.loss, moved, task.frozen, batch)
  _, plain = _run(_task(params).loss, moved, task.frozen, batch)
  factor = weighted['err/policy_win'] / plain['err/policy_win']
  assert len(set(factor.round(4))) == PAIRS
  assert np.all((0.5 <= factor) & (factor <= 1.5))
  for name in ('err/policy_lose', 'err/ref_win', 'err/ref_lose'):
    np.testing.assert_allclose(weighted[name], factor * plain[name], rtol=1e-4)


def test_soft_labels_come_from_the_label_or_a_score(params, moved):
  batch = _batch(
    label_confidence=np.array([0.5, 0.7, 0.9, 1.0], np.float32),
    score_pick=np.array([[1, 0], [0, 0], [0, 1], [2, 0]], np.float32),
  )
  errs = None
  for options, wanted in (
    ({}, batch['label_confidence']),
    (
      {'scores': 'score_pick', 'score_scale': 2.0},
      1 / (1 + np.exp(-2.0 * np.array([1, 0, -1, 2]))),
    ),
  ):
    task = _task(params, _loss('soft', **options))
    loss, metrics = _run(task.loss, moved, task.frozen, batch)
    errs = [
      jnp.stack([metrics[f'err/{n}_win'], metrics[f'err/{n}_lose']], 1)
      for n in ('policy', 'ref')
    ]
    expected, _ = soft.soft(*errs, jnp.asarray(wanted, 'f4'), beta=BETA)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
  with pytest.raises(ValueError, match='label_confidence'):
    _run(_task(params, _loss('soft')).loss, moved, task.frozen, _batch())


def test_an_sft_mix_adds_the_winners_error(params, moved):
  mixed = pair_loss.PairLoss(
    objective=wrappers.with_sft(registry.OBJECTIVES['dpo'], weight=2.0),
    numbers={'beta': BETA},
    reward_beta=BETA,
  )
  task = _task(params, mixed)
  loss, metrics = _run(task.loss, moved, task.frozen, _batch())
  plain, _ = _run(_task(params).loss, moved, task.frozen, _batch())
  wanted, _ = sft.sft(
    jnp.stack([metrics['err/policy_win'], metrics['err/policy_lose']], 1)
  )
  np.testing.assert_allclose(loss - plain, 2.0 * wanted, rtol=1e-3)


def _steps(task, count, rate=1e-3):
  optimizer = optax.sgd(rate)
  state = state_lib.init_state(
    task.params, optimizer, use_ema=False, moving=task.moving
  )
  step = jax.jit(step_lib.make_step(task.loss, optimizer, moving=task.moving))
  states, metrics = [state], []
  for _ in range(count):
    state, found = step(state, task.frozen, _batch(), jax.random.key(0))
    states.append(state)
    metrics.append(jax.device_get(found))
  return states, metrics


def test_a_reference_follows_the_policy_as_a_running_mean(params):
  task = _task(params, move_ref=moving_ref.ema(0.75))
  assert 'ref' not in task.frozen
  states, metrics = _steps(task, 2)
  wanted = states[0].params['unet']
  for state in states[1:]:
    wanted = jax.tree.map(
      lambda ref, new: 0.75 * ref + 0.25 * new, wanted, state.params['unet']
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
      state.moving['ref'],
      wanted,
    )
  assert metrics[0]['err/delta_win'] == 0 != metrics[1]['err/delta_win']


def test_a_reference_becomes_the_policy_every_so_often(params):
  states, metrics = _steps(_task(params, move_ref=moving_ref.sync(2)), 3)
  policy = [state.params['unet'] for state in states]
  for state, expected in zip(
    states, (policy[0], policy[0], policy[2], policy[2]), strict=True
  ):
    jax.tree.map(np.testing.assert_array_equal, state.moving['ref'], expected)
  margins = [abs(float(found['reward/margin'])) for found in metrics]
  assert margins[1] > 1e-3 > margins[2] == pytest.approx(0, abs=1e-4)


def test_beta_follows_the_batch(params):
  task = _task(params, _loss(auto_beta=0.6), margin_decay=0.5)
  states, metrics = _steps(task, 3, rate=3e-2)
  mean = 0.0
  for state, found in zip(states[1:], metrics, strict=True):
    margin = float(found['reward/margin'])
    factor = np.clip(1 + 0.6 * (margin - mean), 0.5, 2)
    assert float(found['objective/beta']) == pytest.approx(
      BETA * factor, rel=1e-4
    )
    mean = 0.5 * mean + 0.5 * margin
    assert float(state.moving['margin_mean']) == pytest.approx(mean, rel=1e-4)
  assert abs(mean) > 0.05


def test_errors_computed_before_take_the_references_place(params, moved):
  plain = _task(params)
  loss, metrics = _run(plain.loss, moved, plain.frozen, _batch())
  given = np.stack([metrics['err/ref_win'], metrics['err/ref_lose']], 1)
  task = _task(params, precomputed=True)
  assert not task.frozen
  found, _ = _run(task.loss, moved, task.frozen, _batch(ref_err=given))
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  with pytest.raises(ValueError, match='batch without ref_err'):
    _run(task.loss, moved, task.frozen, _batch())
