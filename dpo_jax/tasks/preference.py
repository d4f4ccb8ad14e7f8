"""Preference alignment of a denoiser with a frozen reference."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dpo_jax import keys as keys_lib
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax import task as task_lib
from dpo_jax import types
from dpo_jax.diffusion import predict
from dpo_jax.objectives import errors, rewards

DRAWS = ('eps', 't', 'posterior', 'dropout')


def pair_inputs(
  frozen: types.PyTree,
  batch: dict[str, jax.Array],
  key: types.Key,
  *,
  model: sd_lib.StableDiffusion,
  empty_ids: Int[Array, ' s'],
  prompt_dropout: float,
  latent_shape: tuple[int, int, int],
) -> dict[str, jax.Array]:
  """Noised pairs: x_t, target [b 2 h w c], t [b], prompt_embeds [b s d].

  Noise, timestep and caption dropout are drawn once a pair and broadcast;
  the VAE's posterior is sampled for each image.
  """
  draws = {
    name: keys_lib.per_example(named, batch['id'], batch['epoch'])
    for name, named in keys_lib.by_name(key, DRAWS).items()
  }
  images = sd_lib.to_float(batch['images'])
  flat = images.reshape((-1, *images.shape[2:]))
  noise = keys_lib.normal(draws['posterior'], (2, *latent_shape))
  x_0 = model.encode_images(
    frozen['vae'], flat, noise.reshape((-1, *latent_shape))
  ).reshape(noise.shape)
  eps = keys_lib.normal(draws['eps'], latent_shape)[:, None]
  t = keys_lib.randint(draws['t'], 0, model.schedule.num_steps)
  alpha_t, sigma_t = (
    value[:, None, None, None, None] for value in model.schedule.alpha_sigma(t)
  )
  target = predict.training_target(
    x_0,
    eps,
    alpha_t,
    sigma_t,
    prediction_type=model.schedule.prediction_type,
  )
  input_ids = sd_lib.drop_prompts(
    batch['input_ids'], empty_ids, draws['dropout'], rate=prompt_dropout
  )
  return {
    'x_t': alpha_t * x_0 + sigma_t * eps,
    'target': jnp.broadcast_to(target, x_0.shape),
    't': t,
    'prompt_embeds': model.encode_text(frozen['text_encoder'], input_ids),
  }


def pair_err(
  unet_params: types.Params,
  inputs: dict[str, jax.Array],
  *,
  model: sd_lib.StableDiffusion,
) -> jax.Array:
  """err [b 2], float32: both images of a pair in one forward.

  'b p h w c -> (b p) h w c' keeps a batch-sharded array on its device.
  """
  x_t = inputs['x_t']
  output = model.apply_unet(
    unet_params,
    x_t.reshape((-1, *x_t.shape[2:])),
    jnp.repeat(inputs['t'], 2),
    jnp.repeat(inputs['prompt_embeds'], 2, axis=0),
  )
  return errors.mean_squared(output.reshape(x_t.shape), inputs['target'])


def make_task(
  *,
  model: sd_lib.StableDiffusion,
  params: dict[str, types.Params],
  objective: Callable,
  reward_beta: float,
  empty_ids: Int[Array, ' s'],
  prompt_dropout: float,
  resolution: int,
) -> task_lib.Task:
  """Trains the UNet on pairs against a frozen copy of itself.

  params: {'unet', 'vae', 'text_encoder'}; the UNet starts the policy and, as
  a copy in buffers of its own, is the reference. `objective` is
  (policy [b 2], ref [b 2]) -> (loss [b], metrics). `reward_beta` scales the
  logged implicit rewards.

  Wallace et al., CVPR 2024, section 4 and eq. 14.
  """
  inputs_fn = functools.partial(
    pair_inputs,
    model=model,
    empty_ids=empty_ids,
    latent_shape=model.latent_shape(resolution),
  )

  def loss(params, frozen, batch, key, *, prompt_dropout):
    inputs = inputs_fn(frozen, batch, key, prompt_dropout=prompt_dropout)
    policy = pair_err(params['unet'], inputs, model=model)
    ref = pair_err(frozen['ref'], inputs, model=model)
    value, metrics = objective(policy, jax.lax.stop_gradient(ref))
    shared = rewards.metrics(policy, ref, beta=reward_beta)
    binned = rewards.by_timestep(
      {name: shared[name] for name in ('reward/accuracy', 'reward/margin')},
      inputs['t'],
      num_steps=model.schedule.num_steps,
    )
    return value, shared | binned | metrics

  return task_lib.Task(
    params={'unet': params['unet']},
    frozen={
      'ref': jax.tree.map(lambda leaf: leaf.copy(), params['unet']),
      'vae': params['vae'],
      'text_encoder': params['text_encoder'],
    },
    loss=functools.partial(loss, prompt_dropout=prompt_dropout),
    evaluators={'pairs': functools.partial(loss, prompt_dropout=0.0)},
  )
