#!/usr/bin/env bash
# SLURM, GPU nodes: submits one job, one process a GPU, that requeues itself.
#
#   launch/slurm.sh --config=configs/sdxl.py --workdir=/shared/runs/sdxl \
#     --nodes=4 --gpus_per_node=8 [OPTIONS] [-- --config.KEY=VALUE ...]
#
# --config=FILE        recipe
# --workdir=DIR        output folder, on a file system that all nodes share, or
#                      gs://BUCKET/RUN
# --nodes=N            nodes (default 1)
# --gpus_per_node=N    GPUs a node (default 8); one process each
# --cpus_per_gpu=N     cores for each process (default 8)
# --time=TIME          limit of one go (default 24:00:00)
# --name=NAME          of the job (default dpo_jax)
# --partition=NAME     --account=NAME   --qos=NAME   as for sbatch
# --signal_seconds=N   SIGTERM so long before the limit (default 180)
# --python=FILE        interpreter on the nodes (default: .venv/bin/python)
# --dry_run            print what would be done
# --help
#
# The job goes on after a preemption, a node that failed or the time limit: it
# requeues itself while the run's exit code is 4 (stopped by a signal, the last
# step is saved) and SLURM requeues it when it takes nodes away.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

config='' workdir='' nodes=1 gpus_per_node=8 cpus_per_gpu=8 time=24:00:00
name=dpo_jax partition='' account='' qos='' signal_seconds=180 dry_run=false
python=$(cd "$here/.." && pwd)/.venv/bin/python
while [[ $# -gt 0 ]]; do
  case $1 in
    --config=*) config=$(take config "$1") ;;
    --workdir=*) workdir=$(take workdir "$1") ;;
    --nodes=*) nodes=$(take nodes "$1") ;;
    --gpus_per_node=*) gpus_per_node=$(take gpus_per_node "$1") ;;
    --cpus_per_gpu=*) cpus_per_gpu=$(take cpus_per_gpu "$1") ;;
    --time=*) time=$(take time "$1") ;;
    --name=*) name=$(take name "$1") ;;
    --partition=*) partition=$(take partition "$1") ;;
    --account=*) account=$(take account "$1") ;;
    --qos=*) qos=$(take qos "$1") ;;
    --signal_seconds=*) signal_seconds=$(take signal_seconds "$1") ;;
    --python=*) python=$(take python "$1") ;;
    --dry_run) dry_run=true ;;
    --help) usage && exit 0 ;;
    --) shift && break ;;
    *) die "$1: no such option (--help lists them)" ;;
  esac
  shift
done
need config workdir
is_number nodes gpus_per_node cpus_per_gpu signal_seconds

options=(
  "--job-name=$name"
  "--nodes=$nodes"
  "--ntasks-per-node=$gpus_per_node"
  "--gpus-per-node=$gpus_per_node"
  "--cpus-per-task=$cpus_per_gpu"
  "--time=$time"
  # Without B: the signal goes to the processes, not to the script.
  "--signal=TERM@$signal_seconds"
  --requeue
  # One log over all goes.
  --open-mode=append
  "--output=$name-%j.log"
  "--chdir=$(cd "$here/.." && pwd)"
)
[[ -z $partition ]] || options+=("--partition=$partition")
[[ -z $account ]] || options+=("--account=$account")
[[ -z $qos ]] || options+=("--qos=$qos")
run sbatch "${options[@]}" "$here/slurm_job.sh" "$python" \
  "--config=$config" "--workdir=$workdir" "$@"
