"""Compares every module of a Flax model with its namesake in PyTorch."""

import re

import jax
import numpy as np

from dpo_jax.weights import diffusers_maps

# Of the largest absolute value of an output, and never above 1 of it.
TOLERANCE = 1e-4


def error(ours, theirs):
  """Largest absolute difference over the smaller of 1 and the scale.

  `theirs` is a PyTorch tensor, channels first where it has four axes; where
  it is laid out in another order still, that is undone.
  """
  ours = np.asarray(ours)
  theirs = theirs.detach().float()
  if theirs.ndim == 4:
    theirs = theirs.permute(0, 2, 3, 1)
  elif theirs.ndim == 3 and theirs.shape[-1] != ours.shape[-1]:
    theirs = theirs.permute(0, 2, 1)
  theirs = theirs.numpy().reshape(ours.shape)
  scale = np.abs(theirs).max()
  assert scale > 0.01, 'an output near zero proves nothing'
  return np.abs(ours - theirs).max() / min(1.0, scale)


def assert_equal(ours, theirs):
  """The two agree to TOLERANCE; a failure names the difference."""
  assert error(ours, theirs) < TOLERANCE, error(ours, theirs)


def record(module):
  """What PyTorch's submodules return from now on: a dict by name."""
  outputs = {}

  def make_hook(name):
    def hook(_, inputs, output):
      outputs[name] = list(_tensors(output))

    return hook

  for name, child in module.named_modules():
    child.register_forward_hook(make_hook(name))
  return outputs


def compare_modules(component, state, recorded, *, without=()):
  """Compares all recorded outputs; `state` is Flax's 'intermediates'.

  Returns the errors by PyTorch's name. `without` are the names of modules
  whose outputs are not the same thing on both sides.
  """
  ours = _intermediates(component, state, recorded)
  errors = {}
  for name, values in ours.items():
    if name not in without:
      pairs = zip(values, recorded[name], strict=False)
      errors[name] = max(error(mine, theirs) for mine, theirs in pairs)
  bad = {name: value for name, value in errors.items() if value > TOLERANCE}
  assert not bad, bad
  return errors


def _intermediates(component, state, recorded):
  rules = diffusers_maps.COMPONENTS[component].rules
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    *modules, method = [key.key for key in path if hasattr(key, 'key')]
    assert method == '__call__'
    parts = []
    for module in modules:
      stem, _, index = module.rpartition('_')
      is_indexed = stem in rules.indexed and index.isdigit()
      parts.append(f'{stem}.{index}' if is_indexed else module)
    name = '.'.join(parts)
    if name not in recorded:  # transformers 5 has no such level.
      name = re.sub(r'^text_model\.?', '', name)
    if not name:  # The whole model, which the caller compares.
      continue
    assert name in recorded, f'PyTorch has no module {name!r}'
    found.setdefault(name, []).append((path, leaf))
  return {name: _last_call(leaves) for name, leaves in found.items()}


def _last_call(leaves):
  # layers.Dense calls its parent, so that two calls are recorded: the last
  # one is its own. An index after the method is the number of the call.
  def call(path):
    after = [key for key in path if not hasattr(key, 'key')]
    return after[0].idx

  last = max(call(path) for path, _ in leaves)
  return [leaf for path, leaf in leaves if call(path) == last]


def _tensors(output):
  if hasattr(output, 'to_tuple'):
    output = output.to_tuple()
  if isinstance(output, (tuple, list)):
    for item in output:
      yield from _tensors(item)
  elif hasattr(output, 'detach'):
    # The next module may work in place.
    yield output.detach().clone()
