"""Preference alignment of a denoiser with a frozen reference."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from dpo_jax import quantise, trees, types
from dpo_jax import task as task_lib
from dpo_jax.models import transformer
from dpo_jax.objectives import rewards
from dpo_jax.tasks import inputs as inputs_lib
from dpo_jax.tasks import reference

STORED_DTYPES = ('float32', 'bfloat16')
EIGHT_BITS = tuple(quantise.LARGEST)
REF_DTYPES = ('auto', *STORED_DTYPES, *EIGHT_BITS)


def make_task(
  *,
  inputs: inputs_lib.Inputs,
  params: Mapping[str, types.Params],
  objective: Callable,
  reward_beta: float,
  compute_errs: reference.Path = reference.separate,
  ref_dtype: types.DTypeLike = 'auto',
  param_dtype: types.DTypeLike = jnp.float32,
  stack_layers: bool = False,
) -> task_lib.Task:
  """Trains the UNet on pairs against a frozen copy of itself.

  params: 'unet' and `inputs.networks` (the VAE and the text encoders, or none
  where training is from a cache); the UNet is the reference, and a copy of it
  (train.state.init_state makes it) starts the policy. `objective` is
  (policy [b 2], ref [b 2]) -> (loss [b], metrics). `reward_beta` scales the
  logged implicit rewards. The batch's `substituted` [b], 1 for an example that
  stands in for a damaged one, is logged.

  compute_errs: how the two errors are computed, one of reference.PATHS.
  ref_dtype and param_dtype: what the reference and the policy's own weights
  are stored in. If either is bfloat16 both start from the weights rounded to
  it: else the policy would start beside the reference. 'auto' stores the
  reference's kernels in the dtype of compute, which changes no bit, for the
  step casts both to it once, before its microbatches. The reference's
  kernels may be int8 or float8_e4m3fn, with a scale for each output channel,
  and are then cast where they are used. The policy does not start from weights
  rounded so far: its first margins are not 0.
  stack_layers: compute with models.transformer.stack_layers; not with eight
  bits.

  Wallace et al., CVPR 2024, section 4 and eq. 14.
  """
  compute_dtype = inputs.model.unet.dtype
  stored = ref_dtype if ref_dtype == 'auto' else jnp.dtype(ref_dtype).name
  in_eight_bits = stored in EIGHT_BITS
  start = params['unet']
  if 'bfloat16' in (stored, jnp.dtype(param_dtype).name):
    start = trees.cast_floats(start, jnp.bfloat16)

  def arrange(tree):
    stacks = stack_layers and not in_eight_bits
    return transformer.stack_layers(tree) if stacks else tree

  def prepare(params, frozen):
    policy = arrange(trees.cast_products(params['unet'], compute_dtype))
    if in_eight_bits:
      return {'unet': policy}, frozen
    ref = trees.cast_products(frozen['ref'], compute_dtype)
    return {'unet': policy}, {**frozen, 'ref': ref}

  def compute_loss(params, frozen, batch, key, *, prompt_dropout=None):
    made = inputs.make(frozen, batch, key, prompt_dropout=prompt_dropout)
    policy, ref = compute_errs(inputs.err, params['unet'], frozen['ref'], made)
    value, metrics = objective(policy, jax.lax.stop_gradient(ref))
    shared = rewards.metrics(policy, ref, beta=reward_beta)
    binned = rewards.by_timestep(
      {name: shared[name] for name in ('reward/accuracy', 'reward/margin')},
      made['t'],
      num_steps=inputs.model.schedule.num_steps,
    )
    if 'substituted' in batch:
      metrics = metrics | {'data/substituted': batch['substituted']}
    return value, shared | binned | metrics

  loss = task_lib.PreparedLoss(prepare, compute_loss)

  def evaluate(params, frozen, batch, key):
    return loss(params, frozen, batch, key, prompt_dropout=0.0)

  return task_lib.Task(
    params={'unet': trees.cast_floats(start, param_dtype)},
    frozen={
      'ref': arrange(_store(start, stored, compute_dtype)),
      **{name: params[name] for name in inputs.networks},
    },
    loss=loss,
    evaluators={'pairs': evaluate},
  )


def _store(tree, stored, compute_dtype):
  """The reference's weights as make_task's `ref_dtype` says."""
  if stored in EIGHT_BITS:
    return quantise.quantise_kernels(tree, stored)
  if stored == 'auto':
    return trees.cast_products(tree, compute_dtype)
  return trees.cast_floats(tree, jnp.dtype(stored))
