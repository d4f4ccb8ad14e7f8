"""Preference alignment of a denoiser with a frozen reference."""

from collections.abc import Callable, Mapping

import jax

from dpo_jax import task as task_lib
from dpo_jax import types
from dpo_jax.objectives import rewards
from dpo_jax.tasks import inputs as inputs_lib


def make_task(
  *,
  inputs: inputs_lib.Inputs,
  params: Mapping[str, types.Params],
  objective: Callable,
  reward_beta: float,
) -> task_lib.Task:
  """Trains the UNet on pairs against a frozen copy of itself.

  params: 'unet' and `inputs.networks` (the VAE and the text encoders, or none
  where training is from a cache); the UNet is the reference, and a copy of it
  (train.state.init_state makes it) starts the policy. `objective` is
  (policy [b 2], ref [b 2]) -> (loss [b], metrics). `reward_beta` scales the
  logged implicit rewards. The batch's `substituted` [b], 1 for an example that
  stands in for a damaged one, is logged.

  Wallace et al., CVPR 2024, section 4 and eq. 14.
  """

  def loss(params, frozen, batch, key, *, prompt_dropout=None):
    made = inputs.make(frozen, batch, key, prompt_dropout=prompt_dropout)
    policy = inputs.err(params['unet'], made)
    ref = inputs.err(frozen['ref'], made)
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

  def evaluate(params, frozen, batch, key):
    return loss(params, frozen, batch, key, prompt_dropout=0.0)

  return task_lib.Task(
    params={'unet': params['unet']},
    frozen={
      'ref': params['unet'],
      **{name: params[name] for name in inputs.networks},
    },
    loss=loss,
    evaluators={'pairs': evaluate},
  )
