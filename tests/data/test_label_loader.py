"""Copies of labels, and batches of them."""

import numpy as np
import pytest

from dpo_jax.data import label_copies, label_loader, labels

COPIES = label_copies.Copies(4, rotation=20.0, crop=0.2, colour=0.3)
LOADER = {
  'batch_size': 6,
  'seed': 1,
  'resolution': 8,
  'random_crop': False,
  'flip': False,
}


def _change(pixels, copies=COPIES, seed=0, name='a', copy=1):
  return label_copies.change(pixels, copies, seed=seed, name=name, copy=copy)


def test_a_copy_hangs_on_seed_name_and_number_alone():
  pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  np.testing.assert_array_equal(_change(pixels, copy=0), pixels)
  made = _change(pixels)
  np.testing.assert_array_equal(_change(pixels), made)
  for other in ({'copy': 2}, {'name': 'b'}, {'seed': 1}):
    assert (_change(pixels, **other) != made).any()


def test_each_change_does_what_it_says():
  # A bar on a ground of one colour.
  pixels = np.full((32, 32, 3), (200, 30, 60), np.uint8)
  pixels[4:28, 14:18] = 255
  for name, amount in (('rotation', 20.0), ('crop', 0.3), ('colour', 0.3)):
    made = [
      _change(pixels, label_copies.Copies(9, **{name: amount}), copy=copy)
      for copy in range(1, 9)
    ]
    assert all((one != pixels).any() and one.dtype == np.uint8 for one in made)
    if name == 'rotation':
      # No corner is black: what comes in has the ground's colour.
      assert all((one[0, 0] == pixels[0, 0]).all() for one in made)
    if name == 'crop':
      areas = [(one[..., 1] > 127).sum() for one in made]
      assert min(areas) >= (pixels[..., 1] > 127).sum()
    if name == 'colour':
      # Nothing moves.
      assert all((one == one[4:28, 14:18].max()).any() for one in made)
      assert all((one[0] == one[0, 0]).all() for one in made)


@pytest.fixture
def found(make_labels):
  return labels.read([str(make_labels())])[0]


def _examples(found, *, copies=COPIES, paired=False, most=0):
  members = labels.draw(found.liked, networks=2, per_class=3, seed=0)
  return label_loader.make_examples(
    found, members, copies=copies, paired=paired, seed=0, most=most
  )


def _take(examples, count, start=0, **options):
  loader = label_loader.make_label_loader(examples, None, **LOADER | options)
  loader.set_state(start)
  batches = [next(loader) for _ in range(count)]
  assert loader.get_state() == start + count
  loader.close()
  return batches


def test_batches_go_on_from_a_number(found):
  examples = _examples(found)
  # 3 malign and 2 times 3 benign, 4 copies of each.
  assert len(examples) == 9 * 4
  batches = _take(examples, 8)
  for a, b in zip(batches[5:], _take(examples, 3, start=5), strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
  rows = np.concatenate([batch['row'] for batch in batches[:6]])
  assert sorted(rows) == list(range(36))
  ids = np.concatenate([batch['id'] for batch in batches[:6]])
  assert len(set(ids)) == 36
  for batch in batches:
    places = examples.rows[batch['row'], 0]
    np.testing.assert_array_equal(batch['liked'], found.liked[places])
    np.testing.assert_array_equal(batch['members'], examples.members[places])
    # A white square is what malign is, in every copy.
    white = (batch['images'][:, 3:5, 3:5] > 128).all((1, 2, 3))
    np.testing.assert_array_equal(white, batch['liked'] == 0)
  # Two processes have the halves of it.
  halves = [
    _take(examples, 1, process_index=i, process_count=2)[0] for i in range(2)
  ]
  for name in batches[0]:
    np.testing.assert_array_equal(
      np.concatenate([half[name] for half in halves]), batches[0][name]
    )


def test_copies_stay_and_flips_are_new_in_each_epoch(found):
  examples = _examples(found)

  def by_row(batches):
    return {
      row: image
      for batch in batches
      for row, image in zip(batch['row'], batch['images'], strict=True)
    }

  first, second = by_row(_take(examples, 6)), by_row(_take(examples, 6, 6))
  assert all((first[row] == second[row]).all() for row in first)
  flipped = by_row(_take(examples, 6, flip=True))
  again = by_row(_take(examples, 6, 6, flip=True))
  assert any((flipped[row] != again[row]).any() for row in first)


def test_pairs_are_of_a_benign_and_a_malign_label_of_one_network(found):
  examples = _examples(found, paired=True, copies=label_copies.Copies())
  assert examples.paired and len(examples) == 2 * 3 * 3
  (batch,) = _take(examples, 1, batch_size=18)
  assert 'liked' not in batch and batch['images'].shape == (18, 2, 8, 8, 3)
  white = (batch['images'][:, :, 3:5, 3:5] == 255).all((2, 3, 4))
  np.testing.assert_array_equal(white, [[False, True]] * 18)
  assert (batch['members'].sum(1) == 1).all()
  assert len(_examples(found, paired=True, most=4)) == 4 * COPIES.count


def test_a_spoilt_picture_is_named(found):
  found.images[0] = b'no picture'
  with pytest.raises(ValueError, match=r"label 0, caption 'no .*cannot decode"):
    _take(_examples(found), 6)
