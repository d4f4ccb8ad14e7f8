"""Batches from prepared folders: order, processes, mixtures, damage."""

import collections

import numpy as np
import pytest

from dpo_jax import keys
from dpo_jax.data import images, record_loader, records

OPTIONS = dict(
  batch_size=12, seed=3, resolution=4, random_crop=False, flip=False
)


def noise(seed, shape=(6, 9, 3)):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def take(iterator, count):
  batches = [next(iterator) for _ in range(count)]
  iterator.close()
  return batches


def make(source, tokenizer, **changes):
  return record_loader.make_record_loader(
    source, tokenizer, **(OPTIONS | changes)
  )


def assert_same(first, second):
  assert first.keys() == second.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.fixture
def folder(prepared, record):
  """Thirty pairs of two shards, filled with 2i and 2i + 1."""
  return prepared([record(i) for i in range(30)], lengths=[17, 13])


@pytest.fixture
def noisy(prepared, record, png):
  """Twelve pairs of one picture twice, 6 x 9 pixels."""
  rows = [
    record(
      i,
      image_0=png(noise(i)),
      image_1=png(noise(i), 'BMP'),
      sizes=np.array([[6, 9, 0, 0]] * 2, np.int32),
    )
    for i in range(12)
  ]
  return record_loader.open_source(prepared(rows, name='noisy'))


def test_batch_contents(folder, tokenizer):
  source = record_loader.open_source(folder)
  (batch,) = take(make(source, tokenizer), 1)
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    'images': ((12, 2, 4, 4, 3), 'uint8'),
    'sizes': ((12, 2, 4), 'int32'),
    'input_ids': ((12, 16), 'int32'),
    'id': ((12, 2), 'uint32'),
    'epoch': ((12,), 'uint32'),
    'label_confidence': ((12,), 'float32'),
    'substituted': ((12,), 'float32'),
  }
  assert not batch['substituted'].any()
  assert (batch['label_confidence'] == 1).all()
  for number, pixels, ids in zip(
    keys.id_numbers(batch['id']),
    batch['images'],
    batch['input_ids'],
    strict=True,
  ):
    i = number - 1
    # Image 0 wins where i is even.
    winner = 2 * i + i % 2
    assert (pixels[0] == winner).all()
    assert (pixels[1] == 4 * i + 1 - winner).all()
    wanted = tokenizer.encode([f'caption {i // 2}'])[0][0]
    np.testing.assert_array_equal(ids, wanted)


def test_ids_of_64_bits(prepared, record, tokenizer):
  numbers = [2**64 - 1, 2**63, 2**32, 2**32 - 1, 0, 5]
  rows = [record(i) | {'id': number} for i, number in enumerate(numbers)]
  source = record_loader.open_source(prepared(rows))
  (batch,) = take(make(source, tokenizer, batch_size=6), 1)
  assert sorted(keys.id_numbers(batch['id'])) == sorted(numbers)


def test_soft_labels_and_scores(prepared, record, tokenizer):
  labels = [1.0, 0.0, 0.75, 0.25, 0.5]
  rows = [
    record(i, label=label, score_x=np.array([i, -i - 1], np.float32))
    for i, label in enumerate(labels)
  ]
  source = record_loader.open_source(prepared(rows, scores=['score_x']))
  (batch,) = take(make(source, tokenizer, batch_size=5), 1)
  for number, confidence, scores, pixels in zip(
    keys.id_numbers(batch['id']),
    batch['label_confidence'],
    batch['score_x'],
    batch['images'],
    strict=True,
  ):
    i = number - 1
    assert confidence == max(labels[i], 1 - labels[i])
    swapped = labels[i] < 0.5
    assert scores.tolist() == ([-i - 1, i] if swapped else [i, -i - 1])
    assert pixels[0, 0, 0, 0] == 2 * i + swapped


@pytest.mark.parametrize('batch_size', [1, 4, 12, 30, 70])
def test_every_record_once_an_epoch(folder, tokenizer, batch_size):
  source = record_loader.open_source(folder)
  iterator = make(source, tokenizer, batch_size=batch_size)
  batches = take(iterator, -(-90 // batch_size))
  ids = [number for b in batches for number in keys.id_numbers(b['id'])][:90]
  epochs = np.concatenate([b['epoch'] for b in batches])[:90]
  assert epochs.tolist() == [0] * 30 + [1] * 30 + [2] * 30
  for epoch in range(3):
    assert sorted(ids[30 * epoch :][:30]) == list(range(1, 31))
  assert ids[:30] != ids[30:60] != ids[60:]
  # Over both shards, not one after the other.
  assert any(i > 17 for i in ids[:10]) and any(i <= 17 for i in ids[:10])


@pytest.mark.parametrize('count', [2, 3, 4, 6])
def test_processes_share_the_global_batch(noisy, tokenizer, count):
  options = {'random_crop': True, 'flip': True}
  want = take(make(noisy, tokenizer, **options), 3)
  parts = [
    take(
      make(noisy, tokenizer, process_index=i, process_count=count, **options),
      3,
    )
    for i in range(count)
  ]
  for k, batch in enumerate(want):
    joined = {
      name: np.concatenate([part[k][name] for part in parts]) for name in batch
    }
    assert_same(joined, batch)


@pytest.mark.parametrize('before, after', [(1, 6), (6, 4), (4, 3), (3, 1)])
def test_resume_on_another_number_of_processes(
  folder, tokenizer, before, after
):
  """Five batches, of which two before the stop: as if there were none."""
  source = record_loader.open_source(folder)
  want = take(make(source, tokenizer), 5)
  first = [
    make(source, tokenizer, process_index=i, process_count=before)
    for i in range(before)
  ]
  states = []
  for iterator in first:
    for _ in range(2):
      next(iterator)
    states.append(iterator.get_state())
    iterator.close()
  assert set(states) == {2}
  parts = []
  for i in range(after):
    later = make(source, tokenizer, process_index=i, process_count=after)
    later.set_state(states[0])
    parts.append(take(later, 3))
  for k, batch in enumerate(want[2:]):
    joined = {
      name: np.concatenate([part[k][name] for part in parts]) for name in batch
    }
    assert_same(joined, batch)


def test_crop_and_flip_are_shared_and_sizes_say_where(noisy, tokenizer):
  options = {'random_crop': True, 'flip': True}
  seen = collections.defaultdict(set)
  for batch in take(make(noisy, tokenizer, **options), 4):
    np.testing.assert_array_equal(batch['images'][:, 0], batch['images'][:, 1])
    for number, sizes, pixels in zip(
      keys.id_numbers(batch['id']), batch['sizes'], batch['images'], strict=True
    ):
      seen[number].add(pixels.tobytes())
      height, width, top, left = sizes[0]
      assert (height, width) == (6, 9)
      resized = images.resize_shorter(noise(number - 1), 4)
      crops = [
        picture[top : top + 4, left : left + 4]
        for picture in (resized, resized[:, ::-1])
      ]
      assert any(np.array_equal(crop, pixels[0]) for crop in crops)
  assert sum(len(crops) > 1 for crops in seen.values()) >= 10


def test_mixture_by_weight(folder, prepared, record, tokenizer):
  """3 : 1 of 30 and of 5 records; both in epochs of their own."""
  small = prepared(
    [record(i) | {'id': 100 + i} for i in range(5)], name='small'
  )
  sources = [
    record_loader.open_source(folder, weight=0.75),
    record_loader.open_source(small, weight=0.25),
  ]
  batches = take(make(sources, tokenizer, batch_size=12), 20)
  drawn = collections.defaultdict(list)
  for batch in batches:
    numbers = keys.id_numbers(batch['id'])
    assert sum(number >= 100 for number in numbers) == 3
    for number, epoch in zip(numbers, batch['epoch'].tolist(), strict=True):
      drawn[number >= 100].append((epoch, number))
  assert len(drawn[False]) == 180 and len(drawn[True]) == 60
  for which, count in ((False, 30), (True, 5)):
    found = drawn[which]
    assert len(set(found)) == len(found)
    assert [e for e, _ in found] == sorted(e for e, _ in found)
    assert found[-1][0] == len(found) // count - 1
  halves = [
    take(
      make(sources, tokenizer, batch_size=12, process_index=i, process_count=2),
      2,
    )
    for i in range(2)
  ]
  for k in range(2):
    joined = {
      name: np.concatenate([half[k][name] for half in halves])
      for name in batches[k]
    }
    assert_same(joined, batches[k])


@pytest.mark.parametrize('weights', [(1, 0), (1, -1), (1, np.nan), (1, 1e-9)])
def test_weights_that_make_no_mixture(folder, tokenizer, weights):
  sources = [record_loader.open_source(folder, weight=w) for w in weights]
  with pytest.raises(ValueError, match='weights'):
    make(sources, tokenizer)


def damage(path, needle):
  """Overwrites a few bytes of the record that holds `needle`."""
  data = bytearray(path.read_bytes())
  place = data.index(needle) + len(needle) // 2
  data[place : place + 4] = bytes(
    255 - byte for byte in data[place : place + 4]
  )
  path.write_bytes(data)


def test_damaged_record_is_replaced_and_counted(folder, tokenizer):
  """Of two damaged records none is shown; nothing else changes."""
  source = record_loader.open_source(folder)
  want = take(make(source, tokenizer, batch_size=30), 3)
  for i, shard in ((4, 0), (20, 1)):
    name = source.records.shards[shard].name
    damage(source.records.folder / name, source.records[i]['image_0'])
  hurt = record_loader.open_source(folder)
  bad = {
    i + 1 for i in range(30) if isinstance(_read(hurt.records, i), ValueError)
  }
  assert bad == {5, 21}
  got = take(make(hurt, tokenizer, batch_size=30), 3)
  stand_ins = []
  for old, new in zip(want, got, strict=True):
    assert new['substituted'].sum() == 2
    for row, number in enumerate(keys.id_numbers(old['id'])):
      if number not in bad:
        assert_same(
          {name: value[row] for name, value in old.items()},
          {name: value[row] for name, value in new.items()},
        )
        continue
      assert new['substituted'][row] == 1
      (other,) = keys.id_numbers(new['id'][row : row + 1])
      assert other not in bad
      # The stand-in is shown in full: its own pictures, not those of another.
      i = other - 1
      assert (new['images'][row, 0] == 2 * i + i % 2).all()
      assert (new['images'][row, 1] == 2 * i + 1 - i % 2).all()
      stand_ins.append(other)
  assert len(set(stand_ins)) > 2
  # The same ones for any process count.
  half = take(
    make(hurt, tokenizer, batch_size=30, process_index=1, process_count=2), 3
  )
  for k in range(3):
    assert_same(half[k], {name: a[15:] for name, a in got[k].items()})


def _read(source, index):
  try:
    return source[index]
  except records.DamagedRecordError as error:
    return error


def test_random_bytes_never_show_a_wrong_picture(folder, tokenizer):
  """Anything overwritten anywhere: what is shown is what was prepared."""
  source = record_loader.open_source(folder)
  path = source.records.folder / source.records.shards[0].name
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  replaced = 0
  for _ in range(25):
    data = bytearray(whole)
    at = int(rng.integers(len(data) - 16))
    data[at : at + 16] = rng.bytes(16)
    path.write_bytes(data)
    iterator = make(record_loader.open_source(folder), tokenizer, batch_size=30)
    try:
      (batch,) = take(iterator, 1)
    except ValueError as error:
      # The shard's own index was hit: more than ATTEMPTS in a row.
      assert 'in a row are damaged' in str(error)
      iterator.close()
      continue
    replaced += batch['substituted'].sum()
    for number, pixels in zip(
      keys.id_numbers(batch['id']), batch['images'], strict=True
    ):
      i = number - 1
      assert (pixels[0] == 2 * i + i % 2).all()
      assert (pixels[1] == 2 * i + 1 - i % 2).all()
  assert replaced > 0


def test_pictures_and_labels_that_are_none(prepared, record, tokenizer):
  rows = [record(i) for i in range(6)]
  rows[2]['image_1'] = b'nonsense'
  rows[4]['label'] = float('nan')
  source = record_loader.open_source(prepared(rows))
  (batch,) = take(make(source, tokenizer, batch_size=6), 1)
  assert batch['substituted'].sum() == 2
  assert not {3, 5} & set(keys.id_numbers(batch['id']))


def test_nothing_but_damage_stops(prepared, record, tokenizer):
  rows = [record(i, image_0=b'nonsense') for i in range(3)]
  source = record_loader.open_source(prepared(rows))
  iterator = make(source, tokenizer)
  with pytest.raises(ValueError, match='16 records in a row are damaged'):
    next(iterator)
  iterator.close()


def test_sources_that_do_not_go_together(folder, prepared, record, tokenizer):
  plain = record_loader.open_source(folder)
  rows = [record(0, score_x=np.zeros(2, np.float32))]
  scored = record_loader.open_source(
    prepared(rows, name='scored', scores=['score_x'])
  )
  with pytest.raises(ValueError, match='data sets that are mixed have the'):
    make([plain, scored], tokenizer)
  with pytest.raises(ValueError, match='no tokenizer'):
    make(plain, None)
  with pytest.raises(ValueError, match='no examples to load'):
    make([], tokenizer)
