"""The margin at step 0, of the real task with its gradient returned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases, margin_noise
from dpo_jax.tasks import reference

PAIRS = 64


@pytest.fixture(scope='module')
def noise():
  """Options of a task -> its margins at step 0, [64]."""
  params, batch = cases.random_params('nano'), cases.random_batch('nano', PAIRS)

  def run(**options):
    task = cases.make_task('nano', params, **options)
    compiled = margin_noise.compile_margins(task, batch)
    grads, margins = compiled.run(task.params, batch)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads)), 'no gradient'
    assert margins.shape == (PAIRS,)
    return np.asarray(margins)

  return run


def test_separate_passes_in_bfloat16_make_margins_of_chance(noise):
  # What the default is there for; without it this file would prove nothing.
  found = noise(dtype='bfloat16', compute_errs=reference.separate)
  assert found.std() > 0.01


@pytest.mark.parametrize(
  'options',
  [
    {'remat': 'full', 'residual_dtype': 'float32'},
    {'ref_dtype': jnp.bfloat16, 'param_dtype': jnp.bfloat16},
  ],
  ids=str,
)
def test_options_in_bfloat16_make_no_margin_either(noise, options):
  assert np.abs(noise(dtype='bfloat16', **options)).max() == 0.0


def test_the_default_in_bfloat16_has_no_margin_until_the_policy_moves():
  params, batch = cases.random_params('nano'), cases.random_batch('nano', PAIRS)
  task = cases.make_task('nano', params, dtype='bfloat16')
  compiled = margin_noise.compile_margins(task, batch)
  assert np.abs(compiled.margins(task.params, batch)).max() == 0.0
  assert compiled.margins(margin_noise.moved(task.params), batch).std() > 0.1
