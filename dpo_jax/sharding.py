"""The device mesh and where state and batches live on it."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax import types

AXES = ('data', 'fsdp')


def make_mesh(
  *, data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Mesh with axes `data` x `fsdp`; -1 takes what the devices leave.

  Raises ValueError when the sizes do not multiply to the device count.
  """
  devices = list(jax.devices()) if devices is None else list(devices)
  sizes = [data, fsdp]
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(
      f'mesh.data={data} and mesh.fsdp={fsdp} do not cover {len(devices)} '
      'devices; their product must equal that number (one may be -1)'
    )
  return jax.make_mesh(
    sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """A full copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 split over both mesh axes, in order."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(
  tree: types.PyTree, mesh: Mesh, *, min_size: int = 2**14
) -> types.PyTree:
  """Shards each large leaf over `fsdp` along its largest divisible axis.

  Leaves smaller than `min_size` elements, and leaves with no axis that
  `fsdp` divides, are replicated. With fsdp == 1 everything is.
  """
  fsdp = mesh.shape['fsdp']

  def place(leaf):
    shape = leaf.shape
    if fsdp == 1 or math.prod(shape) < min_size:
      return replicated(mesh)
    for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
      if shape[axis] % fsdp == 0:
        spec = [None] * len(shape)
        spec[axis] = 'fsdp'
        return NamedSharding(mesh, PartitionSpec(*spec))
    return replicated(mesh)

  return jax.tree.map(place, tree)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict:
  """Places this process's rows of the global batch on its devices.

  batch: arrays [b_local, ...]; returns global arrays [b, ...].
  """
  placement = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(placement, array)
    for name, array in batch.items()
  }


def check_batch_size(batch_size: int, accumulate: int, devices: int) -> None:
  """Raises ValueError unless every microbatch splits evenly over devices."""
  if batch_size % (accumulate * devices):
    allowed = accumulate * devices
    raise ValueError(
      f'train.batch_size={batch_size} is not divisible by '
      f'train.accumulate={accumulate} x {devices} devices; use a multiple '
      f'of {allowed}, for instance {max(1, batch_size // allowed) * allowed}'
    )
