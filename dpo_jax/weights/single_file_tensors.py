"""Tensors of a single-file checkpoint under diffusers' names."""

from collections.abc import Collection, Mapping

import numpy as np

from dpo_jax.weights import safetensors_io, single_file_maps


class RenamedTensors:
  """Part of a file as `safetensors_io.Tensors` with diffusers' names."""

  def __init__(
    self,
    file: safetensors_io.Tensors,
    prefix: str,
    origins: Mapping[str, single_file_maps.Origin],
  ) -> None:
    self.source = f'{file.source} ({prefix}*)'
    self._file = file
    self._prefix = prefix
    self._origins = origins

  def keys(self) -> Collection[str]:
    """All names."""
    return self._origins.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one tensor, as diffusers has it."""
    origin, shape = self._origin(name)
    # What cannot be cut keeps its shape, which the mapping then refuses.
    if origin.third is not None and shape[0] % 3 == 0:
      return (shape[0] // 3, *shape[1:])
    if self._has_pixels(origin, shape):
      return shape[:2]
    return shape[::-1] if origin.is_transposed else shape

  def dtype(self, name: str) -> np.dtype:
    """The dtype of one tensor."""
    return self._file.dtype(self._prefix + self._origins[name].name)

  def read(
    self, name: str, index: safetensors_io.Index | None = None
  ) -> np.ndarray:
    """One tensor or a part of it; no more of the file is read."""
    origin, shape = self._origin(name)
    wanted = self.shape(name)
    if index is None:
      index = (slice(None),) * len(wanted)
    if origin.third is not None:
      start, stop, _ = index[0].indices(wanted[0])
      begin = origin.third * wanted[0]
      index = (slice(begin + start, begin + stop), *index[1:])
    raw = self._prefix + origin.name
    if self._has_pixels(origin, shape):
      return self._file.read(raw, (*index, slice(None), slice(None)))[..., 0, 0]
    if origin.is_transposed:
      return self._file.read(raw, index[::-1]).T
    return self._file.read(raw, index)

  def _origin(
    self, name: str
  ) -> tuple[single_file_maps.Origin, tuple[int, ...]]:
    origin = self._origins[name]
    return origin, tuple(self._file.shape(self._prefix + origin.name))

  def _has_pixels(
    self, origin: single_file_maps.Origin, shape: tuple[int, ...]
  ) -> bool:
    return origin.is_pointwise and shape[2:] == (1, 1)
