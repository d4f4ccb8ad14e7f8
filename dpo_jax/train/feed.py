"""Batches on the devices, one ahead of the step that takes them."""

from typing import Protocol

import jax
import numpy as np

from dpo_jax import sharding


class Loader(Protocol):
  """Batches of numpy arrays with an integer position."""

  def __next__(self) -> dict[str, np.ndarray]: ...

  def get_state(self) -> int: ...

  def set_state(self, position: int) -> None: ...


class Feed:
  """Places the next batch while the devices compute.

  Attributes:
    position: the loader's, after the last batch that was taken.
  """

  def __init__(self, loader: Loader, mesh: jax.sharding.Mesh):
    """Nothing is loaded yet."""
    self._loader, self._mesh = loader, mesh
    self._ahead = None
    self.position = loader.get_state()

  def load(self) -> None:
    """Loads the batch that `take` will give; nothing if it is there."""
    if self._ahead is None:
      batch = next(self._loader)
      self._ahead = batch, sharding.put_batch(batch, self._mesh)

  def peek(self) -> dict[str, jax.Array]:
    """The batch that `take` will give, on the mesh."""
    self.load()
    return self._ahead[1]

  def take(self) -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
    """(id and epoch of this process's rows, the global batch on the mesh)."""
    self.load()
    (batch, placed), self._ahead = self._ahead, None
    self.position = self._loader.get_state()
    return {name: batch[name] for name in ('id', 'epoch')}, placed
