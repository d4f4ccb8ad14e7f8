"""Resumable builds: kills at any point, disks that are full, locks, memory."""

import errno
import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pickapic_file
import pytest

from dpo_jax.data import (
  build_files,
  build_report,
  building,
  examples,
  records,
)
from dpo_jax.data.formats import rows as rows_lib
from dpo_jax.data.formats import sources

KILLER = pathlib.Path(__file__).with_name('kill_builds.py')


@pytest.fixture
def source(tmp_path):
  """A parquet file of 40 rows, each sixth a tie or unreadable."""
  rows = []
  for i in range(40):
    changes = {'jpg_1': b'text'} if i % 6 == 5 else {}
    rows.append(
      pickapic_file.make_row(i, 0.5 if i % 6 == 4 else 1.0, **changes)
    )
  (tmp_path / 'source').mkdir()
  return pickapic_file.write(tmp_path / 'source' / 'a.parquet', rows)


def options_of(source, shards=5, **changes):
  settings = {
    'format': 'pickapic',
    'split': 'train',
    'shards': shards,
    'size': None,
    'files': build_files.describe_files(source.files),
  }
  rows = sum(file.rows for file in source.files)
  return building.Options('train', shards, rows, settings | changes)


def build(path, out, shards=5, **changes):
  source = sources.open_source(str(path), 'pickapic')
  with (
    building.Build(out, source, options_of(source, shards, **changes)) as run,
    examples.ExampleMaker() as make,
  ):
    run.build_shards(make)
    return run.finish()


def kill(source, tmp_path, *mode):
  work = tmp_path / 'work'
  work.mkdir()
  done = subprocess.run(
    [sys.executable, KILLER, str(source), work, '5', *mode],
    check=True,
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': os.getcwd()},
  )
  return json.loads(done.stdout.splitlines()[-1])


def test_kill_at_every_point_of_change(source, tmp_path):
  seen = kill(source, tmp_path, 'points')
  # Two of each of 5 shards and of their 2 files of state, at least.
  assert seen['kills'] > 30
  assert seen['midway'] > 30
  assert (seen['wrong'], seen['unequal'], seen['left']) == (0, 0, 0)


def test_5_kills_at_random(source, tmp_path):
  seen = kill(source, tmp_path, 'random', '1', '5')
  assert seen['kills'] == 5
  assert (seen['wrong'], seen['unequal'], seen['left']) == (0, 0, 0)


@pytest.mark.slow
def test_100_kills_at_random(source, tmp_path):
  seen = kill(source, tmp_path, 'random', '2', '100')
  assert seen['midway'] >= 20
  assert (seen['wrong'], seen['unequal'], seen['left']) == (0, 0, 0)


def test_finished_shards_are_not_built_again(source, tmp_path):
  opened = sources.open_source(str(source), 'pickapic')
  asked = []

  class Failing:
    kind, files = opened.kind, opened.files

    def read(self, begin, end):
      asked.append((begin, end))
      if begin == 24 and asked.count((24, 32)) == 1:
        raise OSError('cable pulled')
      return opened.read(begin, end)

  done = []
  for attempt in range(2):
    try:
      with (
        building.Build(tmp_path / 'o', Failing(), options_of(opened)) as run,
        examples.ExampleMaker() as make,
      ):
        run.build_shards(make, on_progress=done.append)
        run.finish()
    except OSError as error:
      assert (attempt, str(error)) == (0, 'cable pulled')
      left = {p.name for p in (tmp_path / 'o.incomplete').rglob('*.partial')}
      assert not left
  assert asked == [(0, 8), (8, 16), (16, 24), (24, 32), (24, 32), (32, 40)]
  assert done == [*range(1, 25), 8, 16, 24, *range(25, 41)]
  build(source, tmp_path / 'other')
  for name in ('build_report.json', 'checksums.json'):
    assert (tmp_path / 'o' / name).read_bytes() == (
      tmp_path / 'other' / name
    ).read_bytes()


def test_a_shard_that_is_gone_or_cut_is_built_again(source, tmp_path):
  opened = sources.open_source(str(source), 'pickapic')
  options = options_of(opened)
  with (
    building.Build(tmp_path / 'o', opened, options) as run,
    examples.ExampleMaker() as make,
  ):
    run.build_shards(make)
    (run.folder / 'state' / 'rows.json').unlink()
    shards = sorted(run.folder.rglob('*array_record*'))
    shards[1].unlink()
    shards[3].write_bytes(shards[3].read_bytes()[:1000])
    run.build_shards(make)
    run.finish()
  build(source, tmp_path / 'other')
  sums = [
    json.loads((tmp_path / name / 'checksums.json').read_text())
    for name in ('o', 'other')
  ]
  assert sums[0] == sums[1]
  assert len(list(records.open_folder(tmp_path / 'o'))) == 28


def test_two_builds_of_one_folder(source, tmp_path):
  opened = sources.open_source(str(source), 'pickapic')
  with building.Build(tmp_path / 'o', opened, options_of(opened)):
    program = (
      'import sys; sys.path.insert(0, sys.argv[1]); import test_building;'
      'test_building.build(sys.argv[2], sys.argv[3])'
    )
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
      [sys.executable, '-c', program, here, source, tmp_path / 'o'],
      capture_output=True,
      text=True,
      env=os.environ | {'PYTHONPATH': f'{os.getcwd()}:{here.parent}'},
    )
    assert done.returncode
    assert 'another process builds it; wait for it to end' in done.stderr
  # The lock goes with its holder.
  build(source, tmp_path / 'o')


def test_full_disk_says_what_is_free_and_needed(source, tmp_path):
  """A limit on the size of files stands for the disk's end."""
  big = tmp_path / 'source' / 'big.parquet'
  rng = np.random.default_rng(0)
  rows = []
  for i in range(24):
    # The third shard does not fit.
    side = 300 if 16 <= i < 24 else 20
    noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    data = pickapic_file.encode(pickapic_file.Image.fromarray(noise), 'PNG')
    rows.append(pickapic_file.make_row(i, jpg_0=data))
  pickapic_file.write(big, rows)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
  try:
    with pytest.raises(OSError) as caught:
      build(big, tmp_path / 'o', 3)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert caught.value.errno == errno.EFBIG
  text = str(caught.value)
  assert 'bytes are free, about ' in text
  assert 'give the same command again, which continues here' in text
  incomplete = tmp_path / 'o.incomplete'
  assert not list(incomplete.rglob('*.partial'))
  assert len(list(incomplete.rglob('*array_record*'))) == 2
  assert not (tmp_path / 'o').exists()
  # With room again it goes on.
  build(big, tmp_path / 'o', 3)
  build(big, tmp_path / 'other', 3)
  for path in (tmp_path / 'o').rglob('*'):
    if path.is_file():
      other = tmp_path / 'other' / path.relative_to(tmp_path / 'o')
      assert path.read_bytes() == other.read_bytes()


def test_more_shards_than_pairs_make_empty_shards(source, tmp_path):
  build(source, tmp_path / 'o', 40)
  got = records.open_folder(tmp_path / 'o')
  assert len(got.shards) == 40
  assert {shard.length for shard in got.shards} == {0, 1}
  assert len(list(got)) == 28


# Examples.


def make(rows, **options):
  with examples.ExampleMaker(**options) as maker:
    return list(maker(iter(rows)))


def ranked(path, n=4, **changes):
  """A row of n pictures, files, of which the last repeats the first."""
  images = []
  for i in range(n):
    data = pickapic_file.encode(pickapic_file.picture(i % (n - 1), 8, 8), 'PNG')
    (path / f'{i}.png').write_bytes(data)
    images.append(path / f'{i}.png')
  pairs = [(a, b, 1.0) for a in range(n) for b in range(a + 1, n)]
  values = {
    'source': 'a:0',
    'caption': 'c',
    'images': tuple(images),
    'uids': ('',) * n,
    'generators': ('',) * n,
    'comparisons': tuple(pairs),
  }
  return rows_lib.Row(**values | changes)


def test_the_same_picture_under_two_names_is_identical(tmp_path):
  (made,) = make([ranked(tmp_path)])
  assert made.counts['examples'] == 6
  assert made.counts['identical'] == 1
  assert made.counts['kept'] == 5
  # Each file is decoded once.
  assert made.counts['images'] == 4
  # (0, 1) and (1, 3) show the same pictures, and so do (0, 2) and (2, 3).
  assert len({example.key for example in made.examples}) == 3
  assert len({example.record['id'] for example in made.examples}) == 5


def test_an_unreadable_picture_loses_its_pairs_only(tmp_path):
  row = ranked(tmp_path)
  (tmp_path / '1.png').unlink()
  (tmp_path / '2.png').write_bytes(b'text')
  (made,) = make([row])
  assert made.counts['unreadable'] == 5
  assert made.counts['identical'] == 1
  assert made.counts['kept'] == 0
  assert made.reasons == {'no such file': 1, 'not a picture': 1}


def test_order_and_counts_hold_for_any_number_of_threads(tmp_path):
  rows = [ranked(tmp_path, 3, source=f'a:{i}') for i in range(50)]
  one, four = make(rows, threads=1), make(rows, threads=4)
  assert len(one) == 50
  for a, b in zip(one, four, strict=True):
    assert a.counts == b.counts
    assert [e.key for e in a.examples] == [e.key for e in b.examples]
    assert [e.record['id'] for e in a.examples] == [
      e.record['id'] for e in b.examples
    ]


def test_likes_are_counted_as_pairs_are(tmp_path):
  data = pickapic_file.encode(pickapic_file.picture(0))
  base = {
    'source': 'a:0',
    'caption': 'c',
    'images': (data,),
    'uids': ('',),
    'generators': ('g',),
    'liked': 0.0,
  }
  rows = [
    rows_lib.Row(**base),
    rows_lib.Row(**base | {'images': (b'text',)}),
    rows_lib.Row(**base | {'liked': None, 'unlabelled': 1}),
    rows_lib.Row(**base | {'caption': None}),
    rows_lib.Row(**base | {'source': 'a:1', 'liked': 1.0}),
  ]
  made = make(rows)
  total = sum((m.counts for m in made), start=type(made[0].counts)())
  assert {name: total[name] for name in total if total[name]} == {
    'rows': 5,
    'examples': 5,
    'kept': 2,
    'unreadable': 1,
    'unlabelled': 1,
    'without_caption': 1,
    'images': 3,
    'images_unreadable': 1,
  }
  record = made[0].examples[0].record
  assert record['size'].tolist() == [32, 32, 0, 0]
  assert record['image'] == data
  assert made[0].examples[0].key == made[4].examples[0].key


def test_counts_that_do_not_add_up_are_a_bug():
  counts = {name: 0 for name in pickapic_file.COUNTS} | {'examples': 1}
  with pytest.raises(AssertionError):
    build_report.make('pairs', counts, {}, settings={})


@pytest.mark.slow
def test_memory_is_flat_over_a_larger_source(tmp_path):
  """800 MB in one row group are read within 400 MB above the start."""
  rng = np.random.default_rng(0)
  tail = rng.bytes(400_000)
  picture = pickapic_file.encode(pickapic_file.picture(0, 64, 64))
  rows = [
    pickapic_file.make_row(i, jpg_0=picture + tail, jpg_1=tail[:1] + tail)
    | {'jpg_1': pickapic_file.encode(pickapic_file.picture(i)) + tail}
    for i in range(1000)
  ]
  path = pickapic_file.write(tmp_path / 'a.parquet', rows, row_group_size=1000)
  del rows
  program = (
    'import sys; sys.path.insert(0, sys.argv[1]); import test_building, '
    'resource as r; rss = lambda: r.getrusage(r.RUSAGE_SELF).ru_maxrss;'
    'before = rss(); test_building.build(sys.argv[2], sys.argv[3], 4);'
    'print((rss() - before) // 1024)'
  )
  here = pathlib.Path(__file__).parent
  done = subprocess.run(
    [sys.executable, '-c', program, here, path, tmp_path / 'o'],
    check=True,
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': f'{os.getcwd()}:{here.parent}'},
  )
  assert int(done.stdout) < 400
