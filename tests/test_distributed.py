"""Settings of several processes, and signals in one."""

import json
import os
import signal

import jax
import pytest

from dpo_jax import distributed, main
from dpo_jax.train import feed, preemption

THREE = {
  'DPO_JAX_COORDINATOR': 'host:1234',
  'DPO_JAX_NUM_PROCESSES': '4',
  'DPO_JAX_PROCESS_ID': '3',
}
SLURM = {
  'SLURM_JOB_ID': '1',
  'SLURM_NTASKS': '2',
  'SLURM_STEP_NODELIST': 'node[1-2]',
}


def test_three_variables_say_it_all():
  settings = distributed.read_settings(THREE)
  assert settings == distributed.Settings('host:1234', 4, 3, 100)
  slow = THREE | {'DPO_JAX_HEARTBEAT_SECONDS': '7'}
  assert distributed.read_settings(slow).heartbeat_seconds == 7
  assert distributed.read_settings(THREE | {'DPO_JAX_DISTRIBUTED': 'off'}) is (
    None
  )


@pytest.mark.parametrize(
  ('environment', 'several'),
  [
    ({}, False),
    (SLURM, True),
    (SLURM | {'SLURM_NTASKS': '1'}, False),
    # A shell within an allocation is no task of it.
    ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '8'}, False),
    (SLURM | {'DPO_JAX_DISTRIBUTED': 'off'}, False),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, False),
    ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ({'MEGASCALE_COORDINATOR_ADDRESS': 'a'}, True),
    ({'DPO_JAX_DISTRIBUTED': 'auto'}, True),
  ],
)
def test_clusters_are_left_to_jax(environment, several):
  settings = distributed.read_settings(environment)
  assert settings == (distributed.Settings() if several else None)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'DPO_JAX_PROCESS_ID': ''}, 'DPO_JAX_PROCESS_ID is missing'),
    ({'DPO_JAX_COORDINATOR': 'host'}, 'COORDINATOR=host: must be HOST:PORT'),
    ({'DPO_JAX_NUM_PROCESSES': '0'}, 'NUM_PROCESSES=0: .* at least 1'),
    ({'DPO_JAX_PROCESS_ID': 'x'}, 'PROCESS_ID=x: must be a whole number'),
    ({'DPO_JAX_PROCESS_ID': '4'}, 'PROCESS_ID=4: must be below .*=4'),
    ({'DPO_JAX_DISTRIBUTED': 'on'}, 'DISTRIBUTED=on: allowed are auto, off'),
    ({'DPO_JAX_HEARTBEAT_SECONDS': '0'}, 'HEARTBEAT_SECONDS=0: .* least 1'),
  ],
)
def test_wrong_settings_are_named(changes, words):
  with pytest.raises(ValueError, match=words):
    distributed.read_settings(THREE | changes)


def test_flags_come_before_the_environment():
  argv = ['main', '--coordinator=b:2', '--process_id', '1', '--workdir=x']
  rest, environment = distributed.take_flags(argv, THREE)
  assert rest == ['main', '--workdir=x']
  settings = distributed.read_settings(environment)
  assert settings == distributed.Settings('b:2', 4, 1)
  with pytest.raises(ValueError, match='--process_id: the value is missing'):
    distributed.take_flags(['main', '--process_id'], {})


def test_processes_that_are_not_found_are_one_line(monkeypatch):
  def initialize(**unused):
    raise RuntimeError('no\ncoordinator')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  monkeypatch.setattr(jax.config, 'update', lambda *unused: None)
  with pytest.raises(ValueError, match=r'\(no coordinator\)') as error:
    distributed.start(distributed.Settings())
  assert 'launch/' in str(error.value) and '\n' not in str(error.value)


def test_processes_that_were_not_joined_are_refused(monkeypatch):
  distributed.check_started()
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='DPO_JAX_DISTRIBUTED=auto'):
    distributed.check_started()


def test_a_failure_elsewhere_is_a_failure_here(monkeypatch):
  with distributed.together():
    pass
  answers = []

  def agree(good):
    answers.append(good)
    return [1]

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed, '_agree', agree)
  with pytest.raises(distributed.OtherProcessError, match='process 1 failed'):
    with distributed.together():
      pass
  with pytest.raises(KeyError), distributed.together():
    raise KeyError
  assert answers == [True, False]


def test_a_program_runs_once_all_have_compiled_it(monkeypatch):
  jitted = jax.jit(lambda x: x + 1)
  assert distributed.run_together(jitted) is jitted
  waits = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed, 'wait_for_all', lambda: waits.append(1))
  run = distributed.run_together(jitted)
  assert run(1) == 2 and run(2) == 3
  assert len(waits) == 1


def test_signals_wait_for_the_step():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.Watch() as watch:
    with watch.looping():
      assert not watch.reached(1)
      os.kill(os.getpid(), signal.SIGTERM)
      assert watch.reached(2)
      with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(preemption.Preempted, match='outside'):
      os.kill(os.getpid(), signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) is before


SIX = {
  'train__num_steps': 6,
  'train__log_every': 4,
  'train__checkpoint_every': 4,
}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Makes the run of six steps in one go, once; its folder."""
  folder = tmp_path_factory.mktemp('whole') / 'run'

  def run(small_arguments):
    if not folder.exists():
      assert main.run(small_arguments(folder, **SIX)) == 0
    return folder

  return run


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_log_has_no_seam(
  small_arguments, tmp_path, capsys, monkeypatch, whole, number
):
  """Stopped within a log window, then after a step that is saved anyway."""
  argv = small_arguments(tmp_path, **SIX)
  waits = []
  monkeypatch.setattr(distributed, 'wait_for_all', lambda: waits.append(1))
  real = feed.Feed.take
  for count, step in ((3, 3), (1, 4)):
    taken = []

    def take(self, count=count, taken=taken):
      taken.append(1)
      if len(taken) == count:
        os.kill(os.getpid(), number)
      return real(self)

    with monkeypatch.context() as patch:
      patch.setattr(feed.Feed, 'take', take)
      assert main.run(argv) == 4
    said = capsys.readouterr().err
    (line,) = (x for x in said.splitlines() if 'stopped by a signal' in x)
    assert f'after step {step}, which is saved' in line
    assert (tmp_path / 'checkpoints' / str(step)).is_dir()
  assert main.run(argv) == 0
  # Once a go, between compiling and the first step.
  assert len(waits) == 3
  for name in ('final.json', 'metrics.jsonl'):
    texts = [(f / name).read_text() for f in (whole(small_arguments), tmp_path)]
    assert _numbers(texts[0]) == _numbers(texts[1])


def _numbers(text):
  """The JSON without what the clock says."""
  if text.startswith('{\n'):
    return json.loads(text)
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith('time/')}
    for line in text.splitlines()
  ]
