"""Votes on the disk: whole lines, no doubles, undo, one writer."""

import json

import pytest

from dpo_jax.judging import votes as votes_lib

HEADER = {'mode': 'pairs', 'items': 2}


def vote(item, choice='a', question='q1'):
  return {'item': item, 'question': question, 'choice': choice}


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'votes.jsonl'


def test_votes_stand_after_another_start(path):
  file = votes_lib.VoteFile(path, header=HEADER)
  assert file.add('id-000001', 'ann', [vote('x'), vote('y', 'tie')])
  assert file.add('id-000002', 'bob', [vote('x', 'b')])
  first = file.votes()
  file.close()
  again = votes_lib.VoteFile(path, header=HEADER)
  assert again.votes() == first
  assert [tuple(one) for one in first] == [
    ('x', 'q1', 'a', 'ann'),
    ('y', 'q1', 'tie', 'ann'),
    ('x', 'q1', 'b', 'bob'),
  ]
  assert again.done('ann') == {('x', 'q1'), ('y', 'q1')}
  assert again.counts() == {('x', 'q1'): 2, ('y', 'q1'): 1}
  again.close()


def test_the_same_sending_is_written_once(path):
  file = votes_lib.VoteFile(path, header=HEADER)
  assert file.add('id-000001', 'ann', [vote('x')])
  assert not file.add('id-000001', 'ann', [vote('x')])
  with pytest.raises(votes_lib.Refused, match='x has your vote already'):
    file.add('id-000002', 'ann', [vote('x', 'b')])
  assert len(path.read_text().splitlines()) == 2
  file.close()


def test_undo_takes_back_one_sending_after_the_other(path):
  file = votes_lib.VoteFile(path, header=HEADER)
  file.add('id-000001', 'ann', [vote('x')])
  file.add('id-000002', 'ann', [vote('y')])
  file.add('id-000003', 'bob', [vote('x')])
  assert file.undo('undo-0001', 'ann')['id'] == 'id-000002'
  # The same undo, sent twice, takes back one.
  assert file.undo('undo-0001', 'ann')['id'] == 'id-000002'
  assert file.done('ann') == {('x', 'q1')}
  assert file.add('id-000004', 'ann', [vote('y', 'b')])
  assert file.undo('undo-0002', 'ann')['id'] == 'id-000004'
  assert file.undo('undo-0003', 'ann')['id'] == 'id-000001'
  assert file.undo('undo-0004', 'ann') is None
  assert [one.judge for one in file.votes()] == ['bob']
  first = file.votes()
  file.close()
  again = votes_lib.VoteFile(path, header=HEADER)
  assert again.votes() == first and again.undo('undo-0005', 'ann') is None
  again.close()


@pytest.mark.parametrize('cut', [1, 5, 20])
def test_a_torn_last_line_is_removed(path, cut):
  file = votes_lib.VoteFile(path, header=HEADER)
  file.add('id-000001', 'ann', [vote('x')])
  file.add('id-000002', 'ann', [vote('y')])
  file.close()
  data = path.read_bytes()
  path.write_bytes(data[:-cut])
  again = votes_lib.VoteFile(path, header=HEADER)
  assert [one.item for one in again.votes()] == ['x']
  again.add('id-000003', 'ann', [vote('y', 'b')])
  again.close()
  lines = path.read_text().splitlines()
  assert [json.loads(line).get('id') for line in lines] == [
    None,
    'id-000001',
    'id-000003',
  ]


def test_one_process_writes(path):
  file = votes_lib.VoteFile(path, header=HEADER)
  with pytest.raises(ValueError, match='another judge page writes to it'):
    votes_lib.VoteFile(path, header=HEADER)
  file.close()
  votes_lib.VoteFile(path, header=HEADER).close()


def test_votes_on_something_else_are_refused(path):
  votes_lib.VoteFile(path, header=HEADER).close()
  with pytest.raises(ValueError, match='items: 2 there, 3 here'):
    votes_lib.VoteFile(path, header=HEADER | {'items': 3})
  path.write_text('a diary\n')
  with pytest.raises(ValueError, match='line 1: no vote'):
    votes_lib.VoteFile(path, header=HEADER)
  assert path.read_text() == 'a diary\n'


@pytest.mark.parametrize(
  ('number', 'judge', 'words'),
  [
    ('short', 'ann', 'needs an id'),
    (None, 'ann', 'needs an id'),
    ('id-000001', '', "judge's name"),
    ('id-000001', '../x', "judge's name"),
    ('id-000001', 'a' * 65, "judge's name"),
  ],
)
def test_ids_and_names_are_checked(path, number, judge, words):
  file = votes_lib.VoteFile(path, header=HEADER)
  with pytest.raises(votes_lib.Refused, match=words):
    file.add(number, judge, [vote('x')])
  file.close()
