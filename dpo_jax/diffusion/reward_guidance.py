"""Guidance by a reward: sampling that leans towards what a network likes.

Wanted are samples of p(x_0) r(x_0)^w with r = P(benign | x_0), the generator
untouched (Yoon et al., 2023, arXiv 2307.02770). Each network call is followed
by

  g    = w grad log r          at x_t, or at x_0_hat and through the denoiser
  eps <- eps - sigma_t g       (ddpm: times sqrt(a_t), its posterior's mean then
                               moves by beta_t g)
  x_0 <- x_0 + B Adam steps that raise log r(x_0)

and what a sampler goes on with is consistent: x_t = alpha_t x_0 + sigma_t eps.
The samplers' loop itself is never differentiated.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dpo_jax import types
from dpo_jax.diffusion import plan as plan_lib
from dpo_jax.diffusion import predict

# (x [n h w c], t [n]) -> log r [n]; t is 0 where x is an x_0.
LogRewardFn = Callable[[types.Latents, types.Timesteps], Float[Array, ' n']]
# Where the reward is asked: at the noisy state, by a network that knows noise
# (time-dependent), or at what the denoiser makes of it (universal guidance,
# Bansal et al., 2023).
PLACES = ('x_t', 'x_0_hat')


@dataclasses.dataclass(frozen=True)
class Settings:
  """How much a reward may say.

  Attributes:
    scale: w; 0 is off.
    place: one of PLACES.
    backward_steps: B, Adam steps on x_0 at each step of the sampler; 0 is off.
    backward_rate: their learning rate, in units of x_0.
  """

  scale: float
  place: str = 'x_t'
  backward_steps: int = 0
  backward_rate: float = 0.01

  def __post_init__(self):
    if self.place not in PLACES:
      raise ValueError(
        f'reward guidance at {self.place!r}: must be one of {", ".join(PLACES)}'
      )
    if self.scale < 0 or self.backward_steps < 0 or self.backward_rate <= 0:
      raise ValueError(
        f'reward scale {self.scale}, backward steps {self.backward_steps}, '
        f'rate {self.backward_rate}: must be 0 or more, the rate above 0'
      )


def guide(
  denoise_fn: types.DenoiseFn,
  log_reward_fn: LogRewardFn,
  plan: plan_lib.Plan,
  settings: Settings,
) -> types.DenoiseFn:
  """The denoiser whose outputs lean towards the reward.

  It is made for the steps of `plan` and asked at no other timesteps. With
  scale 0 and no backward steps it is `denoise_fn` itself. Where alpha_t is 0
  (a flow's first step, zero terminal SNR) x_t holds no x_0 that could lean,
  and the output stays as it is.
  """
  if not settings.scale and not settings.backward_steps:
    return denoise_fn
  kind = plan.prediction_type
  begins_blind = bool(np.any(plan.rows.alpha == 0.0))

  def denoise(x_t, t):
    alpha, sigma, factor = _at(plan, t)
    if not settings.scale:
      output, shift = denoise_fn(x_t, t), 0.0
    elif settings.place == 'x_t':
      output = denoise_fn(x_t, t)
      gradient = jax.grad(lambda x: log_reward_fn(x, t).sum())(x_t)
      shift = settings.scale * factor * gradient
    else:
      zero = jnp.zeros_like(t)

      def reward(x):
        output = denoise_fn(x, t).astype(jnp.float32)
        x_0 = predict.to_x_0(output, x, alpha, sigma, prediction_type=kind)
        return log_reward_fn(x_0, zero).sum(), output

      gradient, output = jax.grad(reward, has_aux=True)(x_t)
      shift = settings.scale * factor * gradient
    output = output.astype(jnp.float32)
    at = (x_t, alpha, sigma)
    eps = predict.to_eps(output, *at, prediction_type=kind) - shift
    if settings.backward_steps:
      x_0 = predict.to_x_0(eps, *at, prediction_type='epsilon')
      x_0 = raise_reward(x_0, log_reward_fn, settings)
      eps = (x_t - alpha * x_0) / sigma
    made = predict.from_eps(eps, *at, prediction_type=kind)
    return jnp.where(alpha > 0.0, made, output) if begins_blind else made

  return denoise


def raise_reward(
  x_0: types.Latents, log_reward_fn: LogRewardFn, settings: Settings
) -> types.Latents:
  """x_0 after `backward_steps` steps of a fresh Adam that raise log r."""
  optimizer = optax.adam(settings.backward_rate)
  t = jnp.zeros(len(x_0), jnp.int32)
  slope = jax.grad(lambda x: -log_reward_fn(x, t).sum())
  state = optimizer.init(x_0)
  # A few: unrolled they are faster than a loop on every backend.
  for _ in range(settings.backward_steps):
    updates, state = optimizer.update(slope(x_0), state)
    x_0 = optax.apply_updates(x_0, updates)
  return x_0


def _at(
  plan: plan_lib.Plan, t: types.Timesteps
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """alpha_t, sigma_t and what the gradient is times in eps, [n 1 1 1]."""
  rows = plan.rows
  factor = np.float64(rows.sigma)
  if plan.draws_posterior:
    factor = factor * rows.alpha / plan_lib.alpha_after(rows)
  row = jnp.argmin(jnp.abs(t[:, None] - jnp.asarray(rows.t)), axis=1)
  return tuple(
    jnp.asarray(table, jnp.float32)[row][:, None, None, None]
    for table in (rows.alpha, rows.sigma, factor)
  )
