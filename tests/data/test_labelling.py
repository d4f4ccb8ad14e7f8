"""Winners by scores, consensus and ranking, from columns beside the records."""

import numpy as np
import prepared_pairs
import pytest

from dpo_jax import datasets
from dpo_jax.data import labelling, record_loader, records, score_files

# Pairs 2 i and 2 i + 1 share a caption; picture 0 wins where i is even.
N = 12
GAPS = np.array([3, 1, -2, 2, 0, -1, -5, 4, 1, 1, 2, -3], np.float32)


def add_column(folder, name, values):
  given = records.open_folder(folder)
  writer = score_files.Writer(given, 'pairs', name, source={'name': name})
  writer.add(0, np.asarray(values, np.float32))
  writer.finish()


def two(gaps):
  gaps = np.asarray(gaps, np.float32)
  return np.stack([gaps, np.zeros_like(gaps)], axis=1)


@pytest.fixture
def folder(tmp_path):
  rows = [prepared_pairs.make_pair(i) for i in range(N)]
  folder = prepared_pairs.write(tmp_path / 'pairs', rows, lengths=[5, 7])
  add_column(folder, 'label', [row['label'] for row in rows])
  add_column(folder, 'score_a', two(GAPS))
  # Agrees with the label everywhere, and nowhere.
  signs = np.where(np.arange(N) % 2 == 0, 1, -1)
  add_column(folder, 'score_b', two(signs))
  add_column(folder, 'score_c', two(-signs))
  return folder


def open_with(folder, **options):
  source = record_loader.open_source(folder)
  made = labelling.Labelling(**options)
  return labelling.with_columns(source, made)[0], made


def captions_of(n=N):
  return np.arange(n, dtype=np.uint64) // 2


def test_the_larger_score_wins_and_ties_are_dropped(folder):
  source, made = open_with(folder, winner='score_a')
  chosen, counts = labelling.choose(source, made, captions_of())
  assert counts == {'score_ties_dropped': 1}
  kept = np.flatnonzero(GAPS != 0)
  np.testing.assert_array_equal(chosen.rows, kept)
  loader = record_loader.make_record_loader(
    chosen,
    Words(),
    batch_size=len(kept),
    seed=0,
    resolution=16,
    random_crop=False,
    flip=False,
  )
  batch = next(loader)
  loader.close()
  assert (batch['score_a'][:, 0] > batch['score_a'][:, 1]).all()
  assert (batch['label_confidence'] == 1).all()
  plain = record_loader.make_record_loader(
    record_loader.open_source(folder).select(kept),
    Words(),
    batch_size=len(kept),
    seed=0,
    resolution=16,
    random_crop=False,
    flip=False,
  )
  before = next(plain)
  plain.close()
  order = np.argsort(before['id'][:, 1])
  mine = np.argsort(batch['id'][:, 1])
  swapped = (GAPS[kept] > 0) != (kept % 2 == 0)
  for now, then, change in zip(mine, order, swapped, strict=True):
    sides = batch['images'][now]
    wanted = before['images'][then]
    np.testing.assert_array_equal(sides, wanted[::-1] if change else wanted)


class Words:
  """A tokenizer of one token."""

  def encode(self, captions):
    return np.zeros((len(captions), 1), np.int32), 0


def test_consensus_keeps_what_enough_judges_confirm(folder):
  names = ('score_a', 'score_b', 'score_c')
  labels = np.where(np.arange(N) % 2 == 0, 1, -1)
  # Of b and c always one agrees; a decides whether it is two.
  two_agree = np.flatnonzero(GAPS * labels > 0)
  source, made = open_with(folder, consensus=names, min_agree=2)
  chosen, counts = labelling.choose(source, made, captions_of())
  np.testing.assert_array_equal(chosen.rows, two_agree)
  dropped = N - len(two_agree)
  assert counts == {'pairs_without_consensus_dropped': dropped}
  source, made = open_with(folder, consensus=names, min_agree=1)
  chosen, counts = labelling.choose(source, made, captions_of())
  assert chosen.rows is None and len(chosen) == N
  source, made = open_with(folder, consensus=names, min_agree=3)
  with pytest.raises(ValueError, match='no pair is left of 12'):
    labelling.choose(source, made, captions_of())


@pytest.mark.parametrize('most', [1, 2])
def test_of_a_caption_the_largest_gaps_are_kept(folder, most):
  source, made = open_with(folder, winner='score_a', per_caption=most)
  captions = np.arange(N, dtype=np.uint64) // 4
  chosen, counts = labelling.choose(source, made, captions)
  wanted = []
  for group in range(3):
    rows = [i for i in range(4 * group, 4 * group + 4) if GAPS[i]]
    wanted += sorted(rows, key=lambda i: (-abs(GAPS[i]), i))[:most]
  np.testing.assert_array_equal(chosen.rows, sorted(wanted))
  assert counts['pairs_beyond_per_caption_dropped'] == N - 1 - len(wanted)


def test_held_out_pairs_keep_their_labels(folder):
  def open_data(**options):
    return datasets.open_prepared(
      [str(folder)], holdout=0.4, labels=labelling.Labelling(**options)
    )

  plain = open_data()
  data = open_data(winner='score_a')
  assert [source.winner for source in data.held] == ['']
  assert len(data.held[0]) == len(plain.held[0])
  (source,) = data.train
  assert source.winner == 'score_a'
  assert data.counts['training_pairs'] == len(source)
  assert (
    plain.counts['training_pairs']
    == len(source) + data.counts['score_ties_dropped']
  )
  # Other winners are other data.
  prints = {
    plain.fingerprint,
    data.fingerprint,
    open_data(winner='score_b').fingerprint,
    open_data(consensus=('score_b',), min_agree=1).fingerprint,
  }
  assert len(prints) == 4
  assert open_data().fingerprint == plain.fingerprint


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'consensus': ('score_a',)}, 'data.min_agree=0: says how many'),
    ({'consensus': ('score_a',), 'min_agree': 2}, 'names 1 judges'),
    ({'per_caption': 1}, r'data\.per_caption=1: keeps .* name that'),
  ],
)
def test_settings_that_contradict_each_other(options, words):
  with pytest.raises(ValueError, match=words):
    labelling.Labelling(**options)


def test_a_column_that_is_not_there_is_named(folder):
  with pytest.raises(ValueError, match=r'no score_x \(there are: score_a, '):
    open_with(folder, winner='score_x')
  with pytest.raises(ValueError, match='likes have no winner'):
    datasets.open_prepared(
      [str(folder)],
      kind='likes',
      holdout=0.4,
      labels=labelling.Labelling(winner='score_a'),
    )
