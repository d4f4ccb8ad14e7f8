"""Reads and writes safetensors files as NumPy; refuses everything else.

Format: 8 bytes little-endian length, a JSON header, the data. The header is
checked here first, because an error must name the tensor; the safetensors
library then does its own checks (overlaps, holes) and reads.
"""

import json
import math
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import safetensors

from dpo_jax import types

DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U8': np.uint8,
  'BOOL': np.bool_,
}
CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}
ORDER = tuple(
  np.dtype(DTYPES[code])
  for code in 'I64 F64 F32 I32 BF16 F16 I16 I8 U8 BOOL'.split()
)
PICKLE_SUFFIXES = frozenset('.bin .pt .pth .ckpt .pkl .pickle'.split())
# The beginning of a zip (torch.save) and of a bare pickle, protocols 2 to 5.
PICKLE_STARTS = (b'PK\x03\x04', *(bytes([0x80, v]) for v in range(2, 6)))
MAX_HEADER = 100_000_000
HINT = (
  'it is a pickle, which can run code when opened; convert it to safetensors'
  ' (pipeline.save_pretrained(..., safe_serialization=True) in diffusers)'
)
# The library maps files into memory and what was read stays resident until
# the file is closed; so it is closed and opened again after this many bytes.
WINDOW = 32 * 2**20

Index = tuple[slice, ...]


class Tensors(Protocol):
  """Named tensors of which parts can be read; nothing is read before.

  Attributes:
    source: where they come from, for error lines.
  """

  source: str

  def keys(self) -> Collection[str]:
    """All names."""
    ...

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one tensor."""
    ...

  def dtype(self, name: str) -> np.dtype:
    """The dtype of one tensor."""
    ...

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """One tensor, or the part of it in slices of step 1, one per axis."""
    ...


class TensorFiles:
  """Several safetensors files as one set of `Tensors`.

  All headers are checked at once; values are read, and searched for NaN and
  infinities, when they are asked for.
  """

  def __init__(
    self, paths: Sequence[str | pathlib.Path], *, source: str = ''
  ) -> None:
    """Reads the headers of `paths`; `source` is the first path by default.

    Raises:
      ValueError: names the file, and the tensor where there is one: a pickle,
        a truncated or malformed file, a tensor in two files.
    """
    self.paths = tuple(pathlib.Path(path) for path in paths)
    self.source = source or str(self.paths[0])
    self._entries: dict[str, tuple[pathlib.Path, dict[str, Any]]] = {}
    self._open: dict[pathlib.Path, Any] = {}
    self._resident = 0
    for path in self.paths:
      for name, entry in _read_header(path).items():
        if name in self._entries:
          other = self._entries[name][0].name
          raise ValueError(f'{path}: tensor {name!r} is in {other} too')
        self._entries[name] = path, entry
      # The library's own checks, now instead of at the first read.
      self._handle(path)
    self._close()

  def keys(self) -> Collection[str]:
    """All names, file by file."""
    return self._entries.keys()

  def path(self, name: str) -> pathlib.Path:
    """The file that holds a tensor; ValueError if none does."""
    return self._entry(name)[0]

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one tensor; ValueError if there is none."""
    return tuple(self._entry(name)[1]['shape'])

  def dtype(self, name: str) -> np.dtype:
    """The dtype of one tensor; ValueError if there is none."""
    return np.dtype(DTYPES[self._entry(name)[1]['dtype']])

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """One tensor, or the part of it in slices of step 1, one per axis.

    Raises:
      ValueError: names file and tensor: no such tensor, the file has changed
        since, or what was read holds a NaN or infinity.
    """
    path, _ = self._entry(name)
    file = self._handle(path)
    try:
      if index is None or self.shape(name) == ():
        tensor = file.get_tensor(name)
      else:
        tensor = file.get_slice(name)[tuple(index)]
    except safetensors.SafetensorError as error:
      raise ValueError(f'{path}: tensor {name!r}: {error}') from error
    self._resident += tensor.nbytes
    if self._resident > WINDOW:
      self._close()
    check_finite(path, name, tensor)
    return tensor

  def _entry(self, name: str) -> tuple[pathlib.Path, dict[str, Any]]:
    if name not in self._entries:
      count = len(self._entries)
      raise ValueError(f'{self.source}: no tensor {name!r} among {count}')
    return self._entries[name]

  def _handle(self, path: pathlib.Path) -> Any:
    if path not in self._open:
      try:
        self._open[path] = safetensors.safe_open(path, framework='numpy')
      except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f'{path}: malformed safetensors: {error}') from error
    return self._open[path]

  def _close(self) -> None:
    self._open.clear()
    self._resident = 0


class TensorArrays:
  """Arrays in memory as `Tensors`."""

  def __init__(
    self, arrays: Mapping[str, np.ndarray], *, source: str = 'tensors'
  ) -> None:
    self.source = source
    self._arrays = arrays

  def keys(self) -> Collection[str]:
    """All names."""
    return self._arrays.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one tensor."""
    return tuple(self._arrays[name].shape)

  def dtype(self, name: str) -> np.dtype:
    """The dtype of one tensor."""
    return np.dtype(self._arrays[name].dtype)

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """One tensor or a part of it, not copied."""
    array = np.asarray(self._arrays[name])
    return array if index is None else array[tuple(index)]


def load(
  path: str | pathlib.Path, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
  """Tensors of a file by name, in the file's dtypes; only `names` if given.

  Raises:
    ValueError: names the file, and the tensor where there is one: a pickle,
      a truncated or malformed file, a missing name, a NaN or infinity.
  """
  file = TensorFiles([path])
  wanted = file.keys() if names is None else names
  return {name: file.read(name) for name in wanted}


def load_metadata(path: str | pathlib.Path) -> dict[str, str]:
  """The strings that a file carries beside its tensors.

  Raises ValueError as `load` does.
  """
  TensorFiles([path])
  with safetensors.safe_open(path, framework='numpy') as file:
    return dict(file.metadata() or {})


def save(
  path: str | pathlib.Path,
  tensors: Tensors | Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
  *,
  dtype: types.DTypeLike | None = None,
) -> None:
  """Writes tensors in `dtype`, or their own; the same tensors, the same bytes.

  The bytes are those of the safetensors library. Tensors are read one at a
  time, so that memory is needed for the largest only; the file appears when
  it is whole.

  Raises:
    ValueError: a NaN or infinity (in `dtype`), naming the tensor, or a dtype
      that the format lacks; nothing is written.
  """
  path = pathlib.Path(path)
  if isinstance(tensors, Mapping):
    tensors = TensorArrays(tensors)
  kinds = {
    name: np.dtype(dtype or tensors.dtype(name)) for name in tensors.keys()
  }
  for name, kind in kinds.items():
    if kind not in CODES:
      raise ValueError(
        f'{path}: tensor {name!r} has dtype {str(kind)!r}; allowed:'
        f' {", ".join(map(str, CODES))}'
      )
  # The library's order: wide types first, so that each is aligned.
  names = sorted(kinds, key=lambda name: (ORDER.index(kinds[name]), name))
  draft = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    with draft.open('wb') as file:
      file.write(_make_header(tensors, names, kinds, metadata))
      for name in names:
        tensor = _cast(tensors.read(name), kinds[name])
        check_finite(path, name, tensor)
        file.write(tensor.reshape(-1).view(np.uint8))
    draft.replace(path)
  finally:
    draft.unlink(missing_ok=True)


def _make_header(
  tensors: Tensors,
  names: Sequence[str],
  kinds: Mapping[str, np.dtype],
  metadata: Mapping[str, str] | None,
) -> bytes:
  # Readers in PyTorch ask for this key.
  header: dict[str, Any] = {
    '__metadata__': {'format': 'pt', **(metadata or {})}
  }
  begin = 0
  for name in names:
    shape, kind = list(tensors.shape(name)), kinds[name]
    end = begin + math.prod(shape) * kind.itemsize
    header[name] = {
      'dtype': CODES[kind],
      'shape': shape,
      'data_offsets': [begin, end],
    }
    begin = end
  text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text


def _cast(tensor: np.ndarray, kind: np.dtype) -> np.ndarray:
  with np.errstate(over='ignore'):  # The caller refuses the infinities.
    return np.asarray(tensor, dtype=kind, order='C')


def _read_header(path: pathlib.Path) -> dict[str, Any]:
  if path.suffix in PICKLE_SUFFIXES:
    raise ValueError(f'{path}: refused by its suffix {path.suffix!r}: {HINT}')
  if not path.is_file():
    raise ValueError(f'{path}: no such file')
  size = path.stat().st_size
  with path.open('rb') as file:
    start = file.read(9)
    length = int.from_bytes(start[:8], 'little')
    if len(start) < 9 or start[8:] != b'{':
      if start.startswith(PICKLE_STARTS):
        raise ValueError(f'{path}: not safetensors but refused: {HINT}')
      raise ValueError(f'{path}: not a safetensors file ({size} bytes)')
    if length > min(MAX_HEADER, size - 8):
      raise ValueError(
        f'{path}: header of {length} bytes in a file of {size} bytes (at most'
        f' {MAX_HEADER}); truncated or malformed, fetch it again'
      )
    file.seek(8)
    text = file.read(length)
  try:
    header = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: header is not JSON: {error}') from error
  header.pop('__metadata__', None)
  for name, entry in header.items():
    _check_entry(path, name, entry, data_bytes=size - 8 - length)
  end = 0
  for name in sorted(header, key=lambda name: header[name]['data_offsets']):
    begin, stop = header[name]['data_offsets']
    if begin != end:
      raise ValueError(
        f'{path}: tensor {name!r} begins at byte {begin} of the data, should be'
        f' {end}: tensors overlap or leave a hole'
      )
    end = stop
  return header


def _check_entry(
  path: pathlib.Path, name: str, entry: Any, *, data_bytes: int
) -> None:
  try:
    dtype, shape = entry['dtype'], entry['shape']
    begin, end = entry['data_offsets']
    numbers = [begin, end, *shape]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path}: tensor {name!r}: bad header entry') from error
  if not all(type(number) is int and number >= 0 for number in numbers):
    raise ValueError(f'{path}: tensor {name!r}: bad header entry')
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise ValueError(
      f'{path}: tensor {name!r} has dtype {dtype!r}; allowed:'
      f' {", ".join(DTYPES)}'
    )
  if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
    raise ValueError(
      f'{path}: tensor {name!r} of shape {shape} and dtype {dtype} cannot'
      f' take {end - begin} bytes'
    )
  if end > data_bytes:
    raise ValueError(
      f'{path}: tensor {name!r} ends at byte {end} of {data_bytes} bytes of'
      ' data; the file is truncated, fetch it again'
    )


def check_finite(source: Any, name: str, tensor: np.ndarray) -> None:
  """Raises ValueError naming `source` and tensor if a value is not finite."""
  # ml_dtypes.bfloat16 has kind 'V', so ask by exclusion.
  if tensor.dtype.kind in 'iub' or tensor.size == 0:
    return
  bad = tensor.size - np.count_nonzero(np.isfinite(tensor))
  if bad:
    raise ValueError(
      f'{source}: tensor {name!r} holds {bad} NaN or infinite values of'
      f' {tensor.size}'
    )


def check_shapes(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  wanted: Mapping[str, tuple[int, ...]],
) -> None:
  """ValueError unless the tensors are those wanted, by name and shape."""
  found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  wrong = sorted(
    name
    for name in wanted.keys() | found.keys()
    if wanted.get(name) != found.get(name)
  )
  if wrong:
    name = wrong[0]
    raise ValueError(
      f'{path}: tensor {name!r} has shape {found.get(name)}, the config asks '
      f'for {wanted.get(name)} ({len(wrong)} tensors differ)'
    )
