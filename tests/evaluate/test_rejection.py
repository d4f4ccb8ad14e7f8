"""Rejection: the first try that is good enough, whatever the batch."""

import numpy as np
import pytest

from dpo_jax.evaluate import rejection

SEEDS = np.array([3, 5, 8, 13, 21], np.uint32)


def _draw(places, numbers):
  """A picture that holds its noise number, and a log r that follows from it."""
  assert len(places) == len(numbers)
  images = np.array(numbers, np.uint32).reshape(-1, 1, 1, 1)
  return images, -np.float32(numbers % 100) / 10


def _accept(batch_size, **options):
  rounds = []

  def draw(places, numbers):
    rounds.append(len(places))
    return _draw(places, numbers)

  given = {'threshold': -2.0, 'tries': 50} | options
  kept = rejection.accept(draw, SEEDS, batch_size=batch_size, **given)
  found = sorted((one for some in kept for one in some), key=lambda k: k.place)
  return found, rounds


def test_the_first_try_above_the_threshold_is_kept():
  found, rounds = _accept(2)
  assert [one.place for one in found] == [0, 1, 2, 3, 4]
  assert max(rounds) <= 2
  for one in found:
    seed = int(SEEDS[one.place])
    scores = [
      -(rejection.noise_number(seed, k) % 100) / 10 for k in range(one.tries)
    ]
    assert scores[-1] >= -2.0 and max([-9.9, *scores[:-1]]) < -2.0
    assert one.log_reward == pytest.approx(scores[-1])
    assert one.number == one.image.item()
    assert one.number == rejection.noise_number(seed, one.tries - 1)
  assert found[0].number == 3 and found[4].tries > 1
  for other in (1, 5, 16):
    again, _ = _accept(other)
    assert [(o.number, o.tries) for o in again] == [
      (o.number, o.tries) for o in found
    ]


def test_what_was_drawn_before_is_not_drawn_again():
  images, scores = _draw(np.arange(5), SEEDS)
  first = dict(enumerate(zip(images, scores.tolist(), strict=True)))
  found, rounds = _accept(1, first=first)
  whole, all_rounds = _accept(1)
  assert [one.number for one in found] == [one.number for one in whole]
  assert sum(all_rounds) - sum(rounds) == 5


def test_tries_come_to_an_end():
  found, rounds = _accept(4, tries=3, threshold=0.5)
  assert found == [] and sum(rounds) == 15


def test_the_threshold_is_a_quantile():
  assert rejection.find_threshold(np.float32([-4, -3, -2, -1, 0]), 0.25) == -3.0
  with pytest.raises(ValueError, match='not finite'):
    rejection.find_threshold(np.float32([-4, np.nan]), 0.25)
