"""Reads and writes safetensors files as NumPy; refuses everything else.

Format: 8 bytes little-endian length, a JSON header, the data. The header is
checked here first, because an error must name the tensor; the safetensors
library then does its own checks (overlaps, holes) and reads.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

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
PICKLE_SUFFIXES = frozenset('.bin .pt .pth .ckpt .pkl .pickle'.split())
# The beginning of a zip (torch.save) and of a bare pickle, protocols 2 to 5.
PICKLE_STARTS = (b'PK\x03\x04', *(bytes([0x80, v]) for v in range(2, 6)))
MAX_HEADER = 100_000_000
HINT = (
  'it is a pickle, which can run code when opened; convert it to safetensors'
  ' (pipeline.save_pretrained(..., safe_serialization=True) in diffusers)'
)


def load(
  path: str | pathlib.Path, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
  """Tensors of a file by name, in the file's dtypes; only `names` if given.

  Raises:
    ValueError: names the file, and the tensor where there is one: a pickle,
      a truncated or malformed file, a missing name, a NaN or infinity.
  """
  path = pathlib.Path(path)
  header = _read_header(path)
  wanted = list(header) if names is None else list(names)
  for name in wanted:
    if name not in header:
      raise ValueError(f'{path}: no tensor {name!r} among {len(header)}')
  tensors = {}
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      for name in wanted:
        tensors[name] = file.get_tensor(name)
  except safetensors.SafetensorError as error:
    raise ValueError(f'{path}: malformed safetensors: {error}') from error
  for name, tensor in tensors.items():
    _check_finite(path, name, tensor)
  return tensors


def save(
  path: str | pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes tensors in their own dtypes; the same tensors, the same bytes.

  Raises:
    ValueError: a NaN or infinity, naming the tensor; nothing is written.
  """
  for name, tensor in tensors.items():
    _check_finite(path, name, tensor)
  # The library would write a transposed view in the wrong order.
  ready = {
    name: np.asarray(tensor, order='C') for name, tensor in tensors.items()
  }
  # Readers in PyTorch ask for this key.
  metadata = {'format': 'pt', **(metadata or {})}
  safetensors.numpy.save_file(ready, path, metadata=metadata)


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
  except ValueError as error:
    raise ValueError(f'{path}: header is not JSON: {error}') from error
  header.pop('__metadata__', None)
  for name, entry in header.items():
    _check_entry(path, name, entry, data_bytes=size - 8 - length)
  return header


def _check_entry(
  path: pathlib.Path, name: str, entry: Any, *, data_bytes: int
) -> None:
  try:
    dtype, shape = entry['dtype'], entry['shape']
    begin, end = entry['data_offsets']
    count = math.prod(shape)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path}: tensor {name!r}: bad header entry') from error
  if dtype not in DTYPES:
    raise ValueError(
      f'{path}: tensor {name!r} has dtype {dtype!r}; allowed:'
      f' {", ".join(DTYPES)}'
    )
  if end - begin != count * np.dtype(DTYPES[dtype]).itemsize:
    raise ValueError(
      f'{path}: tensor {name!r} of shape {shape} and dtype {dtype} cannot'
      f' take {end - begin} bytes'
    )
  if begin < 0 or end > data_bytes:
    raise ValueError(
      f'{path}: tensor {name!r} ends at byte {end} of {data_bytes} bytes of'
      ' data; the file is truncated, fetch it again'
    )


def _check_finite(path: Any, name: str, tensor: np.ndarray) -> None:
  # ml_dtypes.bfloat16 has kind 'V', so ask by exclusion.
  if tensor.dtype.kind in 'iub' or tensor.size == 0:
    return
  bad = tensor.size - np.count_nonzero(np.isfinite(tensor))
  if bad:
    raise ValueError(
      f'{path}: tensor {name!r} holds {bad} NaN or infinite values of'
      f' {tensor.size}'
    )
