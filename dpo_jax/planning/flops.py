"""FLOPs of a function, counted from its jaxpr.

A multiply and an add count as two. Matrix products and convolutions count;
elementwise work, which the memory's speed bounds, does not. The compiler's own
count takes the body of a loop once and leaves out custom calls.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

# cuDNN's flash attention: products of [q d] x [d k] that each does, of which
# the backward pass computes one again.
_FLASH_PRODUCTS = {
  'dot_product_attention_fwd_wrapper': 2,
  'dot_product_attention_bwd_wrapper': 5,
}


def count(function: Callable, *arguments: Any) -> int:
  """FLOPs of function(*arguments), over all devices; shapes are enough.

  The body of a scan counts times its length, a kernel times its grid, a
  branch as its most expensive case. What rematerialisation computes again
  counts again: for the FLOPs of the model trace it without. Raises ValueError
  for a loop of unknown length with products in it.
  """
  return count_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_jaxpr(jaxpr: Any) -> int:
  """As count, of a jaxpr."""
  return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    return _dot(equation)
  if name == 'conv_general_dilated':
    return _convolution(equation)
  if name in _FLASH_PRODUCTS:
    return _flash(equation)
  inner = [count_jaxpr(jaxpr) for jaxpr in _inner(params)]
  if name == 'cond':
    return max(inner)
  if name == 'while' and sum(inner):
    raise ValueError(
      'a while loop with matrix products has no known length; use lax.scan, '
      'or lax.fori_loop with constant bounds under differentiation'
    )
  return sum(inner) * _times(name, params)


def _times(name, params) -> int:
  """How often the inner jaxprs of an equation run."""
  if name == 'scan':
    return params['length']
  if name == 'shard_map':
    # The inner shapes are those of one device.
    manual = (
      params.get('newly_manual_axes')
      or params.get('manual_axes')
      or params['mesh'].axis_names
    )
    return math.prod(params['mesh'].shape[axis] for axis in manual)
  if name == 'pallas_call':
    return math.prod(
      size for size in params['grid_mapping'].grid if isinstance(size, int)
    )
  return 1


def _inner(params) -> Iterator[Any]:
  """Jaxprs among an equation's parameters, those of functions to call."""
  for name, value in params.items():
    # The rules of differentiation are not part of the computation.
    if name in ('fwd', 'bwd', 'jvp', 'fwd_jaxpr_thunk', 'jvp_jaxpr_fun'):
      continue
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _dot(equation) -> int:
  left, right = (var.aval for var in equation.invars[:2])
  (contracted, _), (batched, _) = equation.params['dimension_numbers']
  shared = math.prod(left.shape[i] for i in contracted)
  batch = math.prod(left.shape[i] for i in batched)
  rows = math.prod(left.shape) // max(1, shared * batch)
  columns = math.prod(right.shape) // max(1, shared * batch)
  return 2 * batch * shared * rows * columns


def _convolution(equation) -> int:
  kernel = equation.invars[1].aval.shape
  numbers = equation.params['dimension_numbers']
  _, inputs, *window = numbers.rhs_spec
  # Each output sums over the kernel's window and the inputs of its group; of
  # a dilated input (the gradient of a stride) only one in so many is not 0.
  products = kernel[inputs] * math.prod(kernel[i] for i in window)
  out = math.prod(equation.outvars[0].aval.shape)
  return 2 * out * products // math.prod(equation.params['lhs_dilation'])


def _flash(equation) -> int:
  query, key = (var.aval.shape for var in equation.invars[:2])
  layout = equation.params.get('layout')
  # [b s h d] where the layout is 0, [b h s d] where it is 1.
  length = 2 if layout == 1 else 1
  products = _FLASH_PRODUCTS[equation.primitive.name]
  return 2 * products * math.prod(query) * key[length]
