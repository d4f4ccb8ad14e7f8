"""Labels of the likes page: read, split, and dealt to networks."""

import json

import numpy as np
import pytest

from dpo_jax.data import labels


def _lines(folder):
  path = folder / 'likes.jsonl'
  return path, path.read_text().splitlines()


def test_a_folder_and_its_file_are_the_same(make_labels):
  folder = make_labels()
  found, counts = labels.read([str(folder)])
  assert found.count() == {'benign': 8, 'malign': 5}
  assert counts == {'rows': 13, 'unlabelled_dropped': 0, 'equal_dropped': 0}
  again, _ = labels.read([str(folder / 'likes.jsonl')])
  assert again.digest() == found.digest()
  # The order of the lines says nothing; a label does.
  path, lines = _lines(folder)
  path.write_text('\n'.join(reversed(lines)))
  assert labels.read([str(folder)])[0].digest() == found.digest()
  path.write_text('\n'.join(lines).replace('false', 'true', 1))
  assert labels.read([str(folder)])[0].digest() != found.digest()


def test_what_says_nothing_new_is_left_out_and_counted(make_labels):
  folder = make_labels()
  path, lines = _lines(folder)
  unsure = json.dumps(json.loads(lines[0]) | {'liked': None})
  path.write_text('\n'.join([unsure, *lines[1:], lines[1]]))
  more = make_labels('more', seed=1)
  found, counts = labels.read([str(folder), str(more)])
  assert len(found) == 12 + 13
  assert counts == {'rows': 27, 'unlabelled_dropped': 1, 'equal_dropped': 1}


def test_spoilt_labels_are_one_line(make_labels, tmp_path):
  folder = make_labels()
  path, lines = _lines(folder)
  other = json.loads(lines[0])
  for text, words in (
    ([*lines, json.dumps(other | {'liked': True})], 'has the other label'),
    (['{"caption": "", "winner": "a", "loser": "b"}'], 'holds pairs'),
    ([], 'no labels'),
    ([json.dumps(other | {'liked': 0.5})], 'likes.jsonl, row 0: liked'),
    ([json.dumps(other | {'image': 'no.png'})], r':0: cannot read .*no\.png'),
  ):
    path.write_text('\n'.join(text))
    with pytest.raises(ValueError, match=words) as error:
      labels.read([str(folder)])
    assert str(folder) in str(error.value) and '\n' not in str(error.value)
  with pytest.raises(ValueError, match=r'likes\.jsonl: no such file'):
    labels.read([str(tmp_path)])


def test_a_share_of_each_class_is_held_out(make_labels):
  found, _ = labels.read([str(make_labels(benign=20, malign=5))])
  train, held = labels.split(found, 0.2)
  assert held.count() == {'benign': 4, 'malign': 1}
  assert train.count() == {'benign': 16, 'malign': 4}
  assert sorted(train.names + held.names) == found.names
  assert labels.split(found, 0.01)[1].count() == {'benign': 1, 'malign': 1}
  assert labels.split(found, 0.0) == (found, found)
  rest, count = labels.leave_out(found, held)
  assert rest.names == train.names and count == 5
  few = [*np.flatnonzero(found.liked == 0)[:1], *np.flatnonzero(found.liked)]
  with pytest.raises(ValueError, match=r'holdout=0\.2: there are 1 malign'):
    labels.split(found.select(few), 0.2)


def test_networks_have_all_the_malign_and_benign_ones_of_their_own():
  liked = np.array([1, 0] * 10 + [1] * 30, np.float32)
  members = labels.draw(liked, networks=5, per_class=8, seed=3)
  assert members.shape == (50, 5)
  malign = members[liked == 0]
  assert (malign.sum(0) == 8).all() and (malign.all(1) == malign.any(1)).all()
  benign = members[liked == 1]
  # 40 for 5 times 8: none is two networks'.
  assert (benign.sum(0) == 8).all() and (benign.sum(1) == 1).all()
  fewer = labels.draw(liked, networks=2, per_class=8, seed=3)
  np.testing.assert_array_equal(fewer, members[:, :2])
  assert (labels.draw(liked, networks=5, per_class=8, seed=4) != members).any()
  # More than there are: round and round.
  dealt = labels.draw(liked, networks=5, per_class=10, seed=3)[liked == 1]
  assert (dealt.sum(0) == 10).all() and set(dealt.sum(1)) == {1, 2}
  most = labels.draw(liked, networks=1, per_class=0, seed=3)
  assert most[liked == 0].sum() == most[liked == 1].sum() == 10


def test_where_most_are_malign_the_malign_ones_are_dealt():
  liked = np.array([1, 0] * 10 + [0] * 30, np.float32)
  members = labels.draw(liked, networks=5, per_class=8, seed=3)
  benign, malign = members[liked == 1], members[liked == 0]
  assert (benign.sum(0) == 8).all() and (benign.all(1) == benign.any(1)).all()
  assert (malign.sum(0) == 8).all() and (malign.sum(1) == 1).all()
  one = labels.choose(liked, 'union', networks=4, per_class=10, seed=3)
  assert one.shape == (50, 1) and one.all()


def test_variants_choose_among_the_same_draws():
  liked = np.array([1, 0] * 10 + [1] * 30, np.float32)
  options = {'networks': 3, 'per_class': 5, 'seed': 0}
  whole = labels.choose(liked, 'ensemble', **options)
  assert whole.shape == (50, 3)
  single = labels.choose(liked, 'single', **options)
  np.testing.assert_array_equal(single, whole[:, :1])
  union = labels.choose(liked, 'union', **options)
  np.testing.assert_array_equal(union[:, 0], whole.any(1))
  assert union.sum() == 5 + 15
  with pytest.raises(ValueError, match='single, union, ensemble'):
    labels.choose(liked, 'all', **options)
  with pytest.raises(ValueError, match='per_class=11: there are 10 malign'):
    labels.draw(liked, networks=1, per_class=11, seed=0)
