"""Latents and text states of a prepared folder: values, resume, refusals."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import prepared_pairs
import pytest

from dpo_jax import caching, loading, sharding
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.data import cached, checks, images, record_loader, records

LENGTHS = [5, 0, 6]
SIZE = 16


class Killed(BaseException):
  """Stands for the end of the process."""


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope='module', params=['tiny_folder', 'tiny_xl_folder'])
def opened(request, mesh):
  folder = request.getfixturevalue(request.param)
  return loading.open_model(str(folder), mesh=mesh, dtype='float32')


@pytest.fixture(scope='module')
def small(tiny_folder, mesh):
  return loading.open_model(str(tiny_folder), mesh=mesh, dtype='float32')


@pytest.fixture
def folder(tmp_path):
  rows = [prepared_pairs.make_pair(i) for i in range(11)]
  return prepared_pairs.write(tmp_path / 'data', rows, lengths=LENGTHS)


def add(folder, opened, mesh, **options):
  options = {'size': SIZE, 'batch_size': 4} | options
  return caching.add_cache(folder, model=opened, mesh=mesh, **options)


def content(folder):
  """Every file by its path, but for the time of ArrayRecord's files."""
  found = {}
  for kind in ('pairs', 'captions'):
    for i, record in enumerate(records.open_folder(folder, kind=kind)):
      found[kind, i] = {k: np.asarray(v).tobytes() for k, v in record.items()}
  found['index'] = (folder / cached.INDEX).read_bytes()
  found['cache'] = (folder / cached.NAME).read_bytes()
  return found


def test_values_are_those_of_the_networks(folder, opened, mesh):
  plain = list(records.open_folder(folder))
  seen = []
  described = add(folder, opened, mesh, on_progress=lambda *a: seen.append(a))
  source = record_loader.open_source(folder)
  assert source.cache == described == caching.check_cache(folder, opened)
  assert [shard.length for shard in source.records.shards] == LENGTHS
  encode = jax.jit(opened.model.encode_posterior)
  for before, after in zip(plain, source.records, strict=True):
    new = {name for name in after if name not in before}
    assert new == {'moments'}
    for name in before.keys() - {'sizes'}:
      assert after[name] == before[name]
    assert after['moments'].shape == (2, 2, 4, 4, 8)
    for side in range(2):
      picture = images.decode(before[f'image_{side}'])
      top, left = ((n - SIZE) // 2 for n in picture.shape[:2])
      assert after['sizes'][side].tolist() == [*picture.shape[:2], top, left]
      crop = picture[top : top + SIZE, left : left + SIZE]
      both = sd_lib.to_float(np.stack([crop, crop[:, ::-1]]))
      wanted = np.concatenate(encode(opened.params['vae'], both), axis=-1)
      np.testing.assert_allclose(
        after['moments'][side], wanted, rtol=2e-3, atol=1e-3
      )
  # Each distinct caption once, and the empty one.
  texts = {record['caption'] for record in plain} | {b''}
  captions = list(source.captions.source)
  assert sorted(record['caption'] for record in captions) == sorted(texts)
  ids = [int(record['caption_id']) for record in captions]
  assert ids == sorted(cached.caption_id(text) for text in texts)
  for record in captions:
    tokens = opened.tokenizers.encode([record['caption'].decode()])[0]
    np.testing.assert_array_equal(record['input_ids'], tokens[0])
    states = opened.model.encode_text(opened.params, tokens)
    assert states.keys() == {
      name for name in record if name.endswith('_embeds')
    }
    for name, value in states.items():
      np.testing.assert_allclose(record[name], value[0], rtol=2e-3, atol=1e-3)
  assert ('latents', 11, 11) in seen and seen[-1] == ('text', 7, 7)
  # Checksums are those of the new shards.
  assert not checks.Folder(folder).check().problems
  assert not (folder / caching.WORK).exists()


def test_latents_alone_without_flips(folder, small, mesh):
  described = add(folder, small, mesh, flips=False, keep_images=False)
  assert described.flips == 1
  source = record_loader.open_source(folder)
  assert all(record['image_0'] == b'' for record in source.records)
  assert source.records[0]['moments'].shape == (2, 1, 4, 4, 8)
  options = dict(batch_size=4, seed=0, resolution=SIZE, random_crop=False)
  with pytest.raises(ValueError, match=r'set data\.flip=False'):
    record_loader.make_record_loader(source, None, flip=True, **options)
  iterator = record_loader.make_record_loader(
    source, None, flip=False, **options
  )
  assert next(iterator)['moments'].shape == (4, 2, 4, 4, 8)
  iterator.close()
  with pytest.raises(ValueError, match='pictures were not kept'):
    source.uncached()


def test_eight_devices_compute_the_same(folder, small, mesh, tiny_folder):
  other = pathlib.Path(shutil.copytree(folder, folder.with_name('other')))
  add(folder, small, mesh)
  every = sharding.make_mesh(data=4, fsdp=2)
  with pytest.raises(ValueError, match='must be a multiple of the 8 devices'):
    add(other, str(tiny_folder), every)
  add(other, str(tiny_folder), every, batch_size=0)
  assert caching.check_cache(other, small).weights
  for kind, names in (('pairs', ['moments']), ('captions', ['prompt_embeds'])):
    one, eight = (records.open_folder(f, kind=kind) for f in (folder, other))
    for a, b in zip(one, eight, strict=True):
      for name in names:
        np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=1e-3)


def test_single_pictures(tmp_path, small, mesh):
  rows = []
  for i in range(3):
    pair = prepared_pairs.make_pair(i)
    common = ('id', 'caption', 'caption_id', 'source')
    rows.append(
      {name: pair[name] for name in common}
      | {
        'image': pair['image_0'],
        'size': pair['sizes'][0],
        'generator': b'x',
        'liked': 1.0,
      }
    )
  root = prepared_pairs.write(
    tmp_path / 'likes', rows, lengths=[3], kind='likes'
  )
  add(root, small, mesh)
  for i, record in enumerate(records.open_folder(root, kind='likes')):
    assert record['moments'].shape == (2, 4, 4, 8)
    assert record['size'].tolist() == [16, 16 + 2 * i, 0, i]


def test_another_model_is_refused(folder, small, mesh):
  with pytest.raises(ValueError, match='has no cache of latents'):
    caching.check_cache(folder, small)
  add(folder, small, mesh)
  before = content(folder)
  # Nothing to do, and the weights may lie elsewhere.
  moved = dataclasses.replace(small, source={'name': 'other', 'revision': ''})
  add(folder, moved, mesh)
  assert content(folder) == before
  leaves, tree = jax.tree.flatten(small.params['vae'])
  leaves[3] = leaves[3].at[(0,) * leaves[3].ndim].add(1e-6)
  params = small.params | {'vae': jax.tree.unflatten(tree, leaves)}
  other = dataclasses.replace(
    small, params=params, source={'name': 'new', 'revision': ''}
  )
  old, new = (caching.digest_weights(o)['vae'] for o in (small, other))
  assert old != new
  with pytest.raises(ValueError) as caught:
    caching.check_cache(folder, other)
  for part in (old, new, repr(small.source['name']), "'new'"):
    assert part in str(caught.value)
  for options, key in (({}, 'weights'), ({'flips': False}, 'flips')):
    with pytest.raises(ValueError, match=f'with a cache of another {key}'):
      add(folder, other if key == 'weights' else small, mesh, **options)
  assert content(folder) == before


def test_killed_anywhere_it_ends_the_same(
  folder, small, mesh, monkeypatch, tmp_path
):
  """A stop at every mark of progress and at every rename."""
  whole = pathlib.Path(shutil.copytree(folder, tmp_path / 'whole'))
  monkeypatch.setattr(caching, 'CAPTIONS_A_SHARD', 3)
  marks = []
  add(whole, small, mesh, on_progress=lambda *mark: marks.append(mark))
  wanted = content(whole)
  rename = pathlib.Path.rename
  for stop in range(2 * len(marks)):
    root = pathlib.Path(shutil.copytree(folder, tmp_path / f'stop{stop}'))
    kept = _stamp(folder)
    counted = []

    def count(*unused, counted=counted, stop=stop):
      counted.append(1)
      if len(counted) > stop:
        raise Killed

    def count_rename(path, target, count=count):
      count()
      return rename(path, target)

    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path, 'rename', count_rename)
      patch.setattr(pathlib.Path, 'replace', count_rename)
      try:
        add(root, small, mesh)
        break
      except Killed:
        pass
    # What is left is what was, or nothing that can be read, or all of it.
    try:
      source = record_loader.open_source(root)
    except ValueError:
      pass
    else:
      assert (source.cache is not None) == ('moments' in source.records.fields)
      if source.cache is None:
        assert _stamp(root) == kept
    done = {
      path.name: path.stat().st_mtime_ns
      for path in (root / caching.WORK).rglob('*.array_record-*-of-0000?')
      if 'old' not in path.parts
    }
    add(root, small, mesh)
    assert content(root) == wanted
    for path in root.rglob('*.array_record-*'):
      # No finished shard was computed again.
      if path.name in done:
        assert path.stat().st_mtime_ns == done[path.name]
    assert not (root / caching.WORK).exists()
    assert not checks.Folder(root).check().problems
    shutil.rmtree(root)
  else:
    pytest.fail('there are more renames than stops')
  assert stop > 12


def _stamp(root):
  return [
    hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted((root / 'pairs').rglob('*.array_record*'))
  ]


def test_a_cache_that_was_begun_with_other_settings(folder, small, mesh):
  def stop(*unused):
    raise Killed

  with pytest.raises(Killed):
    add(folder, small, mesh, on_progress=stop)
  with pytest.raises(ValueError, match='begun with a cache of another flips'):
    add(folder, small, mesh, flips=False)
  add(folder, small, mesh)
  assert json.loads((folder / cached.NAME).read_text())['flips'] == 2


def test_damage_and_numbers_beyond_float16_stop(tmp_path, small, mesh):
  rows = [prepared_pairs.make_pair(i) for i in range(3)]
  rows[1]['image_1'] = b'nonsense'
  bad = prepared_pairs.write(tmp_path / 'bad', rows, lengths=[3])
  with pytest.raises(ValueError, match='record 1, image_1: cannot decode'):
    add(bad, small, mesh)
  rows[1] = prepared_pairs.make_pair(1, caption_id=rows[2]['caption_id'])
  clash = prepared_pairs.write(tmp_path / 'clash', rows, lengths=[1, 2])
  with pytest.raises(ValueError, match=r'caption id \d+ is that of'):
    add(clash, small, mesh)
  rows[1] = prepared_pairs.make_pair(1)
  good = prepared_pairs.write(tmp_path / 'good', rows, lengths=[3])
  large = jax.tree.map(lambda leaf: 1e9 * leaf, small.params['vae'])
  other = dataclasses.replace(small, params=small.params | {'vae': large})
  with pytest.raises(ValueError, match='no finite numbers in float16'):
    add(good, other, mesh)
  with pytest.raises(ValueError, match='multiples of the VAE'):
    add(good, small, mesh, size=18)
