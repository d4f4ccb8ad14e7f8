"""python -m dpo_jax.tools.label: scores beside the records, and a report."""

import json

import clip_folder
import numpy as np
import prepared_folder
import pytest

from dpo_jax import scoring
from dpo_jax.data import images as images_lib
from dpo_jax.data import records, score_files
from dpo_jax.evaluate import agreement, scorers
from dpo_jax.tools import arguments, label

PAIRS = 10


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  return clip_folder.write(tmp_path_factory.mktemp('clip') / 'c', head=True)


@pytest.fixture
def folder(tmp_path):
  rows = [prepared_folder.make_record(i) for i in range(PAIRS)]
  return prepared_folder.write(tmp_path / 'pairs', rows, lengths=[6, 4])


def run(folder, *words):
  label.main([f'--data={folder}', '--batch=8', '--chunk=4', *words])


def read(folder, name, kind='pairs'):
  given = records.open_folder(folder, kind=kind)
  return score_files.read(given, kind, name)[1]


def test_every_picture_is_scored_once(folder, weights, capsys):
  run(folder, f'--scorers=pickscore={weights},aesthetic={weights}', '--json')
  report = json.loads(capsys.readouterr().out)
  given = records.open_folder(folder)
  judge = scoring.open_scorer(
    'pickscore', str(weights), mesh=label.sharding.make_mesh(), batch_size=8
  )
  wanted = np.stack(
    [
      judge.score(
        [images_lib.decode(record[f'image_{side}']) for record in given],
        [record['caption'].decode() for record in given],
      )
      for side in range(2)
    ],
    axis=1,
  )
  found = read(folder, 'score_pickscore')
  # Of logit scales of 14.
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  np.testing.assert_array_equal(
    read(folder, 'label'), np.arange(PAIRS, dtype=np.float32) % 2
  )
  agree = (found[:, 0] > found[:, 1]) == (np.arange(PAIRS) % 2 == 1)
  entry = report['agreement_with_labels']['pickscore']
  assert entry['value'] == pytest.approx(agree.mean())
  assert entry['n'] == PAIRS and entry['ties'] == 0
  assert set(report['agreement_between']) == {'aesthetic pickscore'}
  assert report['pairs_with_k_agreeing'][0] == PAIRS
  place = score_files.place(given, 'pairs')
  assert json.loads((place / 'report.json').read_text()) == report
  # The records are not touched.
  sums = json.loads((folder / 'checksums.json').read_text())
  assert len(sums) == 2


def test_goes_on_after_a_kill_and_scores_nothing_twice(
  folder, weights, monkeypatch
):
  word = f'--scorers=clip={weights}'
  run(folder, word)
  whole = read(folder, 'score_clip')
  place = score_files.place(records.open_folder(folder), 'pairs')
  (place / 'score_clip.json').unlink()
  (place / 'score_clip.npy').unlink()
  add, added = score_files.Writer.add, []

  def stop(self, start, values):
    if len(added) == 1:
      raise KeyboardInterrupt
    added.append(start)
    add(self, start, values)

  with monkeypatch.context() as patch:
    patch.setattr(score_files.Writer, 'add', stop)
    with pytest.raises(KeyboardInterrupt):
      run(folder, word)
  asked = []
  batches = scorers.Scorer.batches

  def count(self, questions, **options):
    questions = list(questions)
    asked.extend(questions)
    return batches(self, questions, **options)

  monkeypatch.setattr(scorers.Scorer, 'batches', count)
  run(folder, word)
  # Of three chunks of at most four the first was there.
  assert added == [0] and len(asked) == PAIRS - 4
  np.testing.assert_array_equal(read(folder, 'score_clip'), whole)
  assert not (place / 'score_clip.parts').exists()
  run(folder, word)
  assert len(asked) == PAIRS - 4


def test_likes_are_scored(tmp_path, weights, capsys):
  rows = []
  for i in range(6):
    row = prepared_folder.make_record(i)
    for name in ('image_0', 'image_1', 'generator_0', 'generator_1', 'sizes'):
      row.pop(name)
    row.pop('label')
    rows.append(
      row
      | {
        'image': prepared_folder.picture(i),
        'size': np.array([16, 16, 0, 0], np.int32),
        'generator': b'x',
        'liked': float(i % 2),
      }
    )
  folder = prepared_folder.write(tmp_path / 'likes', rows, kind='likes')
  run(folder, f'--scorers=aesthetic={weights}')
  found = read(folder, 'score_aesthetic', 'likes')
  assert found.shape == (6,)
  text = capsys.readouterr().out
  assert f'aesthetic: liked {found[1::2].mean()}' in text


def error_of(capsys, *words):
  assert arguments.run(label.main, words) == 2
  (line,) = [
    line
    for line in capsys.readouterr().err.splitlines()
    if line.startswith('error:')
  ]
  return line


def test_errors_are_one_line(folder, weights, tmp_path, capsys):
  word = f'--data={folder}'
  assert 'is no prepared folder' in error_of(capsys, f'--data={tmp_path}/x')
  assert 'NAME=FOLDER' in error_of(capsys, word, '--scorers=clip')
  assert 'no such file or folder' in error_of(
    capsys, word, f'--scorers=clip={tmp_path}/x'
  )
  run(folder, f'--scorers=clip={weights}')
  other = clip_folder.write(tmp_path / 'other', seed=1)
  assert 'other weights' in error_of(
    capsys, word, '--batch=8', f'--scorers=clip={other}'
  )


def test_damaged_or_foreign_columns_are_refused(folder, weights):
  run(folder, f'--scorers=clip={weights}')
  given = records.open_folder(folder)
  path = score_files.place(given, 'pairs') / 'score_clip.npy'
  data = bytearray(path.read_bytes())
  data[-3] ^= 1
  path.write_bytes(data)
  with pytest.raises(ValueError, match='is damaged; score again'):
    score_files.read(given, 'pairs', 'score_clip')
  (folder / 'checksums.json').write_text('{}')
  with pytest.raises(ValueError, match='is of other records'):
    score_files.read(given, 'pairs', 'score_clip')
  with pytest.raises(ValueError, match=r'no score_x \(there are: score_clip\)'):
    score_files.read(given, 'pairs', 'score_x')


def test_pictures_that_are_not_there_are_named(tmp_path, weights):
  rows = [prepared_folder.make_record(i) for i in range(3)]
  rows[1]['image_1'] = b''
  folder = prepared_folder.write(tmp_path / 'pairs', rows)
  with pytest.raises(ValueError, match='record 1 has no pictures'):
    run(folder, f'--scorers=clip={weights}')


def test_agreement_by_hand():
  scores = np.array([[2, 1], [1, 2], [1, 1], [3, 1], [0, 1]], np.float32)
  labels = np.array([1.0, 1.0, 0.0, 0.5, 0.0], np.float32)
  # Agrees, not, a tie, no label, agrees.
  found = agreement.with_labels(scores, labels)
  assert (found['value'], found['n'], found['ties']) == (2.5 / 4, 4, 1)
  other = np.array([[2, 1], [2, 1], [0, 1], [3, 1], [0, 1]], np.float32)
  columns = {'a': scores, 'b': other}
  np.testing.assert_array_equal(
    agreement.count_agreeing(columns, labels), [2, 1, 1, 0, 2]
  )
  assert agreement.consensus(columns, labels) == [5, 4, 2]
  assert agreement.between(columns)['a b']['value'] == 3.5 / 5
  assert agreement.with_labels(scores[3:4], labels[3:4])['value'] is None


def test_hostile_pictures_name_the_record(tmp_path, weights):
  rows = [prepared_folder.make_record(0)]
  rows[0]['image_0'] = b'text'
  folder = prepared_folder.write(tmp_path / 'pairs', rows)
  with pytest.raises(
    ValueError, match=r'record 0, image_0: cannot decode image'
  ):
    run(folder, f'--scorers=clip={weights}')
