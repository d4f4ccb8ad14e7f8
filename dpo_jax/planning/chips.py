"""What a chip has: memory, speed, links; and the names of topologies.

Published by the makers: peaks (dense bfloat16), memory speeds and links.
Google's tables (cloud.google.com/tpu/docs, v5e, v5p, v6e) give links as
'bidirectional' bandwidth a chip, 400, 1200 and 800 GB/s, and NVIDIA's 900 GB/s
of NVLink count both ways: half of it is what a chip sends. The network between
slices: published for v5p (50 Gbit/s a chip) and v5e (6.4 Tbit/s a pod of 256);
of h100 one 400 Gbit/s adapter a GPU, as in a DGX H100; of v6e no figure was at
hand, v5e's is assumed. Memory is what the compiler allows, as it says when a
program does not fit. TPU v4 is left out: compiled ahead of time each of its
chips is two devices, which real runs do not have.
"""

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  Attributes:
    platform: 'tpu', 'cuda' or 'cpu'.
    flops: dense bfloat16 FLOP/s; None where a plan names no time.
    memory: bytes the compiler may use; None where there is no bound.
    memory_speed: bytes/s of its memory.
    link_speed: bytes/s that it sends to the chips of its slice, or of its
      host, over all links at once: a bound, as a ring may use some of them.
    dcn_speed: bytes/s that it sends to other slices or hosts.
    dims: how many numbers its topologies have.
  """

  platform: str
  flops: float | None = None
  memory: float | None = None
  memory_speed: float | None = None
  link_speed: float | None = None
  dcn_speed: float | None = None
  dims: int = 2


CHIPS = {
  'v5e': Chip('tpu', 197e12, 15.75 * GIB, 819e9, 200e9, 3.1e9),
  'v5p': Chip('tpu', 459e12, 95.74 * GIB, 2765e9, 600e9, 6.2e9, 3),
  'v6e': Chip('tpu', 918e12, 31.25 * GIB, 1638e9, 400e9, 3.1e9),
  'h100': Chip('cuda', 989e12, 84942979072, 3352e9, 450e9, 50e9, 1),
  'cpu': Chip('cpu', dims=1),
}
# A part of jax's or torch's name of a device to its dense bfloat16 FLOP/s.
_PEAKS = {
  'H200': CHIPS['h100'].flops,
  'H100': CHIPS['h100'].flops,
  'A100': 312e12,
  'TPU v4': 275e12,
  'TPU v5 lite': CHIPS['v5e'].flops,
  'TPU v5e': CHIPS['v5e'].flops,
  'TPU v5': CHIPS['v5p'].flops,
  'TPU v6': CHIPS['v6e'].flops,
}


def peak_of(device_kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of a device by its name; None where unknown."""
  found = [peak for name, peak in _PEAKS.items() if name in device_kind]
  return found[0] if found else None


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips of one kind and how they are laid out: `v5e:16x16`.

  Attributes:
    name: as it was given.
    kind: of CHIPS.
    layout: chips along each side.
  """

  name: str
  kind: str
  layout: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    """What one of them has."""
    return CHIPS[self.kind]

  @property
  def num_chips(self) -> int:
    """Chips in one slice."""
    return math.prod(self.layout)


def parse_topology(text: str) -> Topology:
  """The topology of a name; ValueError says what names there are."""
  kind, _, layout = text.partition(':')
  allowed = 'v5e:16x16, v6e:8x8, v5p:4x4x4, h100:8 or cpu:8'
  if kind not in CHIPS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', layout):
    raise ValueError(f'--topology={text}: give a chip and a layout: {allowed}')
  sides = tuple(int(side) for side in layout.split('x'))
  dims = CHIPS[kind].dims
  if len(sides) != dims:
    raise ValueError(
      f'--topology={text}: {kind} takes {dims} number{"s" * (dims > 1)}, for '
      f'instance one of {allowed}'
    )
  return Topology(text, kind, sides)
