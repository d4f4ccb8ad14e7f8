"""What a built run holds on the devices."""

import jax
import numpy as np
import pytest

from dpo_jax import build, flags


@pytest.fixture
def make_job(arguments):
  def make(**changes):
    config, _ = flags.parse(arguments(**changes))
    return build.build(config)

  return make


def _kernels(job):
  task = job.loop_arguments['task']
  return [
    tree['conv_in']['kernel']
    for tree in (
      job.opened.params['unet'],
      task.params['unet'],
      task.frozen['ref'],
    )
  ]


def test_in_float32_one_tree_is_start_and_reference(make_job):
  start, policy, ref = _kernels(make_job())
  assert start is policy is ref and isinstance(ref, jax.Array)


@pytest.mark.parametrize('changes', [{}, {'model__param_dtype': 'bfloat16'}])
def test_beside_a_smaller_reference_the_start_is_on_the_host(make_job, changes):
  job = make_job(model__dtype='bfloat16', **changes)
  start, policy, ref = _kernels(job)
  assert isinstance(start, np.ndarray) and isinstance(policy, np.ndarray)
  assert start.dtype == np.float32 and ref.dtype == jax.numpy.bfloat16
  assert str(policy.dtype) == changes.get('model__param_dtype', 'float32')
  assert isinstance(ref, jax.Array)
  np.testing.assert_array_equal(start.astype(ref.dtype), ref)
  # Only the UNet: the other networks are read in every step.
  assert isinstance(jax.tree.leaves(job.opened.params['vae'])[0], jax.Array)


def test_deep_transformers_are_stacked_where_asked(make_job, tiny_xl_folder):
  def reference(**changes):
    job = make_job(
      model__folder=tiny_xl_folder, model__dtype='bfloat16', **changes
    )
    return job.loop_arguments['task'].frozen['ref']['mid_block']

  stacked = reference(model__stack_layers='always')['attentions_0']
  plain = reference()['attentions_0']
  assert 'transformer_blocks_1' in plain and 'transformer_blocks' in stacked
