"""A run that goes on with a changed config: by key, allowed or refused."""

import json

import pytest

from configs import common
from dpo_jax.train import workdir


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


KEYS = sorted(workdir.flatten(_record()))


def test_what_is_allowed_exists():
  assert len(KEYS) > 60
  assert workdir.FREE_KEYS - set(KEYS) == set()


@pytest.mark.parametrize('key', KEYS)
def test_every_key_is_allowed_or_refused_by_name(tmp_path, key):
  with workdir.Workdir(tmp_path, config=_record()) as place:
    place.keep_config()
  changed = _record()
  old = workdir.flatten(changed)[key]
  new = _change(old)
  _set(changed, key, new)
  place = workdir.Workdir(tmp_path, config=changed)
  if key in workdir.FREE_KEYS:
    with place:
      place.keep_config()
    saved = json.loads((tmp_path / 'config.json').read_text())
    assert workdir.flatten(saved)[key] == new
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


def test_an_address_is_no_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r'--workdir=gs://b/run: .* mount'):
    workdir.Workdir('gs://b/run', config={})
  assert not list(tmp_path.iterdir())


def test_what_changes_numbers_is_not_allowed():
  """Whoever adds to the list must decide this again."""
  assert {key.split('.')[0] for key in workdir.FREE_KEYS} == {
    'train',
    'mesh',
    'optim',
    'eval',
    'export',
  }
  # As another mesh it rounds elsewhere at most.
  assert 'optim.offload' in workdir.FREE_KEYS
  assert sum(key.startswith('optim') for key in workdir.FREE_KEYS) == 1
  assert not workdir.FREE_KEYS & {
    'seed',
    'task',
    'train.num_steps',
    'train.batch_size',
    'train.accumulate',
  }
