"""The strict bijection between tensor names in files and Flax parameters.

A Flax path such as down_blocks_0/resnets_1/conv1/kernel becomes
down_blocks.0.resnets.1.conv1.weight, and its array is laid out as PyTorch
does. Every tensor is read once and every leaf written once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from dpo_jax import types
from dpo_jax.weights import safetensors_io

# Bytes; what XLA asks of memory on a CPU.
ALIGNMENT = 64
# How many of a kind of problem an error line shows.
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Rules:
  """How one kind of model names its tensors.

  Attributes:
    indexed: module names that carry an index: `resnets_1` is `resnets.1`.
    bare: leaves whose names in a file are their own, not `weight` or `bias`.
    renames: (pattern, replacement) for names of other releases, read only.
    ignored: patterns of tensors that are no parameters, read only.
  """

  indexed: tuple[str, ...]
  bare: tuple[str, ...] = ()
  renames: tuple[tuple[str, str], ...] = ()
  ignored: tuple[str, ...] = ()


def to_flax(
  tensors: safetensors_io.Tensors | Mapping[str, np.ndarray],
  target: types.PyTree,
  rules: Rules,
  source: str = '',
  *,
  place: types.PyTree | None = None,
  dtype: types.DTypeLike = np.float32,
) -> types.Params:
  """Parameters shaped as `target`, of `dtype`, from the tensors of a file.

  `target` is the nested dict under 'params', of anything with a shape. The
  leaves are NumPy arrays; or, where `place` has a Sharding for each, jax Arrays
  of which this process reads only the parts that its devices hold, each part
  once. Names, shapes and kinds are checked before anything is read.

  Raises:
    ValueError: missing, extra, misshapen or non-float tensors, or values that
      are not finite in `dtype`, naming `source`, tensors and shapes.
  """
  if isinstance(tensors, Mapping):
    tensors = safetensors_io.TensorArrays(tensors)
  source, dtype = source or tensors.source, np.dtype(dtype)
  leaves = traverse_util.flatten_dict(target)
  raw_names = _match(tensors, leaves, rules, source)
  places = None if place is None else traverse_util.flatten_dict(place)
  if places is not None and places.keys() != leaves.keys():
    raise ValueError(f'{source}: place has other leaves than the parameters')
  params = {}
  for path, leaf in leaves.items():
    read = functools.partial(
      _read_part, tensors, source, raw_names[path], path, dtype
    )
    if places is None:
      params[path] = read((slice(None),) * len(leaf.shape))
    else:
      params[path] = _put(read, tuple(leaf.shape), places[path])
  return traverse_util.unflatten_dict(params)


def from_flax(
  params: types.Params,
  rules: Rules,
  *,
  target: types.PyTree | None = None,
) -> dict[str, np.ndarray]:
  """Tensors by their names in a file, in the dtypes of `params`.

  Raises:
    ValueError: two leaves of one name; leaves or shapes other than those of
      `target`, where that is given.
  """
  tensors = ParamTensors(params, rules, target=target)
  return {
    name: np.asarray(tensors.read(name), order='C') for name in tensors.keys()
  }


class ParamTensors:
  """Parameters as `safetensors_io.Tensors`, laid out one at a time."""

  def __init__(
    self,
    params: types.Params,
    rules: Rules,
    *,
    target: types.PyTree | None = None,
  ) -> None:
    """Names the leaves; raises ValueError as from_flax does."""
    self.source = 'parameters'
    leaves = traverse_util.flatten_dict(params)
    if target is not None:
      _check_same(leaves, traverse_util.flatten_dict(target))
    self._leaves: dict[str, tuple[tuple[str, ...], Any]] = {}
    for path, leaf in leaves.items():
      name = _file_name(path, rules)
      if name in self._leaves:
        raise ValueError(
          f'{"/".join(path)}: another leaf is named {name!r} too'
        )
      self._leaves[name] = path, leaf

  def keys(self) -> Collection[str]:
    """All names in a file."""
    return self._leaves.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one tensor in a file."""
    path, leaf = self._leaves[name]
    return _file_shape(path, leaf.shape)

  def dtype(self, name: str) -> np.dtype:
    """The dtype of one leaf."""
    return np.dtype(self._leaves[name][1].dtype)

  def read(
    self, name: str, index: safetensors_io.Index | None = None
  ) -> np.ndarray:
    """One tensor or a part of it: a view of the leaf where that is NumPy."""
    path, leaf = self._leaves[name]
    axes = np.argsort(_to_flax_axes(path, leaf.ndim))
    tensor = np.asarray(leaf).transpose(axes)
    return tensor if index is None else tensor[tuple(index)]


def file_shapes(
  target: types.PyTree, rules: Rules
) -> dict[str, tuple[int, ...]]:
  """The names and shapes in a file of all leaves of `target`, nothing read."""
  leaves = traverse_util.flatten_dict(target)
  return {
    _file_name(path, rules): _file_shape(path, leaf.shape)
    for path, leaf in leaves.items()
  }


def _match(
  tensors: safetensors_io.Tensors, leaves: Mapping, rules: Rules, source: str
) -> dict[tuple[str, ...], str]:
  """The name in `tensors` of each leaf, once all of them are known to fit."""
  found = _canonical(tensors, rules, source)
  names = {path: _file_name(path, rules) for path in leaves}
  shapes, kinds = [], []
  for path, leaf in leaves.items():
    name = names[path]
    if name not in found:
      continue
    shape, kind = tensors.shape(found[name]), tensors.dtype(found[name])
    expected = _file_shape(path, leaf.shape)
    if shape != expected:
      shapes.append(f'{name} is {shape}, should be {expected}')
    elif kind.kind in 'iub':
      kinds.append(f'{name} is {kind}, should be a float')
  _raise_problems(
    source,
    {
      'missing': [name for name in names.values() if name not in found],
      'extra': sorted(found.keys() - set(names.values())),
      'misshapen': shapes,
      'kind': kinds,
    },
    hint='do config.json and weights belong together?',
  )
  return {path: found[name] for path, name in names.items()}


def _canonical(
  tensors: safetensors_io.Tensors, rules: Rules, source: str
) -> dict[str, str]:
  """Names of this release to names in `tensors`."""
  found: dict[str, str] = {}
  for raw in tensors.keys():
    if any(re.search(pattern, raw) for pattern in rules.ignored):
      continue
    name = raw
    for pattern, replacement in rules.renames:
      name = re.sub(pattern, replacement, name)
    if name in found:
      raise ValueError(f'{source}: {raw!r} and another tensor are both {name}')
    found[name] = raw
  return found


def _read_part(
  tensors: safetensors_io.Tensors,
  source: str,
  name: str,
  path: tuple[str, ...],
  dtype: np.dtype,
  index: safetensors_io.Index,
) -> np.ndarray:
  """The part `index` of a leaf, laid out and cast."""
  order = _to_flax_axes(path, len(index))
  # Axis i of the leaf is axis order[i] of the tensor.
  file_index = [slice(None)] * len(index)
  for part, axis in zip(index, order, strict=True):
    file_index[axis] = part
  tensor = tensors.read(name, tuple(file_index)).transpose(order)
  part = _aligned(tensor.shape, dtype)
  with np.errstate(over='ignore'):  # Infinities are refused just below.
    part[...] = tensor
  if ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(tensor.dtype).max:
    safetensors_io.check_finite(f'{source} as {dtype}', name, part)
  return part


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An array that JAX takes over on a CPU, where it would copy another."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + ALIGNMENT, np.uint8)
  begin = -memory.ctypes.data % ALIGNMENT
  return memory[begin : begin + size].view(dtype).reshape(shape)


def _put(
  read: Callable[[safetensors_io.Index], np.ndarray],
  shape: tuple[int, ...],
  place: jax.sharding.Sharding,
) -> jax.Array:
  parts = {}

  def read_once(index):
    # Several local devices may hold the same part.
    key = tuple(
      part.indices(n)[:2] for part, n in zip(index, shape, strict=True)
    )
    if key not in parts:
      parts[key] = read(index)
    return parts[key]

  array = jax.make_array_from_callback(shape, place, read_once)
  # Else host copies of many leaves would wait for the devices.
  return array.block_until_ready()


def _file_name(path: tuple[str, ...], rules: Rules) -> str:
  *modules, leaf = path
  parts = []
  for module in modules:
    stem, _, index = module.rpartition('_')
    if stem in rules.indexed and index.isdigit():
      module = f'{stem}.{index}'
    parts.append(module)
  leaf = leaf if leaf in ('bias', *rules.bare) else 'weight'
  return '.'.join([*parts, leaf])


def _file_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple:
  if path[-1] == 'kernel' and len(shape) == 4:
    height, width, inputs, outputs = shape
    return (outputs, inputs, height, width)
  return tuple(shape[::-1]) if path[-1] == 'kernel' else tuple(shape)


def _to_flax_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
  if path[-1] != 'kernel':
    return tuple(range(ndim))
  # (out, in, h, w) to (h, w, in, out); (out, in) to (in, out).
  return (2, 3, 1, 0) if ndim == 4 else (1, 0)


def _check_same(leaves: Mapping, target: Mapping) -> None:
  def named(paths):
    return sorted('/'.join(path) for path in paths)

  shapes = [
    f'{"/".join(path)} is {tuple(leaf.shape)}, should be'
    f' {tuple(target[path].shape)}'
    for path, leaf in leaves.items()
    if path in target and tuple(leaf.shape) != tuple(target[path].shape)
  ]
  _raise_problems(
    'parameters',
    {
      'missing': named(target.keys() - leaves.keys()),
      'extra': named(leaves.keys() - target.keys()),
      'misshapen': shapes,
    },
    hint='they are not those of the model in config.json',
  )


def _raise_problems(
  source: str, problems: Mapping[str, list[str]], *, hint: str
) -> None:
  words = []
  for kind, items in problems.items():
    if items:
      more = f' and {len(items) - SHOWN} more' if len(items) > SHOWN else ''
      words.append(f'{len(items)} {kind}: {", ".join(items[:SHOWN])}{more}')
  if words:
    raise ValueError(f'{source}: {"; ".join(words)}; {hint}')
