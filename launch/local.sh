#!/usr/bin/env bash
# One host: all its GPUs or TPU chips, or virtual CPU devices, in one process.
#
#   launch/local.sh --config=configs/sd15.py --workdir=runs/sd15 \
#     [OPTIONS] [-- --config.KEY=VALUE ...]
#
# --config=FILE       recipe
# --workdir=DIR       output folder; the same command continues a run
# --platform=NAME     gpu (default), tpu or cpu: whose compiler flags are set
# --cpu_devices=N     with --platform=cpu, so many virtual devices
# --python=FILE       interpreter (default: .venv/bin/python if there, else
#                     python3)
# --dry_run           print what would be done
# --help
#
# Exit codes are those of python -m dpo_jax.main; 4 is a run that was stopped
# by a signal and has saved its last step.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/xla_flags.sh
source "$here/xla_flags.sh"

config='' workdir='' platform=gpu cpu_devices=1 dry_run=false
python=python3
[[ -x $here/../.venv/bin/python ]] && python=$here/../.venv/bin/python
while [[ $# -gt 0 ]]; do
  case $1 in
    --config=*) config=$(take config "$1") ;;
    --workdir=*) workdir=$(take workdir "$1") ;;
    --platform=*) platform=$(take platform "$1") ;;
    --cpu_devices=*) cpu_devices=$(take cpu_devices "$1") ;;
    --python=*) python=$(take python "$1") ;;
    --dry_run) dry_run=true ;;
    --help) usage && exit 0 ;;
    --) shift && break ;;
    *) die "$1: no such option (--help lists them)" ;;
  esac
  shift
done
need config workdir
is_number cpu_devices

set_flags "$platform" "$(jax_version "$python" || true)"
settings=(DPO_JAX_DISTRIBUTED=off)
if [[ $platform == cpu ]]; then
  export XLA_FLAGS="--xla_force_host_platform_device_count=$cpu_devices ${XLA_FLAGS:-}"
  settings+=(JAX_PLATFORMS=cpu)
fi
if [[ $dry_run == true ]]; then
  settings+=("XLA_FLAGS=${XLA_FLAGS:-}")
fi
cd "$here/.."
run env "${settings[@]}" "$python" -m dpo_jax.main "--config=$config" \
  "--workdir=$workdir" "$@"
