"""The strict bijection between tensor names in files and Flax parameters.

A Flax path such as down_blocks_0/resnets_1/conv1/kernel becomes
down_blocks.0.resnets.1.conv1.weight, and its array is laid out as PyTorch
does. Every tensor is read once and every leaf written once.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from dpo_jax import types

# How many of a kind of problem an error line shows.
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Rules:
  """How one kind of model names its tensors.

  Attributes:
    indexed: module names that carry an index: `resnets_1` is `resnets.1`.
    renames: (pattern, replacement) for names of other releases, read only.
    ignored: patterns of tensors that are no parameters, read only.
  """

  indexed: tuple[str, ...]
  renames: tuple[tuple[str, str], ...] = ()
  ignored: tuple[str, ...] = ()


def to_flax(
  tensors: Mapping[str, np.ndarray],
  target: types.PyTree,
  rules: Rules,
  source: str = 'tensors',
) -> types.Params:
  """Parameters shaped as `target`, float32, from the tensors of a file.

  `target` is the nested dict under 'params', of anything with a shape.

  Raises:
    ValueError: missing, extra, misshapen or non-float tensors, naming
      `source`, tensors and shapes.
  """
  found = _canonical(tensors, rules, source)
  leaves = traverse_util.flatten_dict(target)
  names = {path: _file_name(path, rules) for path in leaves}
  missing = [name for name in names.values() if name not in found]
  extra = sorted(set(found) - set(names.values()))
  shapes, kinds = [], []
  params = {}
  for path, leaf in leaves.items():
    if names[path] not in found:
      continue
    tensor = found[names[path]]
    expected = _file_shape(path, leaf.shape)
    if tensor.shape != expected:
      shapes.append(f'{names[path]} is {tensor.shape}, should be {expected}')
    elif tensor.dtype.kind in 'iub':
      kinds.append(f'{names[path]} is {tensor.dtype}, should be a float')
    else:
      params[path] = _from_file_layout(path, tensor)
  _raise_problems(
    source,
    {'missing': missing, 'extra': extra, 'misshapen': shapes, 'kind': kinds},
    hint='do config.json and weights belong together?',
  )
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
  leaves = traverse_util.flatten_dict(params)
  if target is not None:
    _check_same(leaves, traverse_util.flatten_dict(target))
  tensors = {}
  for path, leaf in leaves.items():
    name = _file_name(path, rules)
    if name in tensors:
      raise ValueError(f'{"/".join(path)}: another leaf is named {name!r} too')
    tensors[name] = _to_file_layout(path, np.asarray(leaf))
  return tensors


def _canonical(
  tensors: Mapping[str, np.ndarray], rules: Rules, source: str
) -> dict[str, np.ndarray]:
  found: dict[str, np.ndarray] = {}
  for raw, tensor in tensors.items():
    if any(re.search(pattern, raw) for pattern in rules.ignored):
      continue
    name = raw
    for pattern, replacement in rules.renames:
      name = re.sub(pattern, replacement, name)
    if name in found:
      raise ValueError(f'{source}: {raw!r} and another tensor are both {name}')
    found[name] = tensor
  return found


def _file_name(path: tuple[str, ...], rules: Rules) -> str:
  *modules, leaf = path
  parts = []
  for module in modules:
    stem, _, index = module.rpartition('_')
    if stem in rules.indexed and index.isdigit():
      module = f'{stem}.{index}'
    parts.append(module)
  leaf = leaf if leaf == 'bias' else 'weight'
  return '.'.join([*parts, leaf])


def _file_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple:
  if path[-1] == 'kernel' and len(shape) == 4:
    height, width, inputs, outputs = shape
    return (outputs, inputs, height, width)
  return tuple(shape[::-1]) if path[-1] == 'kernel' else tuple(shape)


def _from_file_layout(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
  if path[-1] == 'kernel':
    # (out, in, h, w) to (h, w, in, out); (out, in) to (in, out).
    tensor = tensor.transpose((2, 3, 1, 0) if tensor.ndim == 4 else (1, 0))
  return np.asarray(tensor, dtype=np.float32, order='C')


def _to_file_layout(path: tuple[str, ...], leaf: np.ndarray) -> np.ndarray:
  if path[-1] == 'kernel':
    leaf = leaf.transpose((3, 2, 0, 1) if leaf.ndim == 4 else (1, 0))
  return np.asarray(leaf, order='C')


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
