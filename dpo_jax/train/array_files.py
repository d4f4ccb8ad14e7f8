"""How the arrays of a state are laid out in the files of a checkpoint."""

import jax
import orbax.checkpoint as ocp

# Copies of an array write a part of it each only where a part has so many
# bytes: a small one would become a fragment for every device.
_PART_BYTES = 2**20


def make_handler() -> ocp.PyTreeCheckpointHandler:
  """What saves and restores a tree of jax.Array, for ocp.args.PyTree*.

  Any checkpoint of orbax's StandardSave is read, and what it writes is read by
  StandardRestore with a target.
  """
  arrays = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_PART_BYTES,
    # A restore names its own shardings.
    enable_write_sharding_file=False,
  )
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays)
    )
  )
