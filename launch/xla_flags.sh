# Flags of the compiler by platform; source it, do not run it.
# shellcheck shell=bash
#
# A flag that a version does not know ends the process, so only versions for
# which these were seen accepted get them. Those for GPU: by the CPU builds of
# jaxlib 0.10.2 and 0.12.0, which read the same list; what they gain on a GPU
# was not measured. Those for TPU: by libtpu 0.0.42, compiling for v5e:2x2
# without a chip. They are its defaults; with any of them off, the collectives
# of a sharded product no longer run beside it. tests/test_launch.py tries
# both lists on what is installed. What the environment has already comes last
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
        0.10 | 0.12)
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
      # Logs stay off the boot disk.
      export TPU_STDERR_LOG_LEVEL=${TPU_STDERR_LOG_LEVEL:-2}
      case $version in
        0.10)
          flags=(
            # Collectives are started early and awaited late.
            --xla_tpu_enable_latency_hiding_scheduler=true
            # Products run while the weights for the next are gathered.
            --xla_enable_async_all_gather=true
            --xla_tpu_enable_async_collective_fusion=true
            --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
            --xla_tpu_enable_async_collective_fusion_multiple_steps=true
            --xla_tpu_overlap_compute_collective_tc=true
          )
          ;;
        *) echo "jax ${version:-absent}: no TPU flags are known to suit it" >&2 ;;
      esac
      export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS:-}"
      flags=()
      ;;
    cpu) ;;
    *) die "platform $platform: allowed are gpu, tpu, cpu" ;;
  esac
  if [[ ${#flags[@]} -gt 0 ]]; then
    export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"
  fi
}
