"""What a chip has: memory, speed, links; and the names of topologies.

Peaks are those that the makers publish for dense bfloat16, memory what the
compiler may use of it, links what one chip sends over all of its links.
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
    link_speed: bytes/s to the other chips of its slice, or of its host.
    dcn_speed: bytes/s to chips of other slices or hosts.
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
  'v4': Chip('tpu', 275e12, 30.75 * GIB, 1228e9, 150e9, 3.1e9, 3),
  'v5e': Chip('tpu', 197e12, 15.75 * GIB, 819e9, 100e9, 3.1e9),
  'v5p': Chip('tpu', 459e12, 95.74 * GIB, 2765e9, 300e9, 6.2e9, 3),
  'v6e': Chip('tpu', 918e12, 31.25 * GIB, 1640e9, 224e9, 6.2e9),
  'h100': Chip('cuda', 989e12, 84942979072, 3352e9, 450e9, 50e9, 1),
  'cpu': Chip('cpu', dims=1),
}


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
  allowed = 'v5e:16x16, v6e:8x8, v5p:4x4x4, v4:2x2x4, h100:8 or cpu:8'
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
