"""Launchers: what they would do, their help, and the flags they set."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'
RUN = ['--config=configs/sdxl.py', '--workdir=/shared/run']
COMMANDS = {
  'local.sh': [*RUN],
  'slurm.sh': [*RUN, '--nodes=4', '--partition=gpu'],
  'tpu_pod.sh': [
    'run',
    *RUN,
    '--name=pod',
    '--zone=us-east5-a',
    '--type=v6e-64',
    '--spot',
  ],
  'gke_jobset.sh': [
    *RUN,
    '--name=sdxl',
    '--image=r/dpo_jax:1',
    '--claim=c',
    '--tpu=tpu-v5-lite-podslice',
    '--topology=16x16',
  ],
}


def _run(script, *words, **environment):
  settings = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return subprocess.run(
    ['bash', LAUNCH / script, *words],
    capture_output=True,
    text=True,
    env=settings | environment,
    check=False,
  )


def _dry(script, *words, **environment):
  done = _run(script, *words, '--dry_run', **environment)
  assert done.returncode == 0, done.stderr
  return done.stdout


def _dry_with_overrides(script, *words):
  """Overrides whose spaces and quotes must arrive as they are."""
  command = [*COMMANDS[script], *words, '--dry_run', '--', "--config.a=it's b"]
  done = _run(script, *command)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_a_single_host_runs_the_command():
  words = shlex.split(_dry_with_overrides('local.sh', '--platform=tpu'))
  assert words[0] == 'env' and 'DPO_JAX_DISTRIBUTED=off' in words
  start = words.index('-m')
  assert words[start + 1 :] == ['dpo_jax.main', *RUN, "--config.a=it's b"]


def test_a_single_host_with_virtual_devices_really_runs(tmp_path):
  words = ['--platform=cpu', '--cpu_devices=3', f'--python={sys.executable}']
  shown = shlex.split(_dry('local.sh', *RUN, *words))
  assert 'JAX_PLATFORMS=cpu' in shown
  assert any('device_count=3' in word for word in shown)
  done = _run(
    'local.sh',
    '--config=configs/sd15.py',
    f'--workdir={tmp_path}',
    *words,
    '--',
    '--config.optim.l=1',
  )
  # The run's own words and code come through.
  assert done.returncode == 2
  assert 'did you mean optim.lr?' in done.stderr


def test_slurm_submits_a_job_that_requeues():
  words = shlex.split(_dry_with_overrides('slurm.sh'))
  assert words[0] == 'sbatch'
  for option in (
    '--nodes=4',
    '--ntasks-per-node=8',
    '--gpus-per-node=8',
    '--signal=TERM@180',
    '--requeue',
    '--partition=gpu',
  ):
    assert option in words
  assert words[-3:] == [*RUN, "--config.a=it's b"]
  assert not any(word.startswith('--account') for word in words)


@pytest.mark.parametrize(('code', 'requeued'), [(0, 0), (2, 0), (3, 0), (4, 1)])
def test_the_slurm_job_requeues_after_a_signal_only(tmp_path, code, requeued):
  """With srun and scontrol that write down how they were called."""
  for name, result in (('srun', code), ('scontrol', 0)):
    tool = tmp_path / name
    tool.write_text(
      f'#!/bin/bash\nprintf "%s\\n" "{name}" "$@" >> {tmp_path}/calls\n'
      f'echo "$DPO_JAX_DISTRIBUTED" >> {tmp_path}/mode\nexit {result}\n'
    )
    tool.chmod(0o755)
  done = subprocess.run(
    ['bash', LAUNCH / 'slurm_job.sh', sys.executable, "--config.a=it's b"],
    cwd=ROOT,
    env=os.environ
    | {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '77'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == code, done.stderr
  calls = (tmp_path / 'calls').read_text().splitlines()
  assert calls[:2] == ['srun', '--kill-on-bad-exit=0']
  assert calls[2:6] == [
    sys.executable,
    '-m',
    'dpo_jax.main',
    "--config.a=it's b",
  ]
  assert calls[6:] == ['scontrol', 'requeue', '77'] * requeued
  assert (tmp_path / 'mode').read_text().startswith('auto')


def test_a_tpu_slice_is_made_installed_run_and_deleted():
  text = _dry_with_overrides('tpu_pod.sh', '--delete_after', '--project=p')
  lines = [
    shlex.split(line) for line in text.splitlines() if not line.startswith('#')
  ]
  parts = [line[3:5] if line[0] == 'gcloud' else line[:1] for line in lines]
  assert parts == [
    ['queued-resources', 'create'],
    ['tar'],
    ['tpu-vm', 'scp'],
    ['tpu-vm', 'ssh'],
    ['tpu-vm', 'ssh'],
    ['queued-resources', 'delete'],
  ]
  assert {'--spot', '--accelerator-type=v6e-64', '--project=p'} <= {*lines[0]}
  assert '--runtime-version=v2-alpha-tpuv6e' in lines[0]
  for line in lines[2:5]:
    assert '--worker=all' in line
  (command,) = (w for w in lines[4] if w.startswith('--command='))
  inner = shlex.split(command)
  start = inner.index('dpo_jax.main')
  assert inner[start + 1 : start + 4] == [*RUN, "--config.a=it's b;"]
  assert 'DPO_JAX_DISTRIBUTED=auto' in inner


def _fake_gcloud(tmp_path, states, codes):
  """gcloud that tells these states and ends runs with these codes in turn."""
  (tmp_path / 'states').write_text('\n'.join(states) + '\n')
  (tmp_path / 'codes').write_text('\n'.join(codes) + '\n')
  tool = tmp_path / 'gcloud'
  tool.write_text(f"""#!/bin/bash
cd {tmp_path}
next() {{ head -1 "$1"; [[ $(wc -l < "$1") -eq 1 ]] || sed -i 1d "$1"; }}
echo "$3 $4" >> calls
case "$*" in
  *describe*) next states ;;
  *dpo_jax.main*) echo "dpo_jax exit code $(next codes)" ;;
esac
""")
  tool.chmod(0o755)
  sleep = tmp_path / 'sleep'
  sleep.write_text('#!/bin/bash\n')
  sleep.chmod(0o755)


def _calls(tmp_path):
  lines = (tmp_path / 'calls').read_text().splitlines()
  return [line.split()[-1] for line in lines if 'describe' not in line]


def test_a_tpu_run_continues_after_a_preemption(tmp_path):
  _fake_gcloud(
    tmp_path,
    # Not there; made; taken away during the run; made again; stopped by a
    # signal but there; run to the end.
    ['NONE', 'ACTIVE', 'SUSPENDED', 'CREATING', 'ACTIVE', 'ACTIVE'],
    ['4', '4', '0'],
  )
  path = f'{tmp_path}:{os.environ["PATH"]}'
  done = _run('tpu_pod.sh', *COMMANDS['tpu_pod.sh'], PATH=path)
  assert done.returncode == 0, done.stderr
  assert _calls(tmp_path) == [
    *('create', 'scp', 'ssh', 'ssh'),
    *('delete', 'create', 'scp', 'ssh', 'ssh'),
    'ssh',
  ]


@pytest.mark.parametrize(('code', 'result'), [(2, 2), (3, 3), (1, 1), (9, 1)])
def test_a_tpu_run_that_failed_is_not_repeated(tmp_path, code, result):
  _fake_gcloud(tmp_path, ['ACTIVE'], [str(code)])
  path = f'{tmp_path}:{os.environ["PATH"]}'
  done = _run('tpu_pod.sh', *COMMANDS['tpu_pod.sh'], PATH=path)
  assert done.returncode == result
  assert _calls(tmp_path) == ['scp', 'ssh', 'ssh']


def _manifest(*words):
  command = [*COMMANDS['gke_jobset.sh'], *words]
  if any(word.startswith('--gpu=') for word in words):
    command = [w for w in command if not re.match('--(tpu|topology)', w)]
  done = _run('gke_jobset.sh', *command, '--dry_run', '--', "--config.a=it's b")
  assert done.returncode == 0, done.stderr
  return yaml.safe_load(done.stdout)


def _job(manifest):
  (job,) = manifest['spec']['replicatedJobs']
  return job['replicas'], job['template']['spec']


def test_a_jobset_of_tpu_slices():
  manifest = _manifest('--slices=2', '--service_account=trainer')
  assert manifest['kind'] == 'JobSet'
  replicas, job = _job(manifest)
  assert replicas == 2 and job['parallelism'] == job['completions'] == 64
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['values'] == [2, 3]
  pod = job['template']['spec']
  assert pod['serviceAccountName'] == 'trainer'
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '16x16',
  }
  (container,) = pod['containers']
  assert container['name'] == rule['onExitCodes']['containerName']
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert {'name': 'DPO_JAX_DISTRIBUTED', 'value': 'auto'} in container['env']
  words = shlex.split(container['args'][0])
  assert words[-4:] == ['dpo_jax.main', *RUN, "--config.a=it's b"]


def test_a_jobset_mounts_a_claim_unless_the_run_is_in_a_bucket():
  pod = _job(_manifest())[1]['template']['spec']
  (volume,) = pod['volumes']
  assert volume['persistentVolumeClaim'] == {'claimName': 'c'}
  (mount,) = pod['containers'][0]['volumeMounts']
  assert mount == {'name': volume['name'], 'mountPath': '/shared'}
  words = [w for w in COMMANDS['gke_jobset.sh'] if 'claim' not in w]
  done = _run('gke_jobset.sh', *words, '--workdir=gs://b/run', '--dry_run')
  assert done.returncode == 0, done.stderr
  pod = _job(yaml.safe_load(done.stdout))[1]['template']['spec']
  assert 'volumes' not in pod and 'volumeMounts' not in pod['containers'][0]
  done = _run('gke_jobset.sh', *words, '--dry_run')
  assert done.returncode == 2 and '--claim is missing' in done.stderr


def test_a_jobset_of_gpu_nodes_names_the_coordinator():
  _, job = _job(_manifest('--gpu=nvidia-h100-80gb', '--nodes=2'))
  assert job['parallelism'] == 2
  (container,) = job['template']['spec']['containers']
  assert container['resources']['limits'] == {'nvidia.com/gpu': 8}
  env = {entry['name']: entry for entry in container['env']}
  assert env['DPO_JAX_COORDINATOR']['value'] == 'sdxl-worker-0-0.sdxl:8476'
  assert env['DPO_JAX_NUM_PROCESSES']['value'] == '2'
  source = env['DPO_JAX_PROCESS_ID']['valueFrom']['fieldRef']['fieldPath']
  assert 'job-completion-index' in source


@pytest.mark.parametrize('script', sorted(COMMANDS))
def test_help_explains_every_argument(script):
  done = _run(script, '--help')
  assert done.returncode == 0
  text = (LAUNCH / script).read_text()
  options = re.findall(r'^    (--[a-z_]+)(?:=\*)?\)', text, re.M)
  assert len(options) > 5
  for option in options:
    assert re.search(rf'{option}\b', done.stdout), option


@pytest.mark.parametrize(
  ('script', 'words', 'error'),
  [
    ('local.sh', ['--config=c'], '--workdir is missing'),
    ('local.sh', ['--confg=c'], '--confg=c: no such option'),
    ('local.sh', [*RUN, '--platform=xpu'], 'allowed are gpu, tpu, cpu'),
    ('slurm.sh', [*RUN, '--nodes=two'], '--nodes=two: must be a whole number'),
    ('slurm.sh', [*RUN, '--nodes='], '--nodes: the value is missing'),
    ('tpu_pod.sh', ['start'], 'start: the first word is run'),
    ('tpu_pod.sh', ['run', '--name=a', '--zone=b'], '--type is missing'),
    ('gke_jobset.sh', [*RUN, '--name=A', '--image=i', '--claim=c'], '--name=A'),
    (
      'gke_jobset.sh',
      [*RUN, '--name=a', '--image=i', '--claim=c'],
      'one of --tpu and --gpu',
    ),
    (
      'gke_jobset.sh',
      [*RUN, '--name=a', '--image=i', '--claim=c', '--tpu=t', '--topology=3x3'],
      '9 chips are not a multiple',
    ),
  ],
)
def test_wrong_arguments_are_one_line(script, words, error):
  done = _run(script, *words, '--dry_run')
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and error in line
