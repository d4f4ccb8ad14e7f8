"""Devices to compile for that are not here: the one place that needs jax's
private parts, and says what to install where one is missing."""

import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from dpo_jax.planning import chips

# XLA's description of an H100 SXM: facts of the maker's data sheet and of
# cudaGetDeviceProperties.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def prepare(topology: chips.Topology) -> None:
  """Settings of the process; call it before jax touches a device."""
  jax.config.update('jax_platforms', 'cpu')
  if topology.kind == 'cpu':
    flags = os.environ.get('XLA_FLAGS', '')
    # Where jax is in use already, `make` counts what there is.
    os.environ['XLA_FLAGS'] = (
      f'{flags} --xla_force_host_platform_device_count={topology.num_chips}'
    )
  elif topology.chip.platform == 'tpu':
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    # Without these libtpu looks for a TPU's host, and complains of none.
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    os.environ.setdefault('TPU_WORKER_ID', '0')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  else:
    os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
    # There is no GPU to try kernels on; and Triton's products, untried, have
    # no tiles for some sizes.
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = (
      f'{flags} --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false'
    )


def make(topology: chips.Topology, *, slices: int = 1) -> Sequence[jax.Device]:
  """The devices of so many slices; of 'cpu' this machine's virtual ones.

  Raises ValueError where they cannot be made here, with what to install.
  """
  if topology.kind == 'cpu':
    found = jax.devices('cpu')[: topology.num_chips]
    if len(found) < topology.num_chips:
      raise ValueError(
        f'--topology={topology.name}: this process has {len(found)} devices; '
        'call it in a process of its own'
      )
    return found
  make_some = _tpu if topology.chip.platform == 'tpu' else _gpu
  try:
    return make_some(topology, slices)
  except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError) as e:
    raise ValueError(
      f'--topology={topology.name}: {" ".join(str(e).split())[:300]}'
    ) from e


def _tpu(topology, slices):
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      f'--topology={topology.name}: needs the TPU compiler: pip install '
      f"'jax[tpu]=={jax.__version__}' (it runs without a TPU)"
    )
  options = {'num_slices': slices}
  if topology.num_chips == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  found = topologies.get_topology_desc(topology.name, platform='tpu', **options)
  return found.devices


def _gpu(topology, slices):
  # Only backends that jax_platforms names are looked for otherwise.
  from jax._src import xla_bridge

  if importlib.util.find_spec('jax_cuda12_plugin') is None:
    raise ValueError(
      f'--topology={topology.name}: needs the GPU compiler: pip install '
      f"'jax[cuda12]=={jax.__version__}' (5.5 GB; it runs without a GPU)"
    )
  discover = getattr(
    xla_bridge, '_discover_and_register_pjrt_plugins', lambda: None
  )
  discover()
  found = topologies.get_topology_desc(
    topology.name,
    platform='cuda',
    topology=f'{slices}x{topology.num_chips}x1',
    target_config=H100,
  )
  return found.devices
