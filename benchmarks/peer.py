"""Our UNet beside PyTorch diffusers': forward, gradient and sampling.

  python -m benchmarks.peer [--size=reduced|sd15] [--rounds=3] [--repeats=5]
    [--threads=2] [--batch=1] [--remat=full] [--calls=forward,sample]
    [--our_python=PYTHON with another jax]

Both programs have the same random weights (written once as safetensors), the
same inputs and the same cores. They run in processes of their own, in turn,
`rounds` times each; the table gives the median over all rounds, the fastest
and slowest call, and the ratio of the medians (above 1: ours is faster), and
how far the two forward passes are apart. Compile time is not in the medians.
Gradients are of the mean squared output with respect to all parameters; with
--remat=full ours computes every block twice to need less memory (PyTorch's
attention keeps no N x N matrix; ours does on a CPU).
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
# 'sd15' is unet/config.json of Stable Diffusion 1.5; 'reduced' has its shape
# at a sixteenth of the parameters.
SIZES = {
  'reduced': {'block_out_channels': [80, 160, 320, 320], 'norm_num_groups': 16},
  'sd15': {'block_out_channels': [320, 640, 1280, 1280]},
}
COMMON = {'cross_attention_dim': 768, 'attention_head_dim': 8}
LATENTS = {'reduced': 32, 'sd15': 64}
SAMPLE_STEPS = {'reduced': 10, 'sd15': 2}
GUIDANCE_SCALE = 7.5
SCHEDULER = {
  '_class_name': 'DDIMScheduler',
  'beta_schedule': 'scaled_linear',
  'beta_start': 0.00085,
  'beta_end': 0.012,
  'clip_sample': False,
  'set_alpha_to_one': False,
  'steps_offset': 1,
}


def _inputs(size: str, batch: int):
  """x_t NHWC, t and prompt_embeds for both programs."""
  rng = np.random.default_rng(0)
  side = LATENTS[size]
  x_t = rng.standard_normal((batch, side, side, 4), np.float32)
  embeds = rng.standard_normal((batch, 77, 768), np.float32)
  return x_t, np.full(batch, 500, np.int32), embeds


def _time(call, repeats: int) -> tuple[float, list[float]]:
  """Seconds of the first call, and of the others."""
  times = []
  for _ in range(repeats + 1):
    started = time.perf_counter()
    call()
    times.append(time.perf_counter() - started)
  return times[0], times[1:]


def run_torch(folder: pathlib.Path, values: argparse.Namespace):
  """Times diffusers' UNet; yields a record a measure."""
  import diffusers
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = diffusers.UNet2DConditionModel.from_pretrained(folder).eval()
  x_t, t, embeds = _inputs(values.size, values.batch)
  x_t = torch.tensor(x_t.transpose(0, 3, 1, 2))
  t, embeds = torch.tensor(t), torch.tensor(embeds)

  def forward():
    with torch.no_grad():
      return model(x_t, t, embeds).sample

  def gradient():
    model.zero_grad()
    model(x_t, t, embeds).sample.square().mean().backward()

  scheduler = diffusers.DDIMScheduler.from_config(SCHEDULER)

  def sample():
    scheduler.set_timesteps(SAMPLE_STEPS[values.size])
    both = torch.cat([torch.zeros_like(embeds), embeds])
    state = x_t
    with torch.no_grad():
      for step in scheduler.timesteps:
        output = model(torch.cat([state, state]), step, both).sample
        uncond, cond = output.chunk(2)
        output = uncond + GUIDANCE_SCALE * (cond - uncond)
        state = scheduler.step(output, step, state).prev_sample

  np.save(folder / 'torch.npy', forward().numpy().transpose(0, 2, 3, 1))
  calls = {'forward': forward, 'gradient': gradient, 'sample': sample}
  for name, call in _chosen(values, calls):
    yield name, *_time(call, values.repeats)


def run_jax(folder: pathlib.Path, values: argparse.Namespace):
  """Times our UNet; yields a record a measure."""
  import jax
  import jax.numpy as jnp

  from dpo_jax.diffusion import guidance, samplers
  from dpo_jax.models import unet
  from dpo_jax.weights import diffusers_maps

  config, params = diffusers_maps.load_component('unet', folder)
  params = jax.device_put(params)
  model = unet.UNet2DConditionModel(config, remat=values.remat)
  x_t, t, embeds = map(jnp.asarray, _inputs(values.size, values.batch))

  def apply(params, x_t, t, embeds):
    return model.apply({'params': params}, x_t, t, embeds)

  def loss(params):
    return jnp.mean(jnp.square(apply(params, x_t, t, embeds)))

  plan = samplers.make_plan(
    SCHEDULER, SAMPLE_STEPS[values.size], sampler='ddim'
  )

  @jax.jit
  def sample(params):
    denoise_fn = guidance.classifier_free(
      lambda x, t, cond: apply(params, x, t, cond),
      embeds,
      jnp.zeros_like(embeds),
      guidance_scale=GUIDANCE_SCALE,
    )
    return samplers.sample(plan, denoise_fn, plan.from_noise(x_t))

  forward, gradient = jax.jit(apply), jax.jit(jax.grad(loss))
  output = np.asarray(forward(params, x_t, t, embeds))
  wanted = np.load(folder / 'torch.npy')
  print(f'scale {np.abs(wanted).max():.3g}', file=sys.stderr)
  apart = float(np.abs(output - wanted).max() / np.abs(wanted).max())
  yield 'apart', apart, []
  calls = {
    'forward': lambda: jax.block_until_ready(forward(params, x_t, t, embeds)),
    'gradient': lambda: jax.block_until_ready(gradient(params)),
    'sample': lambda: jax.block_until_ready(sample(params)),
  }
  for name, call in _chosen(values, calls):
    yield name, *_time(call, values.repeats)


def _chosen(values: argparse.Namespace, calls: dict) -> list:
  return [(name, calls[name]) for name in values.calls.split(',')]


def write_weights(folder: pathlib.Path, values: argparse.Namespace):
  """Writes the random UNet; yields its number of parameters."""
  import diffusers
  import torch

  torch.manual_seed(0)
  model = diffusers.UNet2DConditionModel(**COMMON, **SIZES[values.size])
  model.save_pretrained(folder, max_shard_size='100GB')
  yield 'count', sum(leaf.numel() for leaf in model.parameters()), []


CHILDREN = {'write': write_weights, 'torch': run_torch, 'jax': run_jax}


def _child(values) -> None:
  os.sched_setaffinity(
    0, set(sorted(os.sched_getaffinity(0))[: values.threads])
  )
  run = CHILDREN[values.child]
  for name, first, times in run(pathlib.Path(values.folder), values):
    print(json.dumps({'name': name, 'first': first, 'times': times}))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(json.dumps({'name': 'peak', 'first': peak, 'times': []}))


def _start(values, folder: str, child: str) -> list[dict]:
  python = values.our_python if child == 'jax' else sys.executable
  command = [python, '-m', 'benchmarks.peer', f'--child={child}']
  command += [f'--folder={folder}', f'--size={values.size}']
  command += [f'--repeats={values.repeats}', f'--threads={values.threads}']
  command += [f'--calls={values.calls}']
  command += [f'--batch={values.batch}', f'--remat={values.remat}']
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise RuntimeError(f'{child}: {done.stderr[-2000:]}')
  return [json.loads(line) for line in done.stdout.splitlines()]


def main(argv: list[str]) -> int:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--size', choices=tuple(SIZES), default='reduced')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--remat', choices=('none', 'full'), default='none')
  parser.add_argument('--calls', default='forward,gradient,sample')
  parser.add_argument('--our_python', default=sys.executable)
  parser.add_argument('--child', choices=tuple(CHILDREN))
  parser.add_argument('--folder')
  values = parser.parse_args(argv)
  if values.child:
    _child(values)
    return 0
  found: dict[tuple[str, str], dict] = {}
  with tempfile.TemporaryDirectory() as folder:
    count = _start(values, folder, 'write')[0]['first']
    for number in range(values.rounds):
      for child in ('torch', 'jax'):
        for record in _start(values, folder, child):
          place = found.setdefault(
            (record['name'], child), {'first': [], 'times': []}
          )
          place['first'].append(record['first'])
          place['times'] += record['times']
      print(f'round {number + 1} of {values.rounds}', file=sys.stderr)
  _print_table(values, found, count)
  return 0


def _print_table(values, found, count) -> None:
  side = LATENTS[values.size]
  print(
    f'UNet of {count:,} parameters, batch {values.batch}, {side}x{side} '
    f'latents, float32, {values.threads} threads, {values.rounds} rounds of '
    f'{values.repeats}; sampling: DDIM, {SAMPLE_STEPS[values.size]} steps, '
    f'guided; remat of ours: {values.remat}'
  )
  print('seconds    torch median [min, max]    ours median [min, max]   ratio')
  names = values.calls.split(',')
  for name in names:
    rows, medians = [], []
    for child in ('torch', 'jax'):
      times = found[name, child]['times']
      medians.append(statistics.median(times))
      rows.append(f'{medians[-1]:7.3f} [{min(times):.3f}, {max(times):.3f}]')
    ratio = medians[0] / medians[1]
    print(f'{name:9s} {rows[0]:>25s} {rows[1]:>25s} {ratio:7.2f}')
  compile_seconds = sum(
    statistics.median(found[name, 'jax']['first']) for name in names
  )
  peaks = [max(found['peak', child]['first']) for child in ('torch', 'jax')]
  apart = max(found['apart', 'jax']['first'])
  print(f'first calls of ours, compilation included: {compile_seconds:.0f} s')
  print(f'peak memory, GiB: torch {peaks[0]:.1f}, ours {peaks[1]:.1f}')
  print(f'largest difference of the forwards: {apart:.1e} of the output')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
