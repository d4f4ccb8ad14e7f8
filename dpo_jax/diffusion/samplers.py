"""Samplers: pure functions over a DenoiseFn, one `lax.scan` each.

plan = make_plan(scheduler_config, 50, sampler='ddim')
x_0 = sample(plan, denoise_fn, plan.from_noise(eps))
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Int

from dpo_jax import types
from dpo_jax.diffusion import ddim, dpm_solver, euler, predict
from dpo_jax.diffusion import flow as flow_lib
from dpo_jax.diffusion import options as options_lib
from dpo_jax.diffusion import plan as plan_lib

SAMPLERS = tuple(options_lib.SAMPLER_CLASSES)
WITH_KARRAS = ('euler', 'dpmpp_2m')

# Place of the step in the whole range (int32 scalar) -> standard normal noise
# of the state's shape.
NoiseFn = Callable[[jax.Array], types.Latents]
Plan = plan_lib.Plan


def from_scheduler_class(class_name: str) -> str | None:
  """The sampler of a diffusers scheduler class, or None if there is none."""
  names = {value: key for key, value in options_lib.SAMPLER_CLASSES.items()}
  names[options_lib.FLOW_CLASS] = flow_lib.SAMPLER
  return names.get(class_name)


def make_plan(
  scheduler_config: dict[str, Any],
  num_steps: int,
  *,
  sampler: str,
  eta: float = 0.0,
  karras: bool | None = None,
  strength: float = 1.0,
  start: float = 0.0,
  end: float = 1.0,
) -> Plan:
  """The steps of a sampler, as its diffusers class takes them.

  Args:
    scheduler_config: contents of scheduler_config.json, see `options.read`.
    num_steps: of the whole range; fewer are made with the last three options.
    sampler: one of SAMPLERS.
    eta: noise of ddim, 0 (none) to 1 (as much as ddpm).
    karras: Karras sigmas on or off, for euler and dpmpp_2m; None: by the file.
    strength, start, end: the part of the range, see `plan.find_range`.

  Raises:
    ValueError: an unknown sampler, an option that is not supported or that the
      sampler does not have, steps out of range, or a range without steps.
  """
  part = {'strength': strength, 'start': start, 'end': end}
  if options_lib.is_flow(scheduler_config):
    return _make_flow_plan(
      scheduler_config,
      num_steps,
      part,
      sampler=sampler,
      extras={'eta': eta, 'karras': karras},
    )
  options = options_lib.read(scheduler_config, sampler=sampler)
  if karras is not None and sampler in WITH_KARRAS:
    options = dataclasses.replace(options, use_karras_sigmas=bool(karras))
  elif karras:
    raise ValueError(
      f'karras=True is not possible with sampler={sampler!r}; allowed: '
      + ', '.join(WITH_KARRAS)
    )
  if eta and sampler != 'ddim':
    raise ValueError(
      f'eta={eta} is not possible with sampler={sampler!r}; it belongs to ddim'
    )
  if not 0.0 <= eta <= 1.0:
    raise ValueError(f'eta={eta} is not in [0, 1]; 0 is deterministic')
  rows = _make_rows(options, num_steps, eta)
  total = options.num_train_timesteps
  first, last = plan_lib.find_range(rows.t, total, **part)
  rows = plan_lib.cut(rows, first, last)
  if options.prediction_type == 'epsilon' and rows.alpha[0] == 0.0:
    raise ValueError(
      f'sampler={sampler!r} cannot start at timestep {rows.t[0]}: with '
      'rescale_betas_zero_snr it holds no signal, and epsilon says nothing of '
      "x_0 there; use timestep_spacing='leading' or an Euler sampler"
    )
  clip_range = options.clip_sample_range if options.clip_sample else None
  return Plan(rows, options.prediction_type, clip_range)


def _make_flow_plan(
  scheduler_config: dict[str, Any],
  num_steps: int,
  part: dict[str, float],
  *,
  sampler: str,
  extras: dict[str, Any],
) -> Plan:
  for name, value in extras.items():
    if value:
      raise ValueError(
        f'{name}={value} is not possible with a rectified flow; leave it out'
      )
  schedule = flow_lib.from_config(scheduler_config, sampler=sampler)
  rows = flow_lib.euler_rows(schedule, num_steps)
  first, last = plan_lib.find_range(rows.t, schedule.num_steps, **part)
  rows = plan_lib.cut(rows, first, last)
  return Plan(rows, schedule.prediction_type, None)


def _make_rows(
  options: options_lib.Options, num_steps: int, eta: float
) -> plan_lib.Rows:
  if options.sampler == 'ddim':
    return ddim.ddim_rows(options, num_steps, eta=eta)
  make = {
    'ddpm': ddim.ddpm_rows,
    'euler': euler.euler_rows,
    'euler_ancestral': euler.ancestral_rows,
    'dpmpp_2m': dpm_solver.dpmpp_2m_rows,
  }[options.sampler]
  return make(options, num_steps)


class Carry(NamedTuple):
  """What goes from step to step."""

  state: types.Latents
  last_x_0: types.Latents


class Place(NamedTuple):
  """A step's numbers: its row, and the noise level and scale it ends at."""

  row: plan_lib.Rows
  alpha_after: jax.Array
  scale_after: jax.Array


def start(state: types.Latents) -> Carry:
  """From `plan.from_noise`, `plan.from_image` or another plan's state."""
  state = state.astype(jnp.float32)
  return Carry(state, jnp.zeros_like(state))


def places(plan: Plan) -> Place:
  """All steps' numbers, [s] arrays: for a scan, or one at a time."""
  rows = plan.rows._replace(init_scale=None)
  return Place(
    rows,
    np.float32(plan_lib.alpha_after(plan.rows)),
    np.append(plan.rows.scale[1:], np.float32(1.0)),
  )


class Round(NamedTuple):
  """A round's outcome, and what the next round of the step begins with."""

  after: Carry
  again: Carry


RoundFn = Callable[[Carry, Place, Int[ArrayLike, '']], Round]


def make_round(
  plan: Plan,
  denoise_fn: types.DenoiseFn,
  *,
  noise_fn: NoiseFn | None = None,
  recurrence: int = 1,
  renoise_fn: NoiseFn | None = None,
) -> RoundFn:
  """One round of a step, the whole of it where recurrence is 1: see make_step.

  (carry, place, j) -> Round, states [n h w c] float32, for the rounds j = 0 to
  R - 1, each from what the one before calls `again`; `repeat` calls them.

  Raises:
    ValueError: as make_step does, which is made of it.
  """
  if plan.needs_noise and noise_fn is None:
    raise ValueError('this sampler draws noise at its steps: pass noise_fn')
  if recurrence < 1:
    raise ValueError(f'recurrence={recurrence}: must be 1 (once) or more')
  if recurrence > 1 and renoise_fn is None:
    raise ValueError(f'recurrence={recurrence} draws noise: pass renoise_fn')
  if recurrence > 1 and plan.prediction_type == 'flow_prediction':
    raise ValueError(
      f'recurrence={recurrence} is not possible with a rectified flow; leave '
      'it at 1'
    )
  names = tuple(plan.rows.weights)

  def once(carry, row, number):
    eps, x_0 = _predict_both(plan, denoise_fn, row.scale * carry.state, row)
    terms = {
      'state': carry.state,
      'x_0': x_0,
      'eps': eps,
      'last_x_0': carry.last_x_0,
    }
    if plan.needs_noise:
      terms['noise'] = noise_fn(number)
    return Carry(sum(row.weights[name] * terms[name] for name in names), x_0)

  def make(carry, place, j):
    row = place.row
    if recurrence == 1:
      return Round(once(carry, row, row.index), carry)
    number = row.index * recurrence + j
    after = once(carry, row, number)
    ratio = (row.alpha / place.alpha_after) ** 2
    noised = jnp.sqrt(ratio) * place.scale_after * after.state
    noised += jnp.sqrt(1.0 - ratio) * renoise_fn(number)
    return Round(after, Carry(noised / row.scale, carry.last_x_0))

  return make


def make_step(
  plan: Plan,
  denoise_fn: types.DenoiseFn,
  *,
  noise_fn: NoiseFn | None = None,
  recurrence: int = 1,
  renoise_fn: NoiseFn | None = None,
) -> Callable[[Carry, Place], Carry]:
  """One step of a sampler; `sample` takes all of them.

  recurrence: R; a step is made R times, and but for the last its outcome is
  noised back to where it began, so that guidance can act again (Lugmayr et al.,
  2022; Bansal et al., 2023):

    x_t <- sqrt(a) x_prev + sqrt(1 - a) noise,  a = alphas_cumprod_t / _prev

  renoise_fn: that noise, for R above 1; asked for index * R + j, as noise_fn.
  The rounds are a loop of the program.

  Raises:
    ValueError: noise that is needed and not given; recurrence with a flow,
      whose noise does not add up so.
  """
  round_fn = make_round(
    plan,
    denoise_fn,
    noise_fn=noise_fn,
    recurrence=recurrence,
    renoise_fn=renoise_fn,
  )

  def step(carry, place):
    if recurrence == 1:
      return round_fn(carry, place, 0).after

    def again(made, j):
      return round_fn(made.again, place, j), None

    rounds = jnp.arange(recurrence)
    return jax.lax.scan(again, Round(carry, carry), rounds)[0].after

  return step


def repeat(
  round_fn: RoundFn, recurrence: int
) -> Callable[[Carry, Place], Carry]:
  """make_step's function, of make_round's rounds: each a call from Python.

  round_fn: a compiled one; recurrence: the R that it was made with. For where
  gradients are slow in a program's loop (XLA:CPU).
  """

  def step(carry, place):
    for j in range(recurrence):
      made = round_fn(carry, place, np.int32(j))
      carry = made.again
    return made.after

  return step


def sample(
  plan: Plan,
  denoise_fn: types.DenoiseFn,
  state: types.Latents,
  *,
  noise_fn: NoiseFn | None = None,
  recurrence: int = 1,
  renoise_fn: NoiseFn | None = None,
) -> types.Latents:
  """Takes the plan's steps from `state` [n h w c]; float32.

  The result is x_0, or for a plan with end < 1 the state that a plan with the
  same settings and start = end goes on from, unchanged.

  Args:
    denoise_fn: (x_t, t [n]) -> the network's output of the plan's
      prediction_type; t is int32, and float32 for the Euler samplers.
    state: from `plan.from_noise`, `plan.from_image` or another plan.
    noise_fn: noise of each step, for plans with `needs_noise`.
    recurrence, renoise_fn: see `make_step`.
  """
  step = make_step(
    plan,
    denoise_fn,
    noise_fn=noise_fn,
    recurrence=recurrence,
    renoise_fn=renoise_fn,
  )
  return take(step, start(state), places(plan)).state


def take(
  step: Callable[[Carry, Place], Carry], carry: Carry, places: Place
) -> Carry:
  """Takes a step at each of the places, as one loop of the program."""
  return jax.lax.scan(lambda *now: (step(*now), None), carry, places)[0]


def _predict_both(plan, denoise_fn, x_t, row):
  """eps_hat and x_0_hat in float32, x_0_hat with the plan's clipping."""
  t = jnp.full((len(x_t),), row.t)
  output = denoise_fn(x_t, t).astype(jnp.float32)
  at = (output, x_t, row.alpha, row.sigma)
  eps = predict.to_eps(*at, prediction_type=plan.prediction_type)
  x_0 = predict.to_x_0(*at, prediction_type=plan.prediction_type)
  if plan.clip_range is not None:
    x_0 = jnp.clip(x_0, -plan.clip_range, plan.clip_range)
  return eps, x_0


def ddpm_posterior(
  x_0: types.Latents,
  x_t: types.Latents,
  alphas_cumprod_t: jax.Array,
  alphas_cumprod_prev: jax.Array,
) -> tuple[types.Latents, jax.Array]:
  """Mean and variance of q(x_prev | x_t, x_0), Ho et al., 2020, eq. 6-7.

  The step from `prev` to `t` may jump over timesteps; its own noise level is
  alpha = alphas_cumprod_t / alphas_cumprod_prev. Scalars broadcast.
  """
  on_x_0, on_x_t, variance = ddim.posterior_weights(
    alphas_cumprod_t, alphas_cumprod_prev
  )
  return on_x_0 * x_0 + on_x_t * x_t, variance
