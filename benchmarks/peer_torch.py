"""The same DPO step in PyTorch with diffusers' UNet, set up to be fast.

  python -m benchmarks.peer_torch --size=sd15 [--pairs=8] [--remat=none|full]
    [--compile=default|max-autotune-no-cudagraphs|none] [--seconds=20]
    [--dtype=bfloat16] [--json=FILE]

Policy with float32 weights under bfloat16 autocast, reference stored in
bfloat16 and run without gradient, both through torch.compile and in
channels-last; scaled-dot-product attention, which takes flash kernels on a
GPU; TF32 for what stays float32; fused AdamW and gradient clipping; winners
and losers in one batch; the loss in float32. From random latents and text
states, as benchmarks.step_time's sizes; nothing waits for the GPU inside a
step but the clock around it. --remat=full is diffusers' gradient
checkpointing.
"""

import argparse
import json
import pathlib
import resource
import statistics
import sys
import time
from typing import Any

from benchmarks import cases
from dpo_jax.planning import chips

BETA = cases.BETA
MAX_STEPS = 200
LEARNING_RATE = 1e-8


def make_unet(size: str):
  """diffusers' UNet of a size, random, with an output that is not zero."""
  import diffusers
  import torch

  torch.manual_seed(0)
  case = cases.SIZES[size]
  return diffusers.UNet2DConditionModel(sample_size=case.side, **case.unet)


def make_inputs(size: str, pairs: int, device: str) -> dict[str, Any]:
  """Latents [2b 4 h w], pairs side by side, and what the UNet takes beside."""
  import torch

  case, generator = cases.SIZES[size], torch.Generator().manual_seed(0)

  def normal(*shape):
    return torch.randn(shape, generator=generator).to(device)

  width = case.unet['cross_attention_dim']
  text = normal(pairs, case.text_length, width).repeat_interleave(2, 0)
  inputs = {
    'x_0': normal(2 * pairs, 4, case.side, case.side),
    'text': text,
    'added': None,
  }
  if case.pooled_width:
    side = float(cases.DOWNSCALE * case.side)
    sizes = torch.tensor([side, side, 0.0, 0.0, side, side], device=device)
    inputs['added'] = {
      'text_embeds': normal(pairs, case.pooled_width).repeat_interleave(2, 0),
      'time_ids': sizes.repeat(2 * pairs, 1),
    }
  return inputs


def make_step(policy, ref, optimizer, dtype: str):
  """step(inputs) -> (loss, margins), tensors; updates the policy."""
  import torch

  device = next(policy.parameters()).device
  betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2
  alphas_cumprod = torch.cumprod(1 - betas, 0)
  cast = torch.autocast(
    device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16'
  )

  def err(model, x_t, t, eps, inputs):
    with cast:
      output = model(
        x_t, t, inputs['text'], added_cond_kwargs=inputs['added']
      ).sample
    return (output.float() - eps).square().mean((1, 2, 3)).view(-1, 2)

  def step(inputs):
    x_0 = inputs['x_0']
    pairs = len(x_0) // 2
    eps = torch.randn((pairs, *x_0.shape[1:]), device=device).repeat_interleave(
      2, 0
    )
    t = torch.randint(0, 1000, (pairs,), device=device).repeat_interleave(2)
    alpha = alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * eps
    x_t = x_t.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
      ref_err = err(ref, x_t, t, eps, inputs)
    reward = 0.5 * BETA * (ref_err - err(policy, x_t, t, eps, inputs))
    margins = reward[:, 0] - reward[:, 1]
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, foreach=True)
    optimizer.step()
    return loss.detach(), margins.detach()

  return step


def prepare(values: argparse.Namespace, device: str):
  """(step, inputs), compiled lazily as torch.compile does."""
  import torch

  torch.backends.cuda.matmul.allow_tf32 = True
  torch.backends.cudnn.allow_tf32 = True
  torch.backends.cudnn.benchmark = True
  policy = make_unet(values.size).to(device)
  ref = make_unet(values.size).requires_grad_(False).eval()
  ref.load_state_dict(policy.state_dict())
  stored = torch.bfloat16 if values.dtype == 'bfloat16' else torch.float32
  ref = ref.to(device, dtype=stored)
  policy.train()
  if values.remat == 'full':
    policy.enable_gradient_checkpointing()
  policy = policy.to(memory_format=torch.channels_last)
  ref = ref.to(memory_format=torch.channels_last)
  optimizer = torch.optim.AdamW(
    policy.parameters(),
    lr=LEARNING_RATE * values.pairs,
    weight_decay=1e-2,
    fused=True,
  )
  if values.compile != 'none':
    policy.compile(mode=values.compile)
    ref.compile(mode=values.compile)
  step = make_step(policy, ref, optimizer, values.dtype)
  return step, make_inputs(values.size, values.pairs, device)


def _peak_gib(device: str) -> float:
  import torch

  if device == 'cuda':
    return torch.cuda.max_memory_allocated() / 2**30
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(values: argparse.Namespace) -> dict[str, Any]:
  """Times the step; the first two calls, which compile, are apart."""
  import diffusers
  import jax
  import torch

  # jax only counts FLOPs here; on the GPU it would take most of its memory.
  jax.config.update('jax_platforms', 'cpu')
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  kind = torch.cuda.get_device_name() if device == 'cuda' else 'cpu'
  step, inputs = prepare(values, device)
  seconds, used, losses, noise, began = [], [], [], None, None
  for i in range(MAX_STEPS + 3):
    started, used_before = time.perf_counter(), time.process_time()
    loss, margins = step(inputs)
    losses.append(float(loss))
    if device == 'cuda':
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
    used.append(time.process_time() - used_before)
    noise = float(margins.std()) if i == 0 else noise
    began = time.perf_counter() if i == 2 else began
    if i >= 4 and time.perf_counter() - began > values.seconds:
      break
  median = statistics.median(seconds[3:])
  rate = values.pairs * cases.pair_flops(values.size) / median
  peak = chips.peak_of(kind)
  return {
    'program': 'torch',
    'settings': vars(values) | {'json': None},
    'device': kind,
    'devices': 1,
    'version': f'torch {torch.__version__}, diffusers {diffusers.__version__}',
    'pairs_per_second': values.pairs / median,
    'step_ms': median * 1e3,
    'seconds': seconds[3:],
    'processor_seconds': used[3:],
    'tflops': rate / 1e12,
    'mfu': None if peak is None else rate / peak,
    'peak_gib': _peak_gib(device),
    'compile_seconds': max(0.0, sum(seconds[:3]) - 3 * median),
    'margin_noise': noise,
    'losses': losses,
  }


def main(argv: list[str]) -> int:
  """Prints a table; 2 with one line where a package is missing."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--size', choices=tuple(cases.SIZES), required=True)
  parser.add_argument('--pairs', type=int, default=8)
  parser.add_argument('--remat', choices=('none', 'full'), default='none')
  parser.add_argument('--compile', default='default')
  parser.add_argument(
    '--dtype', choices=('float32', 'bfloat16'), default='bfloat16'
  )
  parser.add_argument('--seconds', type=float, default=20.0)
  parser.add_argument('--json', default='')
  values = parser.parse_args(argv)
  try:
    record = measure(values)
  except ImportError as error:
    print(
      f'error: {error}; this needs torch and diffusers: pip install '
      'diffusers==0.42.1 beside a torch for the GPU (or put its wheel on '
      'PYTHONPATH; it needs no other new package than importlib_metadata)',
      file=sys.stderr,
    )
    return 2
  for name in (
    *('version', 'device', 'pairs_per_second', 'step_ms', 'tflops', 'mfu'),
    *('peak_gib', 'compile_seconds', 'margin_noise'),
  ):
    print(f'{name:20s} {record[name]}')
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(record))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
