"""Time and memory of guided sampling, against plain, for each way of guiding.

  python -m benchmarks.guided_memory --time [--rounds=5] [--steps=4]
    [--drivers=python,scan]
  python -m benchmarks.guided_memory --memory --size=sd15|sdxl [--batch=1]

--time runs a small model of random weights: all ways take turns, each by both
drivers (a scan over the steps, and one jitted round of a step called from
Python). Shown are medians of a step, over the plain sampler's under the same
driver, and the scan's over Python's. --drivers picks one, as a scan is slow to
compile.

--memory compiles one step for this machine and asks the compiler for its
buffers; nothing is run. Weights are bfloat16, as are the UNet's and the VAE's
computations, and a batch has both branches of guidance by text. A CPU computes
bfloat16 products in float32, for which it makes copies: the figures are those
of a CPU, and of use relative to each other. --ways picks some of them.

Ways: plain, x_t (a time-dependent reward of latents), x_0_hat (a reward of
latents, through the UNet), decoder (a reward of pixels, through UNet and
decoder), each of both also kept: without rematerialisation; recurrence (x_t,
four rounds), backward (x_t and five steps on x_0).
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases
from dpo_jax import keys as keys_lib
from dpo_jax import types
from dpo_jax.diffusion import guidance, reward_guidance, samplers
from dpo_jax.evaluate import censor as censor_lib
from dpo_jax.models import reward, vae

SCALE = 1.0
TEXT_SCALE = 7.5
LATENTS = reward.RewardConfig('clean', 4, widths=(64, 128, 256))
TIME = reward.RewardConfig('time', 4, widths=(64, 128, 256))
# Of whole pictures, eight times the side of latents: narrower.
PIXELS = reward.RewardConfig('clean', 3, widths=(16, 32, 64, 128))
WAYS = (
  'plain',
  'x_t',
  'x_0_hat',
  'x_0_hat kept',
  'decoder',
  'decoder kept',
  'recurrence',
  'backward',
)
DRIVERS = ('python', 'scan')
VAE_WIDTHS = {'sd15': (128, 256, 512, 512), 'sdxl': (128, 256, 512, 512)}
SMALL_VAE = (16, 32, 64, 64)


def make_censor(way: str) -> censor_lib.Censor | None:
  """What a way of guiding is; None is none."""
  if way == 'plain':
    return None
  config, place = TIME, 'x_t'
  if way.startswith('x_0_hat'):
    config, place = LATENTS, 'x_0_hat'
  elif way.startswith('decoder'):
    config, place = PIXELS, 'x_0_hat'
  settings = reward_guidance.Settings(
    SCALE, place=place, backward_steps=5 if way == 'backward' else 0
  )
  return censor_lib.Censor(
    config,
    decodes=config is PIXELS,
    guidance=settings,
    recurrence=4 if way == 'recurrence' else 1,
    remat='none' if way.endswith('kept') else 'full',
  )


def make_model(size: str, dtype: str):
  """The shapes of a size, with a VAE's."""
  widths = VAE_WIDTHS.get(size, SMALL_VAE)
  config = vae.VAEConfig(
    block_out_channels=widths,
    down_block_types=('DownEncoderBlock2D',) * len(widths),
    up_block_types=('UpDecoderBlock2D',) * len(widths),
    layers_per_block=2 if size in VAE_WIDTHS else 1,
    norm_num_groups=32 if size in VAE_WIDTHS else 8,
  )
  dtype = jnp.dtype(dtype)
  return dataclasses.replace(
    cases.make_model(size, dtype=dtype),
    vae=vae.AutoencoderKL(config, dtype=dtype),
  )


def shapes_of(
  size: str, model, censor: censor_lib.Censor | None, batch: int
) -> tuple[types.PyTree, types.PyTree]:
  """(parameters, conditioning of one branch), shapes in float32."""
  inputs = cases.unet_arguments(size, batch)
  key = jax.random.key(0)
  params = {
    'unet': jax.eval_shape(model.unet.init, key, **inputs)['params'],
    'vae': jax.eval_shape(
      functools.partial(model.vae.init, method='decode'), key, inputs['x_t']
    )['params'],
  }
  if censor is not None:
    side = cases.SIZES[size].side * (cases.DOWNSCALE if censor.decodes else 1)
    x = jax.ShapeDtypeStruct(
      (batch, side, side, censor.config.in_channels), jnp.float32
    )
    init = reward.Reward(censor.config).init
    made = jax.eval_shape(init, key, x, inputs['t'])['params']
    params['reward'] = [made]
  cond = {k: v for k, v in inputs.items() if k not in ('x_t', 't')}
  return params, cond


def make_denoise(model, censor, plan, params, cond, uncond):
  """A denoiser guided by text and by the reward."""
  if censor is not None:
    model = censor.prepare(model)

  def apply_fn(x, t, cond):
    return model.apply_unet(params['unet'], x, t, cond)

  denoise_fn = guidance.classifier_free(
    apply_fn, cond, uncond, guidance_scale=TEXT_SCALE
  )
  if censor is None:
    return denoise_fn
  log_reward_fn = censor.make_log_reward_fn(model, params)
  return reward_guidance.guide(denoise_fn, log_reward_fn, plan, censor.guidance)


def make_step(model, censor, plan, make=samplers.make_step):
  """(params, cond, uncond, keys, carry, ...) -> what `make`'s function gives.

  make: samplers.make_step or make_round.
  """

  def step(params, cond, uncond, keys, carry, *place):
    denoise_fn = make_denoise(model, censor, plan, params, cond, uncond)
    shape = carry.state.shape[1:]

    def renoise_fn(number):
      fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
      return keys_lib.normal(fold(keys, number), shape)

    made = make(
      plan,
      denoise_fn,
      recurrence=1 if censor is None else censor.recurrence,
      renoise_fn=renoise_fn,
    )
    return made(carry, *place)

  return step


def fill(shapes: types.PyTree, rng: np.random.Generator) -> types.PyTree:
  """Random float32 leaves of these shapes, of a layer's usual size."""

  def draw(leaf):
    wide = np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 10.0
    return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / wide)

  return jax.tree.map(draw, shapes)


def make_runs(
  size: str, way: str, steps: int, batch: int
) -> dict[str, Callable[[], types.PyTree]]:
  """{driver: () -> nothing, when it is done} of a way, compiled."""
  model, censor = make_model(size, 'float32'), make_censor(way)
  plan = samplers.make_plan(cases.SCHEDULER, steps, sampler='ddim')
  params, cond = fill(
    shapes_of(size, model, censor, batch), np.random.default_rng(0)
  )
  keys = jax.random.split(jax.random.key(0), batch)
  side = cases.SIZES[size].side
  noise = keys_lib.normal(keys, (side, side, 4))
  step, places = make_step(model, censor, plan), samplers.places(plan)
  once = jax.jit(make_step(model, censor, plan, samplers.make_round))
  repeated = samplers.repeat(
    functools.partial(once, params, cond, cond, keys),
    1 if censor is None else censor.recurrence,
  )

  @jax.jit
  def scan(params, cond, keys, carry):
    def body(carry, place):
      return step(params, cond, cond, keys, carry, place), None

    return jax.lax.scan(body, carry, places)[0]

  def from_scan():
    return scan(params, cond, keys, samplers.start(noise))

  def from_python():
    carry = samplers.start(noise)
    for i in range(plan.num_steps):
      place = jax.tree.map(lambda column, i=i: column[i], places)
      carry = repeated(carry, place)
    return carry

  return {
    'python': lambda: jax.block_until_ready(from_python()),
    'scan': lambda: jax.block_until_ready(from_scan()),
  }


def take_turns(
  runs: Mapping[Any, Callable[[], types.PyTree]], rounds: int
) -> dict[Any, list[float]]:
  """Seconds of each run in each round; all have been called before."""
  found = {key: [] for key in runs}
  for _ in range(rounds):
    for key, run in runs.items():
      started = time.perf_counter()
      run()
      found[key].append(time.perf_counter() - started)
  return found


def show_times(values) -> None:
  """Prints the table of --time."""
  runs = {}
  for way in values.ways:
    made = make_runs(values.size, way, values.steps, values.batch)
    for driver in values.drivers:
      started = time.perf_counter()
      made[driver]()
      runs[way, driver] = made[driver]
      seconds = time.perf_counter() - started
      print(f'compiled {way} ({driver}): {seconds:.0f} s', file=sys.stderr)
  found = {
    key: [seconds / values.steps for seconds in seen]
    for key, seen in take_turns(runs, values.rounds).items()
  }
  print(
    f'{values.size}, batch {values.batch}, {values.steps} steps, median of '
    f'{values.rounds} rounds (least to most), {jax.devices()[0].device_kind}'
  )
  head = ['way']
  for driver in values.drivers:
    head += [f'{driver} s a step', 'over plain']
  if len(values.drivers) > 1:
    head.append('scan over python')
  print(f'| {" | ".join(head)} |\n|' + '---|' * len(head))
  for way in values.ways:
    row, middle = [way], {}
    for driver in values.drivers:
      seen = found[way, driver]
      middle[driver] = statistics.median(seen)
      base = statistics.median(found[values.ways[0], driver])
      row.append(f'{middle[driver]:.3f} ({min(seen):.3f} to {max(seen):.3f})')
      row.append(f'{middle[driver] / base:.2f}')
    if len(middle) > 1:
      row.append(f'{middle["scan"] / middle["python"]:.2f}')
    print(f'| {" | ".join(row)} |', flush=True)


def show_memory(values) -> None:
  """Prints the table of --memory."""
  print(
    f'{values.size}, {values.batch} pictures, bfloat16, one step of ddim with '
    f'guidance by text, {jax.devices()[0].device_kind}'
  )
  print(
    '| way | weights GiB | temporary GiB | over plain GiB | compile s |\n|'
    + '---|' * 5
  )
  base = None
  for way in values.ways:
    model, censor = make_model(values.size, 'bfloat16'), make_censor(way)
    plan = samplers.make_plan(cases.SCHEDULER, 50, sampler='ddim')
    params, cond = shapes_of(values.size, model, censor, values.batch)
    half = functools.partial(
      jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    )
    params |= {'unet': half(params['unet']), 'vae': half(params['vae'])}
    side = cases.SIZES[values.size].side
    state = jax.ShapeDtypeStruct((values.batch, side, side, 4), jnp.float32)
    carry = jax.eval_shape(samplers.start, state)
    place = jax.tree.map(lambda column: column[10], samplers.places(plan))
    keys = jax.eval_shape(
      lambda: jax.random.split(jax.random.key(0), values.batch)
    )
    started = time.perf_counter()
    lowered = jax.jit(make_step(model, censor, plan)).lower(
      params, half(cond), half(cond), keys, carry, place
    )
    memory = lowered.compile().memory_analysis()
    seconds = time.perf_counter() - started
    temporary = memory.temp_size_in_bytes / 2**30
    base = temporary if base is None else base
    print(
      f'| {way} | {memory.argument_size_in_bytes / 2**30:.2f} | '
      f'{temporary:.2f} | {temporary - base:+.2f} | {seconds:.0f} |',
      flush=True,
    )


def main(argv: list[str]) -> int:
  """Prints a table; 2 for flags that say nothing."""
  parser = argparse.ArgumentParser(
    'benchmarks.guided_memory',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--time', action='store_true')
  parser.add_argument('--memory', action='store_true')
  parser.add_argument('--size', choices=cases.SIZES)
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=4)
  parser.add_argument('--ways', default=','.join(WAYS))
  parser.add_argument('--drivers', default=','.join(DRIVERS))
  values = parser.parse_args(argv)
  values.ways = values.ways.split(',')
  values.drivers = values.drivers.split(',')
  unknown = {*values.ways} - {*WAYS} | {*values.drivers} - {*DRIVERS}
  if unknown or values.time == values.memory:
    print(
      f'error: {" ".join(argv)}: give --time or --memory,'
      f' --ways among {", ".join(WAYS)}, --drivers among {", ".join(DRIVERS)}',
      file=sys.stderr,
    )
    return 2
  if values.time:
    values.size = values.size or 'small'
    show_times(values)
  else:
    values.size = values.size or 'sd15'
    show_memory(values)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
