#!/usr/bin/env bash
# The job of launch/slurm.sh, in the repository's folder on the first node:
#
#   slurm_job.sh PYTHON ARGUMENTS OF dpo_jax.main ...

set -uo pipefail
# SLURM runs a copy of this file that lies elsewhere.
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/xla_flags.sh
source launch/xla_flags.sh

python=$1
shift
set_flags gpu "$(jax_version "$python" || true)"
# JAX reads the rest of its settings from SLURM's variables; each process gets
# the GPU of its number on the node.
export DPO_JAX_DISTRIBUTED=auto
# Not --kill-on-bad-exit: a process that has saved would end the others.
srun --kill-on-bad-exit=0 "$python" -m dpo_jax.main "$@"
code=$?
echo "dpo_jax exit code $code"
if [[ $code -eq 4 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
