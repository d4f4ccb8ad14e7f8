"""Keys and ids of examples, 32 and 64 bits long."""

import json

import jax
import numpy as np
import pytest

from dpo_jax import keys
from dpo_jax.train import loop, totals


def test_ids_of_64_bits_and_back():
  numbers = [0, 1, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1]
  words = keys.split_ids(np.array(numbers, np.uint64))
  assert words.dtype == np.uint32
  assert words[3].tolist() == [1, 0]
  assert keys.id_numbers(words) == numbers
  assert keys.id_numbers(np.array([7, 2**32 - 1], np.uint32)) == [7, 2**32 - 1]


def test_keys_of_ids_are_folded_word_by_word():
  key = jax.random.key(0)
  epochs = np.array([3, 4], np.uint32)
  fold = jax.random.fold_in
  single = keys.per_example(key, np.array([7, 8], np.uint32), epochs)
  wanted = [fold(fold(key, i), e) for i, e in ((7, 3), (8, 4))]
  words = keys.per_example(key, np.array([[1, 7], [7, 1]], np.uint32), epochs)
  wanted_words = [
    fold(fold(fold(key, high), low), e)
    for high, low, e in ((1, 7, 3), (7, 1, 4))
  ]
  for made, listed in ((single, wanted), (words, wanted_words)):
    assert made.shape == (2,)
    for one, other in zip(made, listed, strict=True):
      np.testing.assert_array_equal(
        jax.random.key_data(one), jax.random.key_data(other)
      )


def test_a_bad_step_names_ids_of_64_bits(tmp_path):
  window = loop._Window(tmp_path)
  window.rows[3] = {
    'id': keys.split_ids(np.array([2**40, 5], np.uint64)),
    'epoch': np.array([1, 2], np.uint32),
  }
  bad = totals.empty([]).replace(
    bad_step=np.int32(3), bad={'loss': True, 'norm/grads': False}
  )
  with pytest.raises(loop.NonFiniteLossError, match='ids 1099511627776, 5'):
    window.read(bad, None)
  record = json.loads((tmp_path / 'nonfinite_step_3.json').read_text())
  assert record['ids'] == [2**40, 5] and record['epochs'] == [1, 2]
