# Flags of the compiler by platform; source it, do not run it.
# shellcheck shell=bash
#
# A flag that a version does not know kills the process, so none are set for
# versions other than those that were tried (tests/test_launch.py tries those
# for GPU on the installed one). What the environment has already comes last
# and wins.

# jax_version PYTHON: "0.10" of the installed one, '' without one.
jax_version() {
  "$1" -c 'from importlib import metadata
print(".".join(metadata.version("jax").split(".")[:2]))' 2>/dev/null
}

# set_flags PLATFORM VERSION: exports what suits gpu, tpu or cpu.
set_flags() {
  local platform=$1 version=$2 flags=()
  # What was compiled once is found again after a restart.
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/dpo_jax/xla}
  case $platform in
    gpu)
      # The state is one big tree: leave little to fragments, and room for
      # NCCL and cuDNN beside XLA's pool.
      export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
      case $version in
        0.10 | 0.11 | 0.12)
          flags=(
            # Collectives of FSDP run beside the layers that do not need them.
            --xla_gpu_enable_latency_hiding_scheduler=true
            # Gradients of small leaves travel together: 256 MiB a collective.
            --xla_gpu_all_reduce_combine_threshold_bytes=268435456
          )
          ;;
        *) echo "jax ${version:-absent}: no XLA flags are known to suit it" >&2 ;;
      esac
      ;;
    tpu)
      # libtpu's defaults overlap collectives already; its flags change from
      # release to release, so none are set. Logs stay off the boot disk.
      export TPU_STDERR_LOG_LEVEL=${TPU_STDERR_LOG_LEVEL:-2}
      ;;
    cpu) ;;
    *) die "platform $platform: allowed are gpu, tpu, cpu" ;;
  esac
  if [[ ${#flags[@]} -gt 0 ]]; then
    export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"
  fi
}
