"""Order, epochs, resume, process slices and augmentation of batches."""

import numpy as np
import pytest

from dpo_jax.data import images as images_lib
from dpo_jax.data import loader
from dpo_jax.data import pairs as pairs_lib

OPTIONS = dict(
  batch_size=4, seed=3, resolution=4, random_crop=False, flip=False
)


def noise(seed, shape=(6, 9, 3)):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def pairs(write, row):
  """Ten pairs, image 0 preferred, filled with 2i and 2i + 1."""
  return pairs_lib.read_parquet(write([row(i) for i in range(10)]))


@pytest.fixture
def noisy(write, row, png):
  """Six pairs of two equal pictures in different files' bytes."""
  rows = []
  for i in range(6):
    picture = noise(i)
    rows.append(row(i, jpg_0=png(picture), jpg_1=png(picture, 'BMP')))
  return pairs_lib.read_parquet(write(rows))


def take(iterator, count):
  batches = [next(iterator) for _ in range(count)]
  iterator.close()
  return batches


def assert_same(first, second):
  assert first.keys() == second.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_batch_contents(pairs, tokenizer):
  (batch,) = take(loader.make_pair_loader(pairs, tokenizer, **OPTIONS), 1)
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    'images': ((4, 2, 4, 4, 3), 'uint8'),
    'sizes': ((4, 2, 4), 'int32'),
    'input_ids': ((4, 16), 'int32'),
    'id': ((4,), 'uint32'),
    'epoch': ((4,), 'uint32'),
  }
  rows = [pairs.ids.tolist().index(i) for i in batch['id']]
  for row, pixels, ids in zip(
    rows, batch['images'], batch['input_ids'], strict=True
  ):
    assert (pixels[0] == 2 * row).all()
    assert (pixels[1] == 2 * row + 1).all()
    np.testing.assert_array_equal(
      ids, tokenizer.encode([pairs.captions[row]])[0][0]
    )


@pytest.mark.parametrize('batch_size', [1, 3, 4, 10, 25])
def test_every_example_once_an_epoch(pairs, tokenizer, batch_size):
  options = OPTIONS | {'batch_size': batch_size}
  iterator = loader.make_pair_loader(pairs, tokenizer, **options)
  batches = take(iterator, -(-30 // batch_size))
  ids = np.concatenate([b['id'] for b in batches])[:30].reshape(3, 10)
  epochs = np.concatenate([b['epoch'] for b in batches])[:30].reshape(3, 10)
  for epoch in range(3):
    assert sorted(ids[epoch]) == sorted(pairs.ids)
    assert (epochs[epoch] == epoch).all()
  assert not np.array_equal(ids[0], ids[1])
  assert not np.array_equal(ids[1], ids[2])


def test_order_hangs_on_the_seed_alone(pairs, tokenizer):
  def order(seed):
    options = OPTIONS | {'seed': seed, 'batch_size': 10}
    iterator = loader.make_pair_loader(pairs, tokenizer, **options)
    return [tuple(b['id']) for b in take(iterator, 2)]

  assert order(0) == order(0)
  # Grain adds the epoch to its seed; neighbouring seeds must not overlap.
  assert not set(order(0)) & set(order(1))
  # A golden, from grain 0.2.18 through this loader: another order would break
  # the resuming of every run.
  rows = [pairs.ids.tolist().index(i) for i in order(0)[0]]
  assert rows == [5, 1, 3, 2, 7, 8, 4, 9, 6, 0]


def test_resume_by_integer_state(noisy, tokenizer):
  options = OPTIONS | {'random_crop': True, 'flip': True}
  iterator = loader.make_pair_loader(noisy, tokenizer, **options)
  assert iterator.get_state() == 0
  want = []
  for k in range(6):
    # Batches made ahead do not count.
    assert iterator.get_state() == k
    assert type(iterator.get_state()) is int
    want.append(next(iterator))
  for k in (5, 0, 2):
    iterator.set_state(k)
    assert iterator.get_state() == k
    assert_same(next(iterator), want[k])
    assert iterator.get_state() == k + 1
  iterator.close()
  fresh = loader.make_pair_loader(noisy, tokenizer, **options)
  fresh.set_state(3)
  for batch, later in zip(want[3:], take(fresh, 3), strict=True):
    assert_same(batch, later)


def test_far_state(pairs, tokenizer):
  iterator = loader.make_pair_loader(pairs, tokenizer, **OPTIONS)
  iterator.set_state(1_000_000)
  (batch,) = take(iterator, 1)
  assert batch['epoch'].tolist() == [400_000] * 4


@pytest.mark.parametrize('state', [-1, 1.5, '3', None, True, {'next_index': 2}])
def test_nonsense_state(pairs, tokenizer, state):
  iterator = loader.make_pair_loader(pairs, tokenizer, **OPTIONS)
  with pytest.raises(ValueError, match='must be a number of batches'):
    iterator.set_state(state)
  iterator.close()


@pytest.mark.parametrize('count', [2, 4])
def test_processes_share_the_global_batch(noisy, tokenizer, count):
  options = OPTIONS | {'random_crop': True, 'flip': True}
  want = take(loader.make_pair_loader(noisy, tokenizer, **options), 4)
  parts = [
    take(
      loader.make_pair_loader(
        noisy, tokenizer, process_index=i, process_count=count, **options
      ),
      4,
    )
    for i in range(count)
  ]
  for k, batch in enumerate(want):
    joined = {
      name: np.concatenate([part[k][name] for part in parts]) for name in batch
    }
    assert_same(joined, batch)


def test_crop_and_flip_are_shared_and_new_each_epoch(noisy, tokenizer):
  options = OPTIONS | {'random_crop': True, 'flip': True, 'batch_size': 6}
  batches = take(loader.make_pair_loader(noisy, tokenizer, **options), 4)
  seen = {}
  for batch in batches:
    np.testing.assert_array_equal(batch['images'][:, 0], batch['images'][:, 1])
    for example, pixels in zip(batch['id'], batch['images'], strict=True):
      seen.setdefault(int(example), set()).add(pixels.tobytes())
  # 3 offsets times 2 flips each: four epochs seldom draw one only.
  assert sum(len(crops) > 1 for crops in seen.values()) >= 5


def test_sizes_say_where_the_crop_lies(noisy, tokenizer):
  """6 x 9 pixels cut to 4 x 4: from the sizes the crop is found again."""
  options = OPTIONS | {'random_crop': True, 'flip': True, 'batch_size': 6}
  originals = {int(i): noise(row) for row, i in enumerate(noisy.ids)}
  flips = 0
  for batch in take(loader.make_pair_loader(noisy, tokenizer, **options), 3):
    for example, sizes, pixels in zip(
      batch['id'], batch['sizes'], batch['images'], strict=True
    ):
      np.testing.assert_array_equal(sizes[0], sizes[1])
      height, width, top, left = sizes[0]
      assert (height, width) == (6, 9)
      resized = images_lib.resize_shorter(originals[int(example)], 4)
      seen = [
        picture[top : top + 4, left : left + 4]
        for picture in (resized, resized[:, ::-1])
      ]
      matches = [np.array_equal(crop, pixels[0]) for crop in seen]
      assert any(matches)
      flips += matches[1]
  assert 0 < flips < 18


def test_augmentation_does_not_hang_on_batch_or_row(noisy, tokenizer):
  """Another batch size or row order leaves every example its crops."""

  def draws(pairs, batch_size):
    options = OPTIONS | {'random_crop': True, 'flip': True}
    options['batch_size'] = batch_size
    iterator = loader.make_pair_loader(pairs, tokenizer, **options)
    return {
      (int(i), int(e)): pixels.tobytes()
      for b in take(iterator, 12 // batch_size)
      for i, e, pixels in zip(b['id'], b['epoch'], b['images'], strict=True)
    }

  want = draws(noisy, 6)
  assert len(want) == 12
  assert draws(noisy, 2) == want
  assert draws(noisy.select(range(5, -1, -1)), 6) == want


def test_without_a_cache_nothing_changes(noisy, tokenizer, monkeypatch):
  options = OPTIONS | {'random_crop': True, 'flip': True}
  want = take(loader.make_pair_loader(noisy, tokenizer, **options), 4)
  monkeypatch.setattr(loader, 'CACHE_BYTES', 0)
  got = take(loader.make_pair_loader(noisy, tokenizer, **options), 4)
  for first, second in zip(want, got, strict=True):
    assert_same(first, second)


def test_small_data_is_decoded_once(write, row, tokenizer, monkeypatch):
  pairs = pairs_lib.read_parquet(write([row(i) for i in range(100, 110)]))
  # Threads of the tests before may still be finishing other pictures.
  ours = {*pairs.winners, *pairs.losers}
  decoded = []
  decode = loader.images_lib.decode

  def counting(data):
    if data in ours:
      decoded.append(data)
    return decode(data)

  monkeypatch.setattr(loader.images_lib, 'decode', counting)
  monkeypatch.setattr(loader, 'PREFETCH_THREADS', 1)
  take(loader.make_pair_loader(pairs, tokenizer, **OPTIONS), 10)
  assert len(decoded) == 20


def test_single_images(write, row, tokenizer):
  images = pairs_lib.read_images(write([row(i) for i in range(3)]))
  options = OPTIONS | {'batch_size': 6}
  first, second = take(
    loader.make_image_loader(images, tokenizer, **options), 2
  )
  assert first['images'].shape == (6, 4, 4, 3)
  assert first['label'].dtype == np.int32
  assert sorted(first['id']) == sorted(second['id']) == sorted(images.ids)
  for pixels, label, ids in zip(
    first['images'], first['label'], first['input_ids'], strict=True
  ):
    value = int(pixels[0, 0, 0])
    assert (pixels == value).all()
    # Image 0 of every row is of style x, image 1 of style y.
    assert label == value % 2
    np.testing.assert_array_equal(
      ids, tokenizer.encode([f'caption {value // 2}'])[0][0]
    )


def test_damaged_image_names_the_example(write, row, tokenizer):
  pairs = pairs_lib.read_parquet(write([row(0), row(1, jpg_1=b'nonsense')]))
  iterator = loader.make_pair_loader(pairs, tokenizer, **OPTIONS)
  message = f"example {pairs.ids[1]}, caption 'caption 1': cannot decode"
  with pytest.raises(ValueError, match=message):
    next(iterator)
  iterator.close()


def test_sizes_that_do_not_fit(pairs, tokenizer):
  def make(**changes):
    loader.make_pair_loader(pairs, tokenizer, **(OPTIONS | changes))

  with pytest.raises(ValueError, match='positive multiple of the 3 processes'):
    make(process_count=3)
  with pytest.raises(ValueError, match='positive multiple'):
    make(batch_size=0)
  with pytest.raises(ValueError, match='process index 2: must be below 2'):
    make(process_index=2, process_count=2)
  with pytest.raises(ValueError, match='no examples'):
    loader.make_pair_loader(pairs.select([]), tokenizer, **OPTIONS)
