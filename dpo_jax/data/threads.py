"""Threads that make the examples of a batch together."""

import concurrent.futures
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

Result = TypeVar('Result')
# glibc's largest block that it may take from its heap is 32 MB.
_HEAP_BYTES = 31 << 20


class Threads:
  """As many threads as there are cores."""

  def __init__(self):
    """Starts none before there is work."""
    self.count = os.cpu_count() or 1
    self._pool = concurrent.futures.ThreadPoolExecutor(self.count)
    keep_freed_memory()

  def starmap(
    self, function: Callable[..., Result], arguments: Iterable[tuple]
  ) -> list[Result]:
    """[function(*one) for one in arguments], a stretch of them a thread."""
    arguments = list(arguments)
    size = max(1, -(-len(arguments) // self.count))
    futures = [
      self._pool.submit(
        lambda some: [function(*one) for one in some],
        arguments[start : start + size],
      )
      for start in range(0, len(arguments), size)
    ]
    return [made for future in futures for made in future.result()]

  def close(self) -> None:
    """Lets the threads end."""
    self._pool.shutdown(wait=False, cancel_futures=True)


def keep_freed_memory() -> None:
  """Lets decoded pictures reuse memory that others left.

  glibc maps blocks above a threshold afresh and gives them back at once, a
  page fault for every 4 kB of a picture. It raises the threshold to the largest
  such block that was ever freed.
  """
  np.empty(_HEAP_BYTES, np.uint8)
