"""Training from cached latents and text states: equal, lean, fresh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import prepared_pairs
import pytest

from dpo_jax import caching, loading, sharding
from dpo_jax.data import record_loader
from dpo_jax.objectives import dpo
from dpo_jax.tasks import inputs as inputs_lib
from dpo_jax.tasks import pair_loss, preference
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib

SIZE, STEPS = 16, 20
FOLDERS = ['tiny_folder', 'tiny_xl_folder']


@pytest.fixture(scope='module', params=FOLDERS)
def world(request, tmp_path_factory):
  """(opened model, source with a cache) for SD and SDXL."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  opened = loading.open_model(
    str(request.getfixturevalue(request.param)), mesh=mesh, dtype='float32'
  )
  rows = [prepared_pairs.make_pair(i) for i in range(16)]
  root = prepared_pairs.write(
    tmp_path_factory.mktemp('data') / 'pairs', rows, lengths=[7, 9]
  )
  caching.add_cache(root, model=opened, mesh=mesh, size=SIZE, batch_size=8)
  return opened, record_loader.open_source(root)


def make_inputs(opened, source, **options):
  return inputs_lib.Inputs(
    model=opened.model,
    resolution=SIZE,
    empty_ids=opened.tokenizers.encode([''])[0][0],
    empty_cond=source.captions.empty if source.captions else None,
    **options,
  )


def batches(opened, source, **options):
  return record_loader.make_record_loader(
    source,
    opened.tokenizers,
    batch_size=8,
    seed=1,
    resolution=SIZE,
    random_crop=False,
    **({'flip': True} | options),
  )


def train(opened, source, **options):
  """(task, losses of STEPS steps, the last state)."""
  beta = 2000.0
  task = preference.make_task(
    inputs=make_inputs(opened, source, **options),
    params=opened.params,
    loss=pair_loss.PairLoss(
      objective=dpo.dpo, numbers={'beta': beta}, reward_beta=beta
    ),
  )
  optimizer = optax.adamw(2e-5)
  state = state_lib.init_state(task.params, optimizer, use_ema=False)
  # Placed as a step leaves it: else the second step is compiled anew.
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  state = jax.device_put(state, sharding.replicated(mesh))
  step = jax.jit(step_lib.make_step(task.loss, optimizer))
  iterator = batches(opened, source)
  losses = []
  for _ in range(STEPS):
    state, metrics = step(state, task.frozen, next(iterator), jax.random.key(5))
    losses.append(float(metrics['loss']))
    assert float(metrics['data/substituted']) == 0
  iterator.close()
  return task, np.array(losses), state


def test_losses_are_those_of_the_pictures(world):
  opened, source = world
  options = {
    'posterior': 'mean',
    'prompt_dropout': 0.25,
    # What each of the two families does.
    'dropped_prompt': 'zeros' if opened.model.micro_cond_dim else 'empty',
    'micro_cond': 'true_size',
  }
  task, losses, _ = train(opened, source, **options)
  _, wanted, _ = train(opened, source.uncached(), **options)
  assert set(task.frozen) == {'ref'}
  # The run leaves ln 2 by far more than the difference that is allowed.
  assert np.abs(wanted - np.log(2)).max() > 0.03
  difference = (np.abs(losses - wanted) / wanted).max()
  assert difference < 1e-3, (difference, wanted)


def test_inputs_are_those_of_the_pictures(world):
  """Sampled with the same noise: latents and texts differ by rounding."""
  opened, source = world
  for flip in (False, True):
    made = []
    for one in (source, source.uncached()):
      inputs = make_inputs(
        opened, one, micro_cond='true_size', prompt_dropout=0.3
      )
      params = {name: opened.params[name] for name in inputs.networks}
      iterator = batches(opened, one, flip=flip)
      batch = next(iterator)
      iterator.close()
      made.append(jax.jit(inputs.make)(params, batch, jax.random.key(0)))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-3, atol=3e-3),
      *made,
    )
    sizes = made[0]['cond'].get('micro_cond')
    if sizes is not None:
      np.testing.assert_array_equal(sizes, made[1]['cond']['micro_cond'])


def test_the_posterior_is_sampled_afresh_each_epoch(world):
  opened, source = world
  iterator = batches(opened, source, flip=False)
  batch = next(iterator)
  iterator.close()
  later = batch | {'epoch': batch['epoch'] + 1}
  found = {}
  for posterior in inputs_lib.POSTERIORS:
    inputs = make_inputs(opened, source, posterior=posterior)
    latents = jax.jit(
      lambda batch, inputs=inputs: inputs._latents(
        {},
        batch,
        inputs_lib.keys_lib.per_example(
          jax.random.key(0), batch['id'], batch['epoch']
        ),
      )
    )
    found[posterior] = [np.asarray(latents(one)) for one in (batch, later)]
  first, second = found['mean']
  np.testing.assert_array_equal(first, second)
  mean, logvar = np.split(batch['moments'].astype(np.float32), 2, axis=-1)
  factor = opened.model.scaling_factor
  np.testing.assert_allclose(first, factor * mean, rtol=1e-6)
  noise = [
    (one / factor - mean) / np.exp(logvar / 2) for one in found['sample']
  ]
  # Standard normal, and another in the next epoch.
  for one in noise:
    assert abs(one.mean()) < 0.15 and abs(one.std() - 1) < 0.15
  correlation = np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]
  assert abs(correlation) < 0.15


def test_noise_hangs_on_both_words_of_an_id(world):
  opened, source = world
  iterator = batches(opened, source)
  batch = next(iterator)
  iterator.close()
  inputs = make_inputs(opened, source)
  make = jax.jit(lambda batch: inputs.make({}, batch, jax.random.key(0)))
  wanted = make(batch)['t']
  for word in range(2):
    ids = batch['id'].copy()
    ids[:, word] += 1
    assert (make(batch | {'id': ids})['t'] != wanted).sum() >= 6


def test_batches_of_the_other_kind_are_refused(world):
  opened, source = world
  for has, other in (
    (source, source.uncached()),
    (source.uncached(), source),
  ):
    iterator = batches(opened, other)
    batch = next(iterator)
    iterator.close()
    inputs = make_inputs(opened, has)
    with pytest.raises(ValueError, match='batch without'):
      inputs.make(opened.params, batch, jax.random.key(0))


def test_substitutes_are_in_the_metrics(world):
  opened, source = world
  task = preference.make_task(
    inputs=make_inputs(opened, source),
    params=opened.params,
    loss=pair_loss.PairLoss(
      objective=dpo.dpo, numbers={'beta': 10.0}, reward_beta=10.0
    ),
  )
  iterator = batches(opened, source)
  batch = next(iterator)
  iterator.close()
  batch['substituted'][:2] = 1
  step = step_lib.make_step(task.loss, optax.sgd(0.0))
  state = state_lib.init_state(task.params, optax.sgd(0.0), use_ema=False)
  _, metrics = jax.jit(step)(state, task.frozen, batch, jax.random.key(0))
  assert float(metrics['data/substituted']) == 0.25
  assert jnp.isfinite(metrics['loss'])
