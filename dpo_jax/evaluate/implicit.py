"""The policy's own, implicit reward: as a score, and its accuracy on pairs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from dpo_jax import keys as keys_lib
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.diffusion import predict
from dpo_jax.evaluate import scorers, stats
from dpo_jax.objectives import errors


def make_compute(
  model: sd_lib.StableDiffusion, *, draws: int
) -> scorers.ComputeFn:
  """Scores by mean over draws of err(ref) - err(policy), without beta.

  Wallace et al. 2024, eq. 14 and section 5.4: the reward by which a trained
  policy tells winners from losers. Draw i of d takes its timestep from the
  i-th of d equal parts of the schedule; noise and timestep are shared by a
  caption's pictures and belong to its tokens, whatever else is in the batch.

  params: 'policy' and 'ref' (UNets), 'vae' and the text encoders. pixels
  [n k H W 3] in [-1, 1]; input_ids [n e s], for e text encoders.
  """
  steps = model.schedule.num_steps

  def compute(params, pixels, input_ids):
    n, k, *side = pixels.shape[:4]
    shape = model.latent_shape(tuple(side))
    x_0 = model.encode_images(
      params['vae'],
      pixels.reshape(n * k, *pixels.shape[2:]),
      jnp.zeros((n * k, *shape)),
    )
    cond = model.encode_text(params, input_ids)
    cond = jax.tree.map(lambda states: jnp.repeat(states, k, 0), cond)
    cond = model.add_micro_cond(
      cond, sizes=sd_lib.constant_sizes(n * k, tuple(side)), target=tuple(side)
    )
    keys = keys_lib.by_name(jax.random.key(0), ('eps', 't'))

    def one(i):
      named = {
        name: keys_lib.per_example(
          key, _number(input_ids), jnp.full(n, i, jnp.uint32)
        )
        for name, key in keys.items()
      }
      t = (i + keys_lib.uniform(named['t'])) * steps / draws
      t = jnp.repeat(jnp.minimum(t.astype(jnp.int32), steps - 1), k)
      eps = jnp.repeat(keys_lib.normal(named['eps'], shape), k, 0)
      alpha_t, sigma_t = (
        value[:, None, None, None] for value in model.schedule.alpha_sigma(t)
      )
      target = predict.training_target(
        x_0,
        eps,
        alpha_t,
        sigma_t,
        prediction_type=model.schedule.prediction_type,
      )
      x_t = alpha_t * x_0 + sigma_t * eps

      def err(unet):
        output = model.apply_unet(unet, x_t, model.schedule.network_t(t), cond)
        return errors.mean_squared(output, target)

      return err(params['ref']) - err(params['policy'])

    rewards = jax.lax.map(one, jnp.arange(draws, dtype=jnp.uint32))
    return jnp.mean(rewards, axis=0).reshape(n, k)

  return compute


def _number(input_ids: Int[Array, 'n e s']) -> UInt32[Array, ' n']:
  """A number of 32 bits that hangs on a caption's tokens and their order."""
  flat = input_ids.reshape(len(input_ids), -1).astype(jnp.uint32)
  # FNV-1a, a token instead of a byte at a time.
  start = jnp.full(len(flat), 2166136261, jnp.uint32)

  def step(number, token):
    return (number ^ token) * jnp.uint32(16777619), None

  return jax.lax.scan(step, start, flat.T)[0]


def accuracy(
  margins: Callable[[dict[str, np.ndarray]], np.ndarray],
  batches: Callable[..., Any],
  *,
  draws: int,
) -> dict[str, Any]:
  """Share of pairs whose mean margin over `draws` is positive, half for 0.

  Wallace et al., CVPR 2024, section 5.4, use the implicit reward of eq. 14 as
  a classifier of preferences; noise and timestep are averaged over.

  margins: batch -> margin [b]. batches: epoch -> (batch, valid rows), the
  epoch giving new draws. Returns stats.bootstrap's value, low, high and n.
  """
  totals = 0.0
  for epoch in range(draws):
    totals = totals + np.concatenate(
      [np.asarray(margins(batch))[:valid] for batch, valid in batches(epoch)]
    )
  return stats.bootstrap(0.5 * (np.sign(totals) + 1.0))
