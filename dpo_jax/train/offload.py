"""The optimizer's state in the host's memory, on the device a part at a time.

Its arrays cross to the device and back in every step: 16 bytes a weight for
AdamW in float32, over a link of some 10 to 60 GB/s.
"""

import jax
import optax

from dpo_jax import sharding, types
from dpo_jax.train import state as state_lib

HOST = 'pinned_host'
# The weights are updated in so many parts of equal size; two are on the device
# at once, one of which is on its way.
PARTS = 32


def check(mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError where the devices cannot reach the host's memory."""
  device = mesh.devices.flat[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if HOST not in kinds:
    raise ValueError(
      f'optim.offload=True: {device.platform} devices have no {HOST} memory '
      f'(they have {", ".join(kinds)}); set it to False'
    )


def place(
  placement: state_lib.TrainState,
  shapes: state_lib.TrainState,
  *,
  min_size: int = sharding.MIN_SIZE,
) -> state_lib.TrainState:
  """`placement` with the optimizer's large arrays in the host's memory.

  placement: a sharding for each leaf of `shapes`. Leaves of fewer than
  `min_size` elements stay: what they save is less than what asking costs.
  """

  def move(where, leaf):
    return where.with_memory_kind(HOST) if leaf.size >= min_size else where

  return placement.replace(
    opt_state=jax.tree.map(move, placement.opt_state, shapes.opt_state)
  )


def in_parts(
  optimizer: optax.GradientTransformation,
  *,
  parts: int = PARTS,
  min_size: int = sharding.MIN_SIZE,
) -> optax.GradientTransformation:
  """`optimizer` over a state that lies as `place` says, for use under jit.

  It updates the weights part by part: a part's state is fetched once that of
  the part before the last is back on the host. All at once would need the
  memory that this is to save. The values are the same if `optimizer` treats
  every weight by itself, as AdamW and Adafactor do and clipping by the global
  norm does not.
  """

  def update(updates, state, params=None):
    leaves, structure = jax.tree.flatten(updates)
    weights = (
      [None] * len(leaves) if params is None else jax.tree.leaves(params)
    )

    def is_like_params(node):
      return jax.tree.structure(node) == structure

    def cut(node, chosen):
      if not is_like_params(node):
        return node
      all_leaves = jax.tree.leaves(node)
      return [all_leaves[i] for i in chosen]

    done, states = [], []
    for chosen in _split([leaf.size for leaf in leaves], parts):
      part = jax.tree.map(
        lambda node, chosen=chosen: cut(node, chosen),
        state,
        is_leaf=is_like_params,
      )
      # Not before the gradients, nor before what must have left by then.
      after = (done[-2], states[-2]) if len(done) > 1 else leaves
      part = _fetch(part, after, min_size)
      given = None if params is None else [weights[i] for i in chosen]
      made, part = optimizer.update([leaves[i] for i in chosen], part, given)
      done.append(made)
      states.append(_to_host(part, min_size))

    def join(node, *pieces):
      if not is_like_params(node):
        return pieces[0]
      return structure.unflatten([leaf for piece in pieces for leaf in piece])

    state = jax.tree.map(join, state, *states, is_leaf=is_like_params)
    return structure.unflatten([leaf for made in done for leaf in made]), state

  return optax.GradientTransformation(optimizer.init, update)


def _split(sizes: list[int], parts: int) -> list[list[int]]:
  """Runs of indices, each of about an equal share of the sum of `sizes`."""
  share = max(1, sum(sizes) // parts)
  runs, total = [[]], 0
  for i, size in enumerate(sizes):
    if runs[-1] and total + size > share:
      runs.append([])
      total = 0
    runs[-1].append(i)
    total += size
  return runs


def _fetch(tree: types.PyTree, after: types.PyTree, min_size: int):
  """`tree` on the device, its large leaves not before `after` is there."""
  leaves, structure = jax.tree.flatten(tree)
  large = [leaf for leaf in leaves if leaf.size >= min_size]
  large, _ = jax.lax.optimization_barrier((large, after))
  large = iter(jax.device_put(large, jax.memory.Space.Device))
  return structure.unflatten(
    [next(large) if leaf.size >= min_size else leaf for leaf in leaves]
  )


def _to_host(tree: types.PyTree, min_size: int) -> types.PyTree:
  return jax.tree.map(
    lambda leaf: (
      jax.device_put(leaf, jax.memory.Space.Host)
      if leaf.size >= min_size
      else leaf
    ),
    tree,
  )
