"""An ensemble's gradient: one network after the other, or mapped over by vmap.

  python -m benchmarks.guided_networks [--size=small] [--batch=4] [--rounds=9]

Five networks on x_t, of random weights; guidance asks them in turn.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, guided_memory
from dpo_jax import types
from dpo_jax.models import reward


def show(values) -> None:
  """Prints the table."""
  module, k, side = (
    reward.Reward(guided_memory.TIME),
    5,
    cases.SIZES[values.size].side,
  )
  rng = np.random.default_rng(0)
  x = jnp.asarray(
    rng.standard_normal((values.batch, side, side, 4), np.float32)
  )
  t = jnp.zeros(values.batch, jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, t)['params']
  members = [guided_memory.fill(shapes, rng) for _ in range(k)]

  def mapped(stacked, x):
    return reward.log_reward(
      jax.vmap(lambda params: module.apply({'params': params}, x, t))(stacked)
    ).sum()

  def in_turn(members, x):
    return reward.make_log_reward_fn(module, members)(x, t).sum()

  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
  runs = {}
  for name, fn, params in (
    ('in turn', in_turn, members),
    ('mapped', mapped, stacked),
  ):
    run = functools.partial(jax.jit(jax.grad(fn, argnums=1)), params, x)
    runs[name] = functools.partial(_wait, run)
  one, other = runs['in turn'](), runs['mapped']()
  gap = jnp.abs(one - other).max() / jnp.abs(one).max()
  found = guided_memory.take_turns(runs, values.rounds)
  print(
    f'gradient of log r of {k} networks, {values.batch} states of {side}x{side}'
    f'x4, median of {values.rounds} rounds (least to most), '
    f'{jax.devices()[0].device_kind}; they differ by {gap:.0e} at most\n'
    '| networks | s | over in turn |\n|---|---|---|'
  )
  for name, seen in found.items():
    middle, base = (statistics.median(found[key]) for key in (name, 'in turn'))
    print(
      f'| {name} | {middle:.3f} ({min(seen):.3f} to {max(seen):.3f}) | '
      f'{middle / base:.2f} |'
    )


def _wait(run: Callable[[], types.PyTree]) -> types.PyTree:
  return jax.block_until_ready(run())


def main(argv: list[str]) -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser('benchmarks.guided_networks')
  parser.add_argument('--size', choices=cases.SIZES, default='small')
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--rounds', type=int, default=9)
  show(parser.parse_args(argv))


if __name__ == '__main__':
  main(sys.argv[1:])
