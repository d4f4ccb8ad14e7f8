"""Rejection by a reward: what it dislikes is drawn again with other noise.

Kept is what scores at or above a threshold, the quantile q of log r over first
draws: of a generator as it is, about one of 1 - q draws is kept, which costs
1 / (1 - q) draws a picture. It is the baseline that guidance has to beat
(Yoon et al., 2023, section 4).
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt32

# (places of pictures [m], their noise numbers [m]) -> (images, log r [m]).
DrawFn = Callable[
  [Int[np.ndarray, ' m'], UInt32[np.ndarray, ' m']],
  tuple[UInt8[np.ndarray, 'm H W 3'], Float[np.ndarray, ' m']],
]
# An image and its log r.
Drawn = tuple[UInt8[np.ndarray, 'H W 3'], float]


@dataclasses.dataclass(frozen=True)
class Kept:
  """A picture that was accepted.

  Attributes:
    place: of the picture among those asked for.
    number: of its noise.
    tries: draws until it, this one counted.
  """

  place: int
  image: UInt8[np.ndarray, 'H W 3']
  log_reward: float
  number: int
  tries: int


def noise_number(seed: int, k: int) -> int:
  """What try k, from 0, of a picture draws its noise by; the first by `seed`.

  It hangs on nothing else, so that the same pictures are kept however many
  are drawn at once.
  """
  return zlib.crc32(f'{seed}/{k}'.encode()) if k else seed


def find_threshold(
  log_rewards: Float[np.ndarray, ' n'], quantile: float
) -> float:
  """log r at `quantile` (0 to 1) of draws.

  Raises ValueError where one of them is no number.
  """
  if not np.isfinite(log_rewards).all():
    raise ValueError('log r of a drawn picture is not finite; the reward broke')
  return float(np.quantile(np.float64(log_rewards), quantile))


def accept(
  draw: DrawFn,
  seeds: UInt32[np.ndarray, ' n'],
  *,
  threshold: float,
  tries: int,
  batch_size: int,
  first: Mapping[int, Drawn] | None = None,
) -> Iterator[list[Kept]]:
  """Rounds of draws and what each keeps, until all are kept or `tries` made.

  Of a picture the first try that is good enough is kept, although the last
  rounds draw several of its tries at once to fill their batch. `first` are
  first tries that were drawn before, by place.
  """
  made = dict.fromkeys(range(len(seeds)), 0)

  def judge(drawn):
    kept = []
    for (place, k), image, value in drawn:
      if place not in made:
        continue
      made[place] = k + 1
      if value >= threshold:
        number = noise_number(int(seeds[place]), k)
        kept.append(Kept(place, image, float(value), number, k + 1))
      if value >= threshold or k + 1 == tries:
        del made[place]
    return kept

  if first:
    yield judge(((place, 0), *known) for place, known in first.items())
  while made:
    asked = _fill(made, batch_size, tries)
    images, values = draw(
      np.array([place for place, _ in asked], np.int64),
      np.array(
        [noise_number(int(seeds[place]), k) for place, k in asked], np.uint32
      ),
    )
    yield judge(zip(asked, images, values, strict=True))


def _fill(
  made: Mapping[int, int], size: int, tries: int
) -> list[tuple[int, int]]:
  """Up to `size` (place, try): the next of each, then those after it."""
  asked = []
  for ahead in range(tries):
    for place, k in made.items():
      if len(asked) == size:
        return asked
      if k + ahead < tries:
        asked.append((place, k + ahead))
  return asked
