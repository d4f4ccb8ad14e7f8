"""Prints the collectives of a rematted upsampler's gradient on v5e:4x4, JSON.

One level of a UNet's way up, whose convolutions' weights lie over fsdp; no TPU
is needed, and nothing is run.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo_jax import sharding
from dpo_jax.models import layers, transformer
from dpo_jax.planning import chips, devices, hlo

WIDTH, SIDE = 64, 32


class Level(nn.Module):
  """Convolution, upsampler, convolution."""

  @nn.compact
  def __call__(self, x):
    def up(_, x):
      return layers.Upsample2D(WIDTH, dtype=jnp.bfloat16, name='up')(x)

    x = layers.conv(WIDTH, dtype=jnp.bfloat16, name='before')(x)
    x = transformer.rematted(up, 'full')(self, x)
    return layers.conv(WIDTH, dtype=jnp.bfloat16, name='after')(x)


def main() -> None:
  """Compiles the gradient with respect to the weights."""
  topology = chips.parse_topology('v5e:4x4')
  devices.prepare(topology)
  mesh = sharding.make_mesh(data=4, fsdp=4, devices=devices.make(topology))
  level = Level()

  def loss(params, x):
    out = level.apply({'params': params}, x).astype(jnp.float32)
    return jnp.mean(jnp.square(out))

  x = jax.ShapeDtypeStruct(
    (8 * mesh.size, SIDE, SIDE, WIDTH),
    jnp.bfloat16,
    sharding=sharding.batch_sharding(mesh),
  )
  shapes = jax.eval_shape(level.init, jax.random.key(0), x)['params']
  placement = sharding.state_shardings(shapes, mesh)
  params = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    shapes,
    placement,
  )
  gradient = jax.jit(
    jax.grad(sharding.over(mesh, loss)), out_shardings=placement
  )
  text = gradient.lower(params, x).compile().as_text()
  found = hlo.collectives(text, num_devices=mesh.size)
  json.dump({k: dataclasses.asdict(v) for k, v in found.items()}, sys.stdout)


if __name__ == '__main__':
  main()
