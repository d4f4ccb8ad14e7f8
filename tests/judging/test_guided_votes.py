"""What a reward guided is no winner of votes that a generator learns from."""

import json

import judge_server
import pytest

from dpo_jax.judging import export, items
from dpo_jax.judging import votes as votes_lib


def vote(choices, question):
  return [
    votes_lib.Vote(key, question, choice, 'ann')
    for key, choice in choices.items()
  ]


def test_what_a_reward_guided_is_no_winner(tmp_path):
  plain, led = (
    judge_server.write_pictures(tmp_path / name, draw, reward=reward)
    for draw, (name, reward) in enumerate(
      {'plain': {'scale': 0.0, 'reject': 0.1}, 'led': {'scale': 2.0}}.items()
    )
  )
  pairs = items.open_pairs(str(plain), str(led))
  given = {one.key: 'ab'[number % 2] for number, one in enumerate(pairs)}
  counts = export.write(
    tmp_path / 'pairs',
    pairs,
    vote(given, 'q1'),
    mode=items.PAIRS,
    question='q1',
    questions=['q1'],
  )
  assert (counts['kept'], counts['guided_winner']) == (3, 3)
  lines = (tmp_path / 'pairs' / 'pairs.jsonl').read_text().splitlines()
  assert {json.loads(line)['winner_generator'] for line in lines} == {'a'}
  for folder, cross in ((plain, 'all'), (led, 'none')):
    likes = items.open_pictures(str(folder))
    choices = ('benign', 'malign')
    given = {one.key: choices[number % 2] for number, one in enumerate(likes)}
    arguments_of = {
      'mode': items.LIKES,
      'question': items.LIKES_QUESTION,
      'questions': [items.LIKES_QUESTION],
    }
    votes = vote(given, items.LIKES_QUESTION)
    counts = export.write(
      tmp_path / cross, likes, votes, cross=cross, **arguments_of
    )
    assert counts['kept'] == 6
    # Labels of guided pictures teach rewards, round by round.
    assert counts.get('guided', 0) == (6 if folder == led else 0)
  with pytest.raises(ValueError, match=r'--cross=all: a reward guided .*led'):
    export.write(tmp_path / 'x', likes, votes, cross='all', **arguments_of)
