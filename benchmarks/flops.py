"""FLOPs counted from a jaxpr: what a model needs, whatever a compiler does.

Only products count: dot_general and convolution, a multiplication and an
addition as two. Loops count as often as they run. What rematerialisation
computes again is not the model's, so count a forward pass and multiply: a
backward pass is two of them.
"""

import math
from collections.abc import Callable

import jax

from benchmarks import cases

# Passes an image of a pair, the reference's included: 1 + 2 and 1.
PASSES = 4
# Dense bfloat16 peaks, FLOP/s, by a part of jax's device_kind.
PEAKS = {
  'H200': 989e12,
  'H100': 989e12,
  'A100': 312e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5p': 459e12,
  'TPU v6': 918e12,
}


def peak_of(device_kind: str) -> float | None:
  """The chip's peak, None where it is not in the table (a CPU)."""
  found = [peak for name, peak in PEAKS.items() if name in device_kind]
  return found[0] if found else None


def count(function: Callable, *arguments, **keywords) -> int:
  """FLOPs of the products in `function` of these arguments or their shapes.

  Raises ValueError for a while loop that computes products: how often it runs
  is not known.
  """
  return _count(jax.make_jaxpr(function)(*arguments, **keywords).jaxpr)


def pair_flops(size: str) -> int:
  """Of the DPO step on one pair from cached latents: 8 forward passes."""
  # Attention's products are in sight in the default, float32, model only.
  module = cases.make_model(size).unet
  arguments = cases.unet_arguments(size, 2)
  shapes = jax.eval_shape(module.init, jax.random.key(0), **arguments)
  return PASSES * count(
    lambda params, arguments: module.apply(params, **arguments),
    shapes,
    arguments,
  )


def _count(jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    shapes = [getattr(v.aval, 'shape', ()) for v in equation.invars]
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      depth = math.prod(shapes[0][i] for i in contracted)
      total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
    elif name == 'conv_general_dilated':
      # Kernel entries an output needs: all but those of other outputs.
      numbers = params['dimension_numbers']
      kernel = math.prod(shapes[1]) // shapes[1][numbers.rhs_spec[0]]
      total += 2 * kernel * math.prod(equation.outvars[0].aval.shape)
    else:
      inner = [_count(sub) for sub in _subs(params)]
      if name == 'while' and any(inner):
        raise ValueError('a while loop with products: its trips are unknown')
      # Only one branch of a cond runs: the dearest counts.
      inner = max(inner, default=0) if name == 'cond' else sum(inner)
      total += inner * (params['length'] if name == 'scan' else 1)
  return total


def _subs(params):
  """The jaxprs among an equation's parameters."""
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if hasattr(item, 'jaxpr'):
        item = item.jaxpr
      if hasattr(item, 'eqns'):
        yield item
