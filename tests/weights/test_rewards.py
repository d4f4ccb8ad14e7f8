"""Folders of rewards: a bijection, and one line for what is spoilt."""

import json

import jax
import numpy as np
import pytest

from dpo_jax.models import reward
from dpo_jax.weights import rewards, safetensors_io

RECORD = {
  'space': 'pixels',
  'size': [8, 8],
  'place': 'x_0_hat',
  'model': None,
  'num_train_timesteps': None,
  'labels': {'benign': 4, 'malign': 3},
}


def _make(kind, count=2):
  config = reward.RewardConfig(kind, 3, widths=(8, 16), num_heads=2)
  rng = np.random.default_rng(0)
  members = [
    jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
      rewards.init_shapes(config),
    )
    for _ in range(count)
  ]
  place = 'x_t' if kind == 'time' else 'x_0_hat'
  clip = (
    {'name': 'a folder', 'sha256': '0' * 64} if kind == 'features' else None
  )
  return (
    config,
    members,
    RECORD
    | {
      'place': place,
      'clip': clip,
      'odds': [0.2] * count if kind == 'time' else None,
    },
  )


@pytest.fixture
def folder(tmp_path):
  config, members, record = _make('clean')
  rewards.save(tmp_path, config=config, members=members, record=record)
  return tmp_path


@pytest.mark.parametrize('kind', reward.KINDS)
def test_what_was_saved_is_what_is_loaded(tmp_path, kind):
  config, members, record = _make(kind)
  rewards.save(tmp_path, config=config, members=members, record=record)
  loaded = rewards.load(tmp_path)
  assert loaded.config == config and loaded.record == record
  assert len(loaded.members) == len(members)
  for one, given in zip(loaded.members, members, strict=True):
    assert jax.tree.structure(one) == jax.tree.structure(given)
    jax.tree.map(np.testing.assert_array_equal, one, given)
  names = safetensors_io.load(tmp_path / 'model.safetensors').keys()
  assert len(names) == 2 * len(jax.tree.leaves(members[0]))
  assert {'000/logit/bias', '001/logit/kernel'} <= names
  # As it was saved, bit by bit, again.
  again = tmp_path / 'again'
  rewards.save(
    again, config=config, members=loaded.members, record=loaded.record
  )
  for name in ('config.json', 'model.safetensors'):
    assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
  ('damage', 'words'),
  [
    ('missing', "'001/logit/bias' has shape None"),
    ('extra', "'002/logit/bias' has shape .1,., the config asks for None"),
    ('shape', "'001/logit/bias' has shape .2,."),
    ('integers', "'001/logit/bias' is int32"),
  ],
)
def test_spoilt_tensors_are_named(folder, damage, words):
  path = folder / 'model.safetensors'
  tensors = safetensors_io.load(path)
  bias = tensors['001/logit/bias']
  if damage == 'missing':
    del tensors['001/logit/bias']
  elif damage == 'extra':
    tensors['002/logit/bias'] = bias
  elif damage == 'shape':
    tensors['001/logit/bias'] = np.zeros(2, np.float32)
  else:
    tensors['001/logit/bias'] = bias.astype(np.int32)
  safetensors_io.save(path, tensors)
  with pytest.raises(ValueError, match=words) as error:
    rewards.load(folder)
  assert str(path) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'members': 3}, 'model.safetensors: tensor .002/'),
    ({'members': 0}, 'members=0'),
    ({'breadth': 2}, 'breadth'),
    ({'depth': None}, 'config.json: has no depth'),
    ({'widths': 8}, 'config.json: '),
    ({'record': {'space': 'pixels'}}, 'record has .*labels, model'),
    ({'record': RECORD | {'space': 'sound'}}, "record.space='sound'"),
    ({'record': RECORD | {'place': 'x_t'}}, "record.place='x_t'.*x_0_hat"),
    ({'record': RECORD | {'size': 8}}, 'record.size=8'),
    ({'record': RECORD | {'odds': [1.0]}}, 'odds=.1.0.: should be 2 numbers'),
    ({'record': RECORD | {'odds': [1.0, 0]}}, 'should be 2 numbers above 0'),
    ({'record': RECORD | {'clip': {'name': 'x'}}}, 'null with others'),
  ],
)
def test_spoilt_configs_are_named(folder, changes, words):
  path = folder / 'config.json'
  values = json.loads(path.read_text()) | changes
  kept = {name: value for name, value in values.items() if value is not None}
  path.write_text(json.dumps(kept))
  with pytest.raises(ValueError, match=words) as error:
    rewards.load(folder)
  assert str(folder) in str(error.value) and '\n' not in str(error.value)


def test_what_is_not_there_is_named(tmp_path):
  with pytest.raises(ValueError, match=r'config\.json: no such file'):
    rewards.load(tmp_path)


def test_nothing_is_written_of_what_cannot_be_read(tmp_path):
  config, members, record = _make('clean')
  out = tmp_path / 'out'
  spoilt = jax.tree.map(lambda leaf: leaf * np.nan, members[1])
  short = {name: leaf for name, leaf in members[1].items() if name != 'logit'}
  for given, words in (
    ([members[0], spoilt], 'NaN'),
    ([members[0], short], '001/logit/bias'),
    ([], 'members is empty'),
  ):
    with pytest.raises(ValueError, match=words) as error:
      rewards.save(out, config=config, members=given, record=record)
    assert str(out) in str(error.value)
    assert not (out / 'config.json').exists()
    assert not (out / 'model.safetensors').exists()


def test_a_record_of_before_there_was_clip_is_read(folder):
  path = folder / 'config.json'
  values = json.loads(path.read_text())
  assert values['record'].pop('clip') is None
  path.write_text(json.dumps(values))
  assert rewards.load(folder).record['clip'] is None


def test_features_are_of_some_clip(tmp_path):
  config, members, record = _make('features')
  with pytest.raises(ValueError, match='name and sha256 of a CLIP'):
    rewards.save(
      tmp_path,
      config=config,
      members=members,
      record=record | {'clip': {'name': 'x'}},
    )
