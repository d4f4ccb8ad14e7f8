"""Reads the config.json of a model into a frozen dataclass, strictly."""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

T = TypeVar('T')


def read(
  cls: Callable[..., T],
  options: Mapping[str, Any],
  *,
  fixed: Mapping[str, tuple],
  harmless: Collection[str],
) -> T:
  """Builds the dataclass `cls` from `options`; nothing is dropped silently.

  `fixed` names options that this implementation has for some values only, and
  those values; `harmless` names options that change no output. Keys that begin
  with an underscore are harmless too.

  Raises:
    ValueError: an unknown option, or a value that is not supported.
  """
  name = cls.__name__
  fields = {field.name for field in dataclasses.fields(cls)}
  kept = {}
  for key, value in options.items():
    if key in fields:
      kept[key] = _freeze(value)
    elif key in fixed:
      _check_fixed(name, key, value, fixed[key])
    elif key not in harmless and not key.startswith('_'):
      near = difflib.get_close_matches(key, [*fields, *fixed], n=1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise ValueError(
        f'{name}: unknown option {key!r} (value {value!r}){hint}'
      )
  return cls(**kept)


def check(condition: bool, owner: Any, option: str, allowed: str) -> None:
  """Raises ValueError naming the option, its value and what is allowed."""
  if not condition:
    raise ValueError(
      f'{type(owner).__name__}: {option}={getattr(owner, option)!r} is not'
      f' supported; allowed: {allowed}'
    )


def check_types(config: Any) -> None:
  """Checks the fields of a dataclass against their annotations.

  Covered are bool, int, float and tuple[int, ...]; counts are 0 or more,
  floats above 0. The rest is the caller's.

  Raises:
    ValueError: names the option, its value and what is allowed.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.type is bool:
      check(isinstance(value, bool), config, field.name, 'true or false')
    elif field.type is int:
      check(is_count(value), config, field.name, 'an integer, 0 or more')
    elif field.type is float:
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      check(number and value > 0, config, field.name, 'a number above 0')
    elif field.type == tuple[int, ...]:
      good = isinstance(value, tuple) and value
      good = good and all(is_count(v) and v > 0 for v in value)
      check(bool(good), config, field.name, 'a list of integers above 0')


def check_heads(config: Any) -> None:
  """Raises ValueError where hidden_size does not split into the heads."""
  heads = config.num_attention_heads
  check(
    heads > 0 and config.hidden_size % heads == 0,
    config,
    'num_attention_heads',
    f'a divisor of hidden_size={config.hidden_size}',
  )


def check_kinds(
  config: Any,
  blocks: Mapping[str, Collection[str]],
  others: Mapping[str, Collection[Any]],
) -> None:
  """Checks options that name kinds: `blocks` one a level, `others` one.

  Both map an option to what is known. The number of levels is that of
  block_out_channels. Raises ValueError as `check` does.
  """
  n = len(config.block_out_channels)
  for option, known in blocks.items():
    kinds = getattr(config, option)
    good = isinstance(kinds, tuple) and len(kinds) == n
    check(
      good and all(kind in tuple(known) for kind in kinds),
      config,
      option,
      f'{n} (as block_out_channels) of {", ".join(known)}',
    )
  for option, known in others.items():
    good = getattr(config, option) in tuple(known)
    check(good, config, option, ', '.join(map(repr, known)))


def spread(config: Any, option: str, length: int) -> None:
  """Turns one integer into one per block, in place, and checks the length."""
  value = getattr(config, option)
  if is_count(value):
    object.__setattr__(config, option, (value,) * length)
  else:
    good = isinstance(value, tuple) and len(value) == length
    good = good and all(is_count(item) for item in value)
    check(good, config, option, f'an integer or a list of {length} integers')


def spread_layers(config: Any, option: str, counts: tuple[int, ...]) -> None:
  """Turns integers into one per layer of each block, in place.

  Allowed are one integer, one per block, or lists of one per layer in place of
  a block's; `counts` is the number of layers of each block.
  """
  value, n = getattr(config, option), len(counts)
  blocks = (value,) * n if is_count(value) else value
  good = isinstance(blocks, tuple) and len(blocks) == n
  if good:
    blocks = tuple(
      (block,) * count if is_count(block) else block
      for block, count in zip(blocks, counts, strict=True)
    )
    good = all(
      isinstance(block, tuple) and len(block) == count
      for block, count in zip(blocks, counts, strict=True)
    ) and all(is_count(depth) for block in blocks for depth in block)
  allowed = f'an integer or a list of {n}, each an integer or a list of'
  check(good, config, option, f'{allowed} {counts} integers')
  object.__setattr__(config, option, blocks)


def is_count(value: Any) -> bool:
  """Is it an integer, 0 or more?"""
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _freeze(value: Any) -> Any:
  if isinstance(value, (list, tuple)):
    return tuple(_freeze(item) for item in value)
  return value


def _check_fixed(name: str, key: str, value: Any, allowed: tuple) -> None:
  # type() because True == 1 and False == 0 in Python.
  value = _freeze(value)
  for good in allowed:
    same_kind = isinstance(value, bool) == isinstance(good, bool)
    if same_kind and value == good:
      return
  shown = ', '.join(repr(good) for good in allowed)
  raise ValueError(
    f'{name}: {key}={value!r} is not supported; allowed: {shown}'
  )
