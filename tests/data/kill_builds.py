"""Kills builds and finishes them; prints what was seen as JSON.

  python kill_builds.py SOURCE WORK SHARDS random SEED COUNT
  python kill_builds.py SOURCE WORK SHARDS points

A build is a forked child, so that nothing is imported anew. `random` kills it
after random parts of an undisturbed build's time, `points` at each place where
a file gets its name, its bytes are made to last or it goes, one after another.
"""

import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

from dpo_jax.data import build_files, building, examples, records
from dpo_jax.data.formats import sources

# What changes a folder for good; the child dies at the n-th call of them.
STEPS = [
  (os, 'fsync'),
  (pathlib.Path, 'rename'),
  (pathlib.Path, 'unlink'),
  (pathlib.Path, 'rmdir'),
]


def build(source_path, out, shards):
  source = sources.open_source(source_path, 'pickapic')
  rows = source.files[0].rows
  settings = {
    'format': 'pickapic',
    'split': 'train',
    'shards': shards,
    'size': None,
    'files': build_files.describe_files(source.files),
  }
  options = building.Options('train', shards, rows, settings)
  with (
    building.Build(out, source, options) as run,
    examples.ExampleMaker(threads=2) as make,
  ):
    run.build_shards(make)
    run.finish()


def die_at(step):
  """Makes this process kill itself at the step-th call."""
  calls = [0]

  def wrap(original):
    def run(*arguments, **options):
      calls[0] += 1
      if calls[0] == step:
        os.kill(os.getpid(), signal.SIGKILL)
      return original(*arguments, **options)

    return run

  for place, name in STEPS:
    setattr(place, name, wrap(getattr(place, name)))


def child(work, *, step=None, seconds=None):
  """Runs a build in a child; returns whether it ended by itself."""
  pid = os.fork()
  if not pid:
    code = 1
    try:
      if step:
        die_at(step)
      build(*work)
      code = 0
    finally:
      os._exit(code)
  if seconds is not None:
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
  _, status = os.waitpid(pid, 0)
  if os.WIFSIGNALED(status):
    return False
  assert os.waitstatus_to_exitcode(status) == 0, status
  return True


def contents(folder):
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def main():
  source, folder, shards, mode, *more = sys.argv[1:]
  folder = pathlib.Path(folder)
  out = folder / 'out'
  work = source, out, int(shards)
  started = time.monotonic()
  assert child(work)
  duration = time.monotonic() - started
  right = contents(out)
  shutil.rmtree(out)
  seen = {'kills': 0, 'midway': 0, 'wrong': 0, 'unequal': 0, 'left': 0}
  draws = random.Random(int(more[0]) if more else 0)

  def judge():
    """After a kill: there is nothing, or all of it."""
    incomplete = folder / 'out.incomplete'
    seen['midway'] += incomplete.exists()
    if out.exists():
      seen['wrong'] += contents(out) != right
    else:
      try:
        records.open_folder(out)
        seen['wrong'] += 1
      except ValueError:
        pass

  def finish():
    if not out.exists():
      assert child(work)
    seen['unequal'] += contents(out) != right
    seen['left'] += sorted(os.listdir(folder)) != ['out']
    shutil.rmtree(out)

  if mode == 'random':
    while seen['kills'] < int(more[1]):
      # Some builds are killed more than once.
      if not child(work, seconds=draws.uniform(0, duration)):
        seen['kills'] += 1
        judge()
      if out.exists() or draws.random() < 0.5:
        finish()
    if not out.exists():
      finish()
  else:
    step = 1
    while not child(work, step=step):
      seen['kills'] += 1
      judge()
      finish()
      step += 1
  print(json.dumps(seen))


if __name__ == '__main__':
  main()
