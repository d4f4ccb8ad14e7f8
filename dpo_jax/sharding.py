"""The device mesh and where state, batches and activations live on it.

Axes: `data` copies the state and splits the batch, `fsdp` splits both, and
`tensor`, which is there only where it is larger than 1, splits the products of
attention and feed-forward layers. Over several slices of chips, `data` is the
axis whose outer part crosses the slower network between them.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax import trees, types

BATCH = ('data', 'fsdp')
TENSOR = 'tensor'
# Leaves with fewer elements are copied to every device.
MIN_SIZE = 2**14
# (regex on the leaf's name, spec); the first match counts. An axis that the
# mesh lacks, or that does not divide its dimension, is left out. What no rule
# matches (convolutions, embeddings), or matches with another number of
# dimensions (Adafactor's factors), lies over `fsdp` along its largest
# dimension that it divides. Optimizer state, EMA and reference end in the
# parameter's own name and so lie as it does.
RULES = (
  # Into heads and hidden units: each device has some of them ...
  (r'(to_[qkv]|[qkv]_proj|net_0/proj|fc1)/kernel$', ('fsdp', TENSOR)),
  # ... and out of them: their sum goes over the devices.
  (r'(to_out_0|out_proj|net_2|fc2)/kernel$', (TENSOR, 'fsdp')),
)
# In the names of leaves that are several layers' (models.transformer).
STACKED = '/transformer_blocks/'
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(
  *,
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  dcn_data: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Mesh with axes `data` x `fsdp` (x `tensor`, if that is not 1).

  -1 takes what the devices leave. dcn_data: slices of chips (or, where devices
  tell no slice, processes) that `data` is spread over, a divisor of it; the
  other axes stay within a slice.

  Raises ValueError when the sizes do not multiply to the device count, or the
  devices do not lie in `dcn_data` equal slices.
  """
  devices = list(jax.devices()) if devices is None else list(devices)
  sizes = [data, fsdp, tensor]
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    given = f'mesh.data={data} and mesh.fsdp={fsdp}'
    if tensor != 1:
      given = f'mesh.data={data}, mesh.fsdp={fsdp} and mesh.tensor={tensor}'
    raise ValueError(
      f'{given} do not cover {len(devices)} devices; their product must equal '
      'that number (one may be -1)'
    )
  names = (*BATCH, TENSOR)
  if sizes[-1] == 1:
    sizes, names = sizes[:-1], BATCH
  auto = (AxisType.Auto,) * len(names)
  if dcn_data != 1:
    return Mesh(
      arrange_slices(devices, sizes, dcn_data), names, axis_types=auto
    )
  return jax.make_mesh(sizes, names, axis_types=auto, devices=devices)


def arrange_slices(
  devices: Sequence[Any], sizes: Sequence[int], dcn_data: int
) -> np.ndarray:
  """Devices [data, ...] of `sizes`, where axis 0 runs over slices outermost.

  Raises ValueError when `dcn_data` is not the number of slices or does not
  divide axis 0.
  """
  by_process = not hasattr(devices[0], 'slice_index')
  key = 'process_index' if by_process else 'slice_index'
  found = [getattr(device, key) for device in devices]
  counts = {number: found.count(number) for number in found}
  if dcn_data < 1 or len(counts) != dcn_data or len(set(counts.values())) != 1:
    what = 'processes' if by_process else 'slices'
    shown = ', '.join(str(count) for count in counts.values())
    raise ValueError(
      f'mesh.dcn_data={dcn_data}: must be the number of {what} the devices lie '
      f'in, all equally large; there are {len(counts)} (of {shown} devices)'
    )
  if sizes[0] % dcn_data:
    raise ValueError(
      f'mesh.dcn_data={dcn_data}: must divide mesh.data, which is {sizes[0]}; '
      'make mesh.fsdp times mesh.tensor fit into one slice'
    )
  return mesh_utils.create_hybrid_device_mesh(
    (sizes[0] // dcn_data, *sizes[1:]),
    (dcn_data, *(1 for _ in sizes[1:])),
    devices,
    process_is_granule=by_process,
    allow_split_physical_axes=True,
  )


def batch_ways(mesh: Mesh) -> int:
  """Into how many parts a batch is split."""
  return math.prod(mesh.shape[name] for name in BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
  """A full copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 split over `data` and `fsdp`, in order."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def state_shardings(
  tree: types.PyTree,
  mesh: Mesh,
  *,
  rules: Rules = RULES,
  min_size: int = MIN_SIZE,
) -> types.PyTree:
  """A sharding for each leaf of parameters, optimizer state or a whole state.

  Leaves of fewer than `min_size` elements are replicated, others lie as
  `rules` say; see RULES.
  """

  def place(path, leaf):
    spec = _spec(trees.leaf_name(path), leaf.shape, mesh, rules, min_size)
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(place, tree)


def _spec(name, shape, mesh, rules, min_size) -> tuple[str | None, ...]:
  if STACKED in name:
    # Each lies as it does alone, so that stacking them moves nothing.
    one = name.replace(STACKED, '/')
    spec = _spec(one, shape[1:], mesh, rules, min_size)
    return (None, *spec) if any(spec) else ()
  if math.prod(shape) < min_size:
    return ()
  wanted = next((spec for rule, spec in rules if re.search(rule, name)), ())
  if len(wanted) != len(shape):
    wanted = (None,) * len(shape)
  spec = [
    axis if _divides(axis, size, mesh) else None
    for axis, size in zip(wanted, shape, strict=True)
  ]
  if 'fsdp' not in spec:
    for i in sorted(range(len(shape)), key=lambda i: -shape[i]):
      if spec[i] is None and _divides('fsdp', shape[i], mesh):
        spec[i] = 'fsdp'
        break
  return tuple(spec) if any(spec) else ()


def _divides(axis: str | None, size: int, mesh: Mesh) -> bool:
  ways = mesh.shape.get(axis, 1)
  return ways > 1 and size % ways == 0


def over(mesh: Mesh, function: Callable) -> Callable:
  """`function`, in which split_batch splits over `mesh` wherever it is traced.

  Without this split_batch does nothing, so a model can be used on its own.
  """

  @functools.wraps(function)
  def wrapped(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **kwargs)

  return wrapped


def split_batch(x: jax.Array) -> jax.Array:
  """`x` [n ...] with axis 0 split as a batch is, the same values.

  Left alone, the partitioner may follow the weights' sharding instead and
  gather the whole global batch. Axes but the first are whole on each device;
  the last one is the partitioner's to choose where there is a tensor axis. A
  batch that cannot be split evenly stays as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not set(BATCH) <= set(mesh.axis_names):
    return x
  ways = math.prod(mesh.shape[name] for name in BATCH)
  if x.shape[0] % ways or mesh.size == 1:
    return x
  rest = [None] * (x.ndim - 1)
  if rest and TENSOR in mesh.axis_names:
    rest[-1] = PartitionSpec.UNCONSTRAINED
  return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH, *rest))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict:
  """Places this process's rows of the global batch on its devices.

  batch: arrays [b_local, ...]; returns global arrays [b, ...].
  """
  placement = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(placement, array)
    for name, array in batch.items()
  }


def check_batch_size(batch_size: int, accumulate: int, ways: int) -> None:
  """Raises ValueError unless every microbatch splits evenly over devices.

  ways: as batch_ways says, the number of devices where there is no tensor
  axis.
  """
  if batch_size % (accumulate * ways):
    allowed = accumulate * ways
    raise ValueError(
      f'train.batch_size={batch_size} is not divisible by '
      f'train.accumulate={accumulate} x {ways} devices; use a multiple '
      f'of {allowed}, for instance {max(1, batch_size // allowed) * allowed}'
    )
