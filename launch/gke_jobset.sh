#!/usr/bin/env bash
# GKE: a JobSet of TPU slices or GPU nodes, which starts again by itself.
#
#   launch/gke_jobset.sh --name=sdxl --image=REGISTRY/dpo_jax:TAG \
#     --config=configs/sdxl.py --workdir=/shared/runs/sdxl \
#     --claim=CLAIM --tpu=tpu-v5-lite-podslice --topology=16x16 [OPTIONS] \
#     [-- --config.KEY=VALUE ...]
#
# --name=NAME            of the JobSet
# --image=IMAGE          container with this repository as its working folder
# --config=FILE          recipe
# --workdir=DIR          output folder, below --mount, or gs://BUCKET/RUN
# --claim=NAME           persistent volume claim that many pods may write
#                        (Filestore, or a bucket by the gcsfuse driver); may
#                        be left out where the workdir is gs://
# --mount=DIR            where it is mounted (default /shared)
# --tpu=ACCELERATOR      value of cloud.google.com/gke-tpu-accelerator, with
# --topology=AxB[xC]     chips of a slice
# --chips_per_node=N     of these (default 4)
# --slices=N             slices (default 1)
# --gpu=ACCELERATOR      instead of --tpu: cloud.google.com/gke-accelerator,
#                        for instance nvidia-h100-80gb, with
# --nodes=N              GPU nodes (default 1), one process each
# --gpus_per_node=N      GPUs of a node (default 8)
# --restarts=N           at most (default 100)
# --service_account=NAME Kubernetes service account that may use the bucket
# --dry_run              print the manifest instead of applying it
# --help
#
# A pod that is taken away ends the job and the JobSet starts all of it again
# (exit code 4 or a lost node); a run that failed (exit codes 2 and 3) stays.
# kubectl delete jobset NAME removes it.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

name='' image='' config='' workdir='' tpu='' topology='' chips_per_node=4
slices=1 gpu='' nodes=1 gpus_per_node=8 restarts=100 service_account=''
claim='' mount=/shared dry_run=false
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=$(take name "$1") ;;
    --image=*) image=$(take image "$1") ;;
    --config=*) config=$(take config "$1") ;;
    --workdir=*) workdir=$(take workdir "$1") ;;
    --tpu=*) tpu=$(take tpu "$1") ;;
    --topology=*) topology=$(take topology "$1") ;;
    --chips_per_node=*) chips_per_node=$(take chips_per_node "$1") ;;
    --slices=*) slices=$(take slices "$1") ;;
    --gpu=*) gpu=$(take gpu "$1") ;;
    --nodes=*) nodes=$(take nodes "$1") ;;
    --gpus_per_node=*) gpus_per_node=$(take gpus_per_node "$1") ;;
    --restarts=*) restarts=$(take restarts "$1") ;;
    --service_account=*) service_account=$(take service_account "$1") ;;
    --claim=*) claim=$(take claim "$1") ;;
    --mount=*) mount=$(take mount "$1") ;;
    --dry_run) dry_run=true ;;
    --help) usage && exit 0 ;;
    --) shift && break ;;
    *) die "$1: no such option (--help lists them)" ;;
  esac
  shift
done
need name image config workdir
[[ $workdir == gs://* ]] || need claim
is_number chips_per_node slices nodes gpus_per_node restarts
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  die "--name=$name: must be small letters, digits and dashes"
if [[ -n $tpu && -n $gpu || -z $tpu && -z $gpu ]]; then
  die "give one of --tpu and --gpu"
fi

# A YAML string of any text.
yaml() {
  printf "'%s'" "${1//\'/\'\'}"
}

if [[ -n $tpu ]]; then
  need topology
  [[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]] ||
    die "--topology=$topology: must be like 16x16 or 4x4x8"
  chips=$((${topology//x/*}))
  ((chips % chips_per_node == 0)) ||
    die "--topology=$topology: $chips chips are not a multiple of --chips_per_node=$chips_per_node"
  pods=$((chips / chips_per_node)) platform=tpu
  resource=google.com/tpu count=$chips_per_node
  selector="cloud.google.com/gke-tpu-accelerator: $(yaml "$tpu")
              cloud.google.com/gke-tpu-topology: $(yaml "$topology")"
  # GKE tells the pods of a slice, and of several slices, about each other.
  settings="- {name: DPO_JAX_DISTRIBUTED, value: auto}"
else
  slices=1 pods=$nodes platform=gpu
  resource=nvidia.com/gpu count=$gpus_per_node
  selector="cloud.google.com/gke-accelerator: $(yaml "$gpu")"
  settings="- {name: DPO_JAX_COORDINATOR, value: $name-worker-0-0.$name:8476}
            - {name: DPO_JAX_NUM_PROCESSES, value: '$pods'}
            - name: DPO_JAX_PROCESS_ID
              valueFrom:
                fieldRef:
                  fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']"
fi
volume=''
if [[ -n $claim ]]; then
  volume="              volumeMounts:
              - {name: shared, mountPath: $(yaml "$mount")}
            volumes:
            - name: shared
              persistentVolumeClaim: {claimName: $(yaml "$claim")}"
fi
words=$(quoted python3 -m dpo_jax.main "--config=$config" \
  "--workdir=$workdir" "$@")
script=". launch/common.sh && . launch/xla_flags.sh && set_flags $platform \"\$(jax_version python3)\" && exec $words"

manifest() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # A slice, or the nodes of a job, belong to one job alone.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  network: {enableDNSHostnames: true}
  failurePolicy:
    maxRestarts: $restarts
    rules:
    # The input is wrong or the loss not finite: again would be the same.
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: worker
    replicas: $slices
    template:
      spec:
        parallelism: $pods
        completions: $pods
        completionMode: Indexed
        # All processes start again together, from the newest checkpoint.
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: dpo-jax, operator: In, values: [2, 3]}
        template:
          spec:
            restartPolicy: Never
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            # Between SIGTERM and the end: time to save the step.
            terminationGracePeriodSeconds: 300${service_account:+
            serviceAccountName: $service_account}
            nodeSelector:
              $selector
            containers:
            - name: dpo-jax
              image: $(yaml "$image")
              command: [bash, -c]
              args:
              - $(yaml "$script")
              env:
              ${settings//$'\n            '/$'\n              '}
              ports: [{containerPort: 8471}, {containerPort: 8476}]
              resources: {limits: {$resource: $count}}
$volume
END
}

if [[ $dry_run == true ]]; then
  manifest
else
  manifest | kubectl apply -f -
fi
