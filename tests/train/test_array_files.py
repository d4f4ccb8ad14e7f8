"""The layout of arrays in a checkpoint's files."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import sharding
from dpo_jax.train import array_files


@pytest.fixture
def tree():
  """Copies on 8 devices, below and above the size that is shared out."""
  shapes = {'small': (16, 24), 'large': (2048, 1024)}
  arrays = {
    name: jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    for name, shape in shapes.items()
  }
  return jax.device_put(arrays, NamedSharding(sharding.make_mesh(), P()))


def test_small_arrays_are_one_fragment_and_all_come_back(tree, tmp_path):
  path = tmp_path / 'state'
  with ocp.Checkpointer(array_files.make_handler()) as files:
    files.save(path, args=ocp.args.PyTreeSave(tree))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as files:
    found = files.metadata(path).item_metadata.tree
  assert found['small'].storage.chunk_shape == (16, 24)
  # Each of the 8 devices writes an eighth.
  assert np.prod(found['large'].storage.chunk_shape) == 2048 * 1024 // 8
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    tree,
  )
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as files:
    again = files.restore(path, args=ocp.args.StandardRestore(shapes))
  jax.tree.map(np.testing.assert_array_equal, again, tree)
