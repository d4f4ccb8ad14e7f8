"""What a compiled step costs on its chips: memory, time, days."""

import dataclasses
from typing import Any

import ml_collections

from dpo_jax.planning import chips
from dpo_jax.planning import step as step_lib

# What a tuned step reaches of the arithmetic peak: MaxDiffusion's 45.6% on
# v5p and NeMo's 33.8% on H100 in MLPerf's Stable Diffusion, rounded.
USUAL_MFU = 0.4


@dataclasses.dataclass(frozen=True)
class Plan:
  """All figures of a plan; bytes and FLOPs as integers, times in seconds.

  Attributes:
    bytes_per_device: parameters, optimizer, ema, frozen (the reference and
      what encodes), batch, activations (the compiler's temporaries), peak.
    flops: of a step over all chips, of the model and with what
      rematerialisation computes again.
    bounds: seconds a step takes at least for arithmetic, memory and links, of
      those that are known.
  """

  topology: chips.Topology
  num_devices: int
  mesh: dict[str, int]
  pairs_per_step: int
  num_steps: int
  bytes_per_device: dict[str, int]
  flops: int
  hardware_flops: int
  compiled: step_lib.Compiled
  bounds: dict[str, float]

  @property
  def fits(self) -> bool:
    """Whether the peak is within the chip's memory."""
    limit = self.topology.chip.memory
    return limit is None or self.bytes_per_device['peak'] <= limit

  @property
  def step_seconds(self) -> float | None:
    """The roofline: the longest of the bounds; None on an unknown chip."""
    return max(self.bounds.values()) if self.bounds else None

  @property
  def usual_seconds(self) -> float | None:
    """At USUAL_MFU of the model's FLOPs, or the roofline if that is longer."""
    speed = self.topology.chip.flops
    if speed is None:
      return None
    usual = self.flops / (self.num_devices * speed * USUAL_MFU)
    return max(usual, self.step_seconds)

  def to_json(self) -> dict[str, Any]:
    """The object that --json prints."""
    days, usual_days = (
      seconds and seconds * self.num_steps / 86400
      for seconds in (self.step_seconds, self.usual_seconds)
    )
    made = self.compiled.collectives
    return {
      'topology': self.topology.name,
      'n_devices': self.num_devices,
      'mesh': self.mesh,
      'fits': self.fits,
      'peak_bytes_per_device': self.bytes_per_device['peak'],
      'memory_bytes_per_device': self.topology.chip.memory,
      'bytes_per_device': self.bytes_per_device,
      'flops_per_step': self.flops,
      'hardware_flops_per_step': self.hardware_flops,
      'pairs_per_step': self.pairs_per_step,
      'num_steps': self.num_steps,
      'collectives': None
      if made is None
      else {kind: dataclasses.asdict(value) for kind, value in made.items()},
      'bound_seconds': self.bounds,
      'roofline_step_seconds': self.step_seconds,
      'roofline_days': days,
      'usual_step_seconds': self.usual_seconds,
      'usual_days': usual_days,
      'usual_chip_hours': usual_days and usual_days * 24 * self.num_devices,
      'compile_seconds': self.compiled.seconds,
    }


def make_plan(
  config: ml_collections.ConfigDict,
  topology: chips.Topology,
  problem: step_lib.Problem,
  *,
  hlo_path: str = '',
) -> Plan:
  """Counts and compiles a step and puts it beside the chip's figures.

  The compiled program's text is written to `hlo_path`, if it is given.
  """
  model_flops, hardware_flops = step_lib.count_flops(problem)
  compiled = step_lib.compile_step(problem, hlo_path=hlo_path)
  state, frozen, batch, _ = problem.arguments
  measure = step_lib.bytes_per_device
  sizes = {
    'parameters': measure(state.params),
    'optimizer': measure(state.opt_state),
    'ema': measure(state.ema),
    'frozen': measure(frozen),
    'batch': measure(batch),
    'activations': compiled.temporary,
    'peak': compiled.peak,
  }
  return Plan(
    topology=topology,
    num_devices=problem.mesh.size,
    mesh=dict(problem.mesh.shape),
    pairs_per_step=config.train.batch_size,
    num_steps=config.train.num_steps,
    bytes_per_device=sizes,
    flops=model_flops,
    hardware_flops=hardware_flops,
    compiled=compiled,
    bounds=_bounds(
      topology.chip,
      compiled,
      hardware_flops / problem.mesh.size,
      accumulate=config.train.accumulate,
      crosses=config.mesh.dcn_data > 1,
    ),
  )


def _bounds(chip, compiled, flops, *, accumulate, crosses) -> dict[str, float]:
  """Seconds by bound; with several slices all traffic counts as slow."""
  if chip.flops is None:
    return {}
  # The compiler takes the loop over microbatches once; what it does not tell
  # is at least that everything is read.
  accessed = (compiled.accessed or compiled.argument) * accumulate
  bounds = {
    'arithmetic': flops / chip.flops,
    'memory': accessed / chip.memory_speed,
  }
  if compiled.collectives is not None:
    sent = sum(kind.wire_bytes for kind in compiled.collectives.values())
    bounds['links'] = sent / (chip.dcn_speed if crosses else chip.link_speed)
  return bounds


def advice(
  plan: Plan, config: ml_collections.ConfigDict, *, from_cache: bool
) -> list[str]:
  """What to change when it does not fit, what helps most first."""
  if plan.fits:
    return []
  ways = plan.num_devices // plan.mesh.get('tensor', 1)
  sizes = plan.bytes_per_device
  lasting = sum(
    sizes[name] for name in ('parameters', 'optimizer', 'ema', 'frozen')
  )
  found = []
  if config.model.remat == 'none':
    found.append('--config.model.remat=full: keep few activations')
  if config.model.dtype == 'float32':
    found.append('--config.model.dtype=bfloat16: halves the activations')
  per_device = config.train.batch_size // (config.train.accumulate * ways)
  of_pairs = config.task == 'preference'
  if sizes['activations'] > lasting / 4:
    if per_device > 1:
      found.append(
        f'--config.train.accumulate={config.train.accumulate * per_device}: '
        f'one pair a device at once instead of {per_device}'
      )
    if of_pairs and not config.train.sequential:
      found.append(
        '--config.train.sequential=true: one image of a pair at once'
      )
  # Slices share no weights.
  most = ways // config.mesh.dcn_data
  if plan.mesh['fsdp'] < most:
    found.append(
      f'--config.mesh.fsdp={most}: shards the {lasting / chips.GIB:.1f} GiB of '
      'parameters and states over all devices'
    )
  if config.optim.name == 'adamw':
    found.append('--config.optim.name=adafactor: hardly any optimizer state')
  if of_pairs and config.model.ref_dtype == 'float32':
    found.append('--config.model.ref_dtype=bfloat16: halves the reference')
  if config.optim.ema_decay:
    found.append('--config.optim.ema_decay=0: one copy of the weights less')
  if not from_cache and of_pairs:
    found.append(
      'prepare --model and --cached=true: no VAE and text encoders in the step'
    )
  found.append('more chips, or chips with more memory')
  return found


def describe(plan: Plan, suggestions: list[str]) -> str:
  """The plan as a table of two columns and advice."""
  values = plan.to_json()
  limit = values['memory_bytes_per_device']
  of = f' of {_gib(limit)}' if limit else ''
  rows = [
    ('devices', f'{plan.num_devices} ({plan.topology.name})'),
    ('mesh', ', '.join(f'{name} {size}' for name, size in plan.mesh.items())),
    ('pairs a step', plan.pairs_per_step),
    *(
      (f'{name} a device', _gib(size))
      for name, size in plan.bytes_per_device.items()
      if name != 'peak'
    ),
    ('peak a device', f'{_gib(plan.bytes_per_device["peak"])}{of}'),
    ('TFLOP a step, of the model', f'{plan.flops / 1e12:.4g}'),
    ('TFLOP a step, with remat', f'{plan.hardware_flops / 1e12:.4g}'),
  ]
  for kind, value in (plan.compiled.collectives or {}).items():
    rows.append(
      (
        f'{kind} a device',
        f'{value.count} of {value.num_bytes / 1e6:.4g} MB in all, largest '
        f'{value.largest / 1e6:.4g} MB; {value.wire_bytes / 1e6:.4g} MB sent',
      )
    )
  rows += [(f'step, bound by {k}', _ms(v)) for k, v in plan.bounds.items()]
  if plan.step_seconds is not None:
    rows += [
      ('step, roofline', _ms(plan.step_seconds)),
      (f'step at {USUAL_MFU:.0%} of peak', _ms(plan.usual_seconds)),
      ('pairs a second', f'{plan.pairs_per_step / plan.usual_seconds:.4g}'),
      (
        f'{plan.num_steps} steps',
        f'{values["usual_days"]:.3g} days, '
        f'{values["usual_chip_hours"]:.4g} chip-hours',
      ),
    ]
  rows.append(('compiled in', f'{plan.compiled.seconds:.0f} s'))
  lines = [f'{name:28s} {value}' for name, value in rows]
  if not plan.fits:
    lines += ['It does not fit. What helps:', *(f'  {s}' for s in suggestions)]
  return '\n'.join(lines)


def _gib(size: float) -> str:
  return f'{size / chips.GIB:.3f} GiB'


def _ms(seconds: float) -> str:
  return f'{seconds * 1e3:.4g} ms'
