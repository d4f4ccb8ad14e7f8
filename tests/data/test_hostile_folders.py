"""A data set folder from a stranger runs no code and leads nowhere (X3)."""

import copy
import json
import math
import os
import resource
import sys

import numpy as np
import pytest

from dpo_jax.data import cached, checks, record_fields, records, side_files

SHAPES = record_fields.CacheShapes(moments=(1, 2, 2, 8))
# What a field of JSON may hold instead of what is expected.
WRONG = [
  None,
  True,
  -1,
  10**400,
  1.5,
  math.nan,
  math.inf,
  '',
  'canary.Feature',
  '../../../etc/passwd',
  '/etc/passwd',
  'a\0b\n\x1b[31m\u202e\ud800',
  '9' * 5000,
  'x' * 100_000,
  [],
  [[]] * 3,
  {},
  {'pythonClassName': 'canary.Feature'},
  {'__class__': 'canary.Feature', '$ref': 'file:///etc/passwd'},
]


@pytest.fixture
def folder(prepared, record):
  moments = np.zeros((2, 1, 2, 2, 8), np.float16)
  rows = [record(i, moments=moments) for i in range(3)]
  return prepared(rows, lengths=[2, 1], cache=SHAPES)


@pytest.fixture
def canary(tmp_path, monkeypatch):
  """A module that leaves a trace when it is imported."""
  home = tmp_path / 'modules'
  home.mkdir()
  trace = tmp_path / 'imported'
  (home / 'canary.py').write_text(
    f'open({str(trace)!r}, "w").close()\nclass Feature: pass\n'
  )
  monkeypatch.syspath_prepend(home)
  yield trace
  assert not trace.exists() and 'canary' not in sys.modules


def _data(folder):
  return folder / 'pairs' / '1.0.0'


def _refused(folder, *words):
  """Whoever opens the folder is told why not, in one line."""
  for opened in (records.open_folder, checks.Folder):
    with pytest.raises(ValueError) as caught:
      opened(folder)
    text = str(caught.value)
    assert '\n' not in text and '\x1b' not in text and len(text) < 10_000
    for word in words:
      assert word in text


def _paths(node, at=()):
  """Every place in a JSON value."""
  yield at
  children = node.items() if isinstance(node, dict) else ()
  if isinstance(node, list):
    children = enumerate(node)
  for key, child in children:
    yield from _paths(child, (*at, key))


def _replaced(value, at, new):
  if not at:
    return new
  changed = copy.deepcopy(value)
  inner = changed
  for key in at[:-1]:
    inner = inner[key]
  inner[at[-1]] = new
  return changed


@pytest.mark.parametrize('name', ['features.json', 'dataset_info.json'])
def test_every_entry_replaced_by_every_wrong_value(folder, canary, name):
  """Either the folder reads as before, or it is refused; nothing between."""
  path = _data(folder) / name
  given = json.loads(path.read_text())
  before = set(sys.modules)
  right = records.open_folder(folder)
  count = accepted = 0
  for at in _paths(given):
    for new in WRONG:
      path.write_text(json.dumps(_replaced(given, at, new)))
      count += 1
      try:
        opened = records.open_folder(folder)
      except ValueError as error:
        text = str(error)
        assert name in text and '\n' not in text and '\x1b' not in text
        assert len(text) < 10_000, (at, new)
        continue
      accepted += 1
      # Descriptions may say what they like; nothing else may differ.
      assert opened.fields == right.fields, (at, new)
      assert opened.folder == right.folder
      harmless = {'description', 'numBytes', 'text', 'encoding', 'shape'}
      assert opened.shards == right.shards or 'shardLengths' in at
      assert harmless & set(map(str, at)) or 'shardLengths' in at, (at, new)
  assert set(sys.modules) == before
  assert count > 100 and accepted < count / 5


@pytest.mark.parametrize('name', ['features.json', 'dataset_info.json'])
def test_every_entry_joined_by_one_more(folder, canary, name):
  path = _data(folder) / name
  given = json.loads(path.read_text())
  for at in _paths(given):
    inner = given
    for key in at:
      inner = inner[key]
    if not isinstance(inner, dict):
      continue
    for key in ('moduleName', 'pythonClassName', 'filepathTemplate', '', '..'):
      if key not in inner:
        more = _replaced(given, at, {**inner, key: 'canary.Feature'})
        path.write_text(json.dumps(more))
        _refused(folder, name)


@pytest.mark.parametrize(
  'template',
  [
    '../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    '/tmp/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    'file:///{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    'gs://bucket/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    '{DATASET.__class__}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    '',
  ],
)
def test_templates_that_leave_the_folder(folder, template):
  path = _data(folder) / 'dataset_info.json'
  given = json.loads(path.read_text())
  given['splits'][0]['filepathTemplate'] = template
  path.write_text(json.dumps(given))
  _refused(folder, 'dataset_info.json', 'lies at')


BOMBS = {
  'deep lists': '[' * 200_000,
  'deep objects': '{"a":' * 200_000,
  'long number': '1' * 1_000_000,
  'many features': json.dumps(
    {'featuresDict': {'features': {str(i): {} for i in range(100_000)}}}
  ),
  'nul': '\0' * 1000,
}


@pytest.mark.parametrize('bomb', BOMBS)
@pytest.mark.parametrize('name', ['features.json', 'dataset_info.json'])
def test_json_bombs(folder, name, bomb):
  (_data(folder) / name).write_text(BOMBS[bomb])
  _refused(folder, name)


@pytest.mark.parametrize('name', ['features.json', 'dataset_info.json'])
def test_a_terabyte_of_json_is_not_read(folder, name):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  os.truncate(_data(folder) / name, 1 << 40)
  _refused(folder, name, 'larger than')
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert grown < 64 << 10


@pytest.mark.timeout(30)
@pytest.mark.parametrize('name', ['features.json', 'dataset_info.json'])
@pytest.mark.parametrize('kind', ['link', 'pipe', 'folder', 'none', 'loop'])
def test_metadata_that_are_no_plain_files(folder, tmp_path, name, kind):
  path = _data(folder) / name
  moved = path.rename(tmp_path / 'elsewhere.json')
  if kind == 'link':
    path.symlink_to(moved)
  elif kind == 'pipe':
    os.mkfifo(path)
  elif kind == 'folder':
    path.mkdir()
  elif kind == 'loop':
    path.symlink_to(path)
  _refused(folder, name)


@pytest.mark.timeout(30)
@pytest.mark.parametrize('kind', ['link', 'device', 'pipe', 'folder'])
def test_shards_that_are_no_plain_files(folder, tmp_path, kind):
  path = sorted(_data(folder).glob('*.array_record*'))[1]
  moved = path.rename(tmp_path / 'elsewhere')
  if kind == 'link':
    path.symlink_to(moved)
  elif kind == 'device':
    path.symlink_to('/dev/zero')
  elif kind == 'pipe':
    os.mkfifo(path)
  else:
    path.mkdir()
  with pytest.raises(ValueError, match='no such shard'):
    records.open_folder(folder)
  report = checks.Folder(folder).check()
  name = path.relative_to(folder).as_posix()
  assert (name, 'the shard is no plain file') in [
    p[:2] for p in report.problems
  ]


@pytest.mark.parametrize('inner', ['pairs', 'pairs/1.0.0'])
def test_data_folders_that_are_links(folder, tmp_path, inner):
  path = folder / inner
  path.rename(tmp_path / 'elsewhere')
  path.symlink_to(tmp_path / 'elsewhere')
  _refused(folder, 'pairs')


def test_a_link_to_the_whole_folder_is_the_users_own(folder, tmp_path):
  link = tmp_path / 'link'
  link.symlink_to(folder)
  assert len(records.open_folder(link)) == 3


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
  'kind', ['link', 'pipe', 'folder', 'loop', 'deep', 'terabyte']
)
def test_files_beside_the_records(folder, tmp_path, kind):
  for name in ('checksums.json', 'build_report.json', cached.NAME):
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == 'link':
      (tmp_path / 'other').write_text('{}')
      path.symlink_to(tmp_path / 'other')
    elif kind == 'pipe':
      os.mkfifo(path)
    elif kind == 'folder':
      path.mkdir()
    elif kind == 'loop':
      path.symlink_to(path)
    elif kind == 'deep':
      path.write_text('{"a":' * 200_000)
    else:
      path.touch()
      os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=name):
      side_files.read(folder, name)
  named = {problem.file for problem in checks.Folder(folder).check().problems}
  assert {'checksums.json', cached.NAME} <= named


def test_shards_of_random_bytes(folder):
  rng = np.random.default_rng(0)
  path = sorted(_data(folder).glob('*.array_record*'))[0]
  for size in (1, 64, 65_536, 200_000):
    path.write_bytes(rng.bytes(size))
    opened = records.open_folder(folder)
    for i in (0, 1):
      with pytest.raises(records.DamagedRecordError):
        opened[i]
    assert opened[2]['id'] == 3
