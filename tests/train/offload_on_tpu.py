"""Compiles a step for a TPU with the optimizer's state on device and host.

Prints a line for each of the two: bytes of arguments on the device, on the
host, and the device's peak.
"""

import jax
import jax.numpy as jnp

from dpo_jax import sharding
from dpo_jax.planning import chips, devices
from dpo_jax.train import offload, step
from dpo_jax.train import optimizer as optimizer_lib
from dpo_jax.train import state as state_lib

LAYERS, WIDTH = 16, 1024
# So many that computing a gradient again is dearer than keeping it.
ROWS = 4096


def _loss(params, frozen, batch, key):
  hidden = batch['x']
  for kernel in params.values():
    hidden = jnp.tanh(hidden @ kernel)
  return jnp.mean(jnp.square(hidden), -1), {}


def _measure(mesh, *, is_offloaded: bool) -> tuple[int, int, int]:
  optimizer = optimizer_lib.make_optimizer(
    name='adamw',
    schedule=lambda count: 1e-3,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=1e-2,
    clip_norm=1.0,
    offload=is_offloaded,
  )
  kernel = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
  shapes = jax.eval_shape(
    lambda params: state_lib.init_state(params, optimizer, use_ema=False),
    {f'{i}': kernel for i in range(LAYERS)},
  )
  placement = sharding.state_shardings(shapes, mesh)
  if is_offloaded:
    placement = offload.place(placement, shapes)

  def put(tree, where):
    return jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
      ),
      tree,
      where,
    )

  batch = {'x': jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)}
  key = jax.eval_shape(lambda: jax.random.key(0))
  made = (
    jax.jit(
      step.make_step(_loss, optimizer),
      donate_argnums=0,
      out_shardings=(placement, None),
    )
    .lower(
      put(shapes, placement),
      {},
      put(batch, {'x': sharding.batch_sharding(mesh)}),
      put(key, sharding.replicated(mesh)),
    )
    .compile()
    .memory_analysis()
  )
  results = made.output_size_in_bytes - made.alias_size_in_bytes
  return (
    made.argument_size_in_bytes,
    made.host_argument_size_in_bytes,
    made.argument_size_in_bytes + results + made.temp_size_in_bytes,
  )


def main() -> None:
  """Prints the two lines."""
  found = devices.make(chips.parse_topology('v5e:2x2'))
  mesh = sharding.make_mesh(data=2, fsdp=2, devices=found)
  for is_offloaded in (False, True):
    print(*_measure(mesh, is_offloaded=is_offloaded))


if __name__ == '__main__':
  main()
