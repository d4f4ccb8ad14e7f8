#!/usr/bin/env bash
# A Cloud TPU slice as a queued resource: create, install, run, delete.
#
#   launch/tpu_pod.sh run --name=NAME --zone=ZONE --type=v5litepod-256 \
#     --config=configs/sdxl.py --workdir=gs://BUCKET/sdxl [OPTIONS] \
#     [-- --config.KEY=VALUE ...]
#
# run      creates the slice if there is none, installs this working tree on
#          every worker, runs there, and after a preemption does all of it
#          again; the workdir has the checkpoints the run continues from
# create, install, delete   single parts of it
#
# --name=NAME         of the slice
# --zone=ZONE         Google Cloud zone
# --type=TYPE         accelerator type, for instance v5litepod-256, v6e-64
# --runtime=VERSION   software of the hosts (default v2-alpha-tpuv5-lite for
#                     v5litepod, v2-alpha-tpuv6e for v6e, else
#                     tpu-ubuntu2204-base)
# --project=ID        default: gcloud's
# --spot              spot capacity, which may be taken away
# --config=FILE       recipe (run)
# --workdir=DIR       output folder (run): gs://BUCKET/RUN, or a folder on a
#                     file system that every worker mounts under this name,
#                     such as Filestore; mount it in --setup
# --setup=COMMAND     shell command for every worker, before the install
# --delete_after      delete the slice when the run is done (run)
# --dry_run           print what would be done
# --help
#
# Exit codes: that of the run (0, 2 or 3), 1 where gcloud failed. Start it
# where the connection lasts, in tmux for instance.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

name='' zone='' type='' runtime='' project='' spot=false config='' workdir=''
setup='' delete_after=false dry_run=false
case ${1:-} in
  create | install | run | delete) action=$1 ;;
  --help) usage && exit 0 ;;
  *) die "${1:-nothing}: the first word is run, create, install or delete" ;;
esac
shift
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=$(take name "$1") ;;
    --zone=*) zone=$(take zone "$1") ;;
    --type=*) type=$(take type "$1") ;;
    --runtime=*) runtime=$(take runtime "$1") ;;
    --project=*) project=$(take project "$1") ;;
    --spot) spot=true ;;
    --config=*) config=$(take config "$1") ;;
    --workdir=*) workdir=$(take workdir "$1") ;;
    --setup=*) setup=$(take setup "$1") ;;
    --delete_after) delete_after=true ;;
    --dry_run) dry_run=true ;;
    --help) usage && exit 0 ;;
    --) shift && break ;;
    *) die "$1: no such option (--help lists them)" ;;
  esac
  shift
done
need name zone
[[ $action == install || $action == delete ]] || need type
[[ $action != run ]] || need config workdir
if [[ -z $runtime ]]; then
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
fi
place=("--zone=$zone")
[[ -z $project ]] || place+=("--project=$project")

state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    '--format=value(state.state)' 2>/dev/null || echo NONE
}

create() {
  local options=("--node-id=$name" "--accelerator-type=$type"
    "--runtime-version=$runtime")
  [[ $spot == false ]] || options+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" \
    "${options[@]}"
  if [[ $dry_run == true ]]; then
    echo "# wait until its state is ACTIVE"
    return
  fi
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED) die "$name: the slice could not be created" ;;
    esac
    sleep 30
  done
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" \
    --force --quiet
}

on_all() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
    "--command=$1"
}

install() {
  local archive=${TMPDIR:-/tmp}/dpo_jax-$name.tar.gz
  [[ -z $setup ]] || on_all "$setup"
  # The files as they are here, changes included.
  run tar -czf "$archive" -C "$here/.." configs dpo_jax examples launch \
    requirements setup.py pyproject.toml README.md
  run gcloud compute tpus tpu-vm scp "$archive" "$name:dpo_jax.tar.gz" \
    "${place[@]}" --worker=all
  on_all 'rm -rf dpo_jax && mkdir dpo_jax && tar -xzf dpo_jax.tar.gz -C dpo_jax && cd dpo_jax && python3 -m venv .venv && .venv/bin/pip install -q -U pip && .venv/bin/pip install -q -e ".[tpu,gcs]"'
}

train() {
  local words
  words=$(quoted .venv/bin/python -m dpo_jax.main "--config=$config" \
    "--workdir=$workdir" "$@")
  # The code is said, for ssh to several workers does not pass it on.
  on_all "cd dpo_jax && . launch/common.sh && . launch/xla_flags.sh && set_flags tpu \"\$(jax_version .venv/bin/python)\" && { DPO_JAX_DISTRIBUTED=auto $words; echo \"dpo_jax exit code \$?\"; }"
}

# Runs until the run is done, has failed, or will not come back.
train_until_done() {
  local log now code stopped=true installed=false
  log=$(mktemp)
  while true; do
    now=$(state)
    if [[ $now != ACTIVE ]]; then
      # What was taken away stays as a husk that must go first.
      [[ $now == NONE ]] || delete
      create
      install
    elif [[ $stopped == false ]]; then
      # The slice is there and the run was not stopped by a signal.
      return 1
    elif [[ $installed == false ]]; then
      install
    fi
    installed=true
    train "$@" 2>&1 | tee "$log" || true
    for code in 2 3; do
      if grep -q "dpo_jax exit code $code" "$log"; then
        return "$code"
      fi
    done
    if grep -q 'dpo_jax exit code 0' "$log" &&
      ! grep -q 'dpo_jax exit code [1-9]' "$log"; then
      return 0
    fi
    stopped=false
    if grep -q 'dpo_jax exit code 4' "$log"; then
      stopped=true
    fi
    # What was just taken away may look alive for a moment.
    sleep 30
  done
}

case $action in
  create) create ;;
  install) install ;;
  delete) delete ;;
  run)
    if [[ $dry_run == true ]]; then
      echo "# if there is no slice, or it was taken away (delete it first):"
      create
      install
      echo "# on every worker, again after a preemption:"
      train "$@"
      code=0
    else
      code=0
      train_until_done "$@" || code=$?
    fi
    if [[ $delete_after == true ]]; then
      delete
    fi
    exit "$code"
    ;;
esac
