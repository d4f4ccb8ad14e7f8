"""A run that goes on with a changed config: by key, allowed or refused."""

import json

import pytest

from configs import common
from dpo_jax.train import changes, workdir


def _record():
  return json.loads(common.get_config().to_json_best_effort())


def _change(value):
  if isinstance(value, bool):
    return not value
  if isinstance(value, int | float):
    return value + 1
  return f'{value}x' if isinstance(value, str) else [*value, 7]


def _set(record, key, value):
  *path, last = key.split('.')
  for name in path:
    record = record[name]
  record[last] = value


KEYS = sorted(changes.flatten(_record()))


def test_what_is_allowed_exists():
  assert len(KEYS) > 60
  assert changes.FREE.keys() <= set(KEYS)


@pytest.mark.parametrize('key', KEYS)
def test_every_key_is_allowed_or_refused_by_name(tmp_path, key):
  with workdir.Workdir(tmp_path, config=_record()) as place:
    place.keep_config()
  changed = _record()
  old = changes.flatten(changed)[key]
  new = _change(old)
  _set(changed, key, new)
  place = workdir.Workdir(tmp_path, config=changed)
  if key in changes.FREE:
    with place:
      place.keep_config()
    saved = json.loads((tmp_path / 'config.json').read_text())
    assert changes.flatten(saved)[key] == new
    return
  with pytest.raises(ValueError, match='was written by another config') as e:
    place.__enter__()
  assert f'({key}: {old!r} -> {new!r})' in str(e.value)
  # The refusal let the folder go.
  with workdir.Workdir(tmp_path, config=_record()):
    pass


def test_a_key_that_came_or_went_is_refused(tmp_path):
  with workdir.Workdir(tmp_path, config=_record()) as place:
    place.keep_config()
  fewer = _record()
  del fewer['objective']['numbers']['beta']
  fewer['objective']['numbers']['scale'] = 2.0
  with pytest.raises(ValueError) as error:
    workdir.Workdir(tmp_path, config=fewer).__enter__()
  text = str(error.value)
  assert "objective.numbers.beta: 5000.0 -> 'absent'" in text
  assert "objective.numbers.scale: 'absent' -> 2.0" in text


def test_every_key_is_decided_once_and_with_a_reason():
  """A new key of these sections belongs into one of the two lists."""
  assert not changes.FREE.keys() & changes.REFUSED.keys()
  for key in KEYS:
    section = key.split('.')[0]
    places = [changes.FREE.get(key), changes.REFUSED.get(key)]
    if section not in ('model', 'train', 'mesh'):
      # A section's own key may be free all the same.
      whole = section != key and changes.REFUSED.get(section)
      places = [place for place in places if place] or [whole]
    (reason,) = filter(None, places)
    assert len(reason) > 10
  known = {*KEYS, *(key.split('.')[0] for key in KEYS)}
  assert changes.REFUSED.keys() <= known


def test_what_changes_numbers_is_not_allowed():
  """Whoever adds to the list must decide this again."""
  assert {key.split('.')[0] for key in changes.FREE} == {
    'train',
    'model',
    'mesh',
    'optim',
    'eval',
    'export',
  }
  assert [key for key in changes.FREE if key.startswith('model')] == [
    'model.remat',
    'model.attention',
    'model.stack_layers',
  ]
  # As another mesh it rounds elsewhere at most.
  assert [key for key in changes.FREE if key.startswith('optim')] == [
    'optim.offload'
  ]
  assert not changes.FREE.keys() & {
    'seed',
    'task',
    'train.num_steps',
    'train.batch_size',
  }
