"""Where compiled programs are kept, and that they are."""

import os
import subprocess
import sys

import jax
import pytest

from dpo_jax.train import compile_cache


@pytest.mark.parametrize(
  ('folder', 'platform', 'told', 'chosen'),
  [
    ('auto', 'tpu', None, 'gs://b/run/compiled'),
    ('auto', 'gpu', None, 'gs://b/run/compiled'),
    ('auto', 'tpu', '/some/cache', None),
    ('auto', 'cpu', None, None),
    ('', 'tpu', None, None),
    ('/mine', 'cpu', '/some/cache', '/mine'),
  ],
)
def test_the_folder(folder, platform, told, chosen):
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', told)
  try:
    found = compile_cache.choose(
      folder, workdir='gs://b/run', platform=platform
    )
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
  assert found == chosen


def test_programs_are_kept_though_some_were_compiled_before(tmp_path):
  script = (
    'import jax, sys; from dpo_jax.train import compile_cache as c;'
    'jax.jit(lambda x: x + 1)(1.0);'
    "c.start(sys.argv[1], workdir='.');"
    "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0);"
    'jax.jit(lambda x: x * 3)(1.0)'
  )
  env = {
    name: value
    for name, value in os.environ.items()
    if name != 'JAX_COMPILATION_CACHE_DIR'
  }
  folder = tmp_path / 'kept'
  subprocess.run(
    [sys.executable, '-c', script, str(folder)], env=env, check=True
  )
  assert [path.name for path in folder.iterdir() if 'jit' in path.name]
