"""Several processes: how they find each other, agree, and part.

JAX's own runtime does the work; here is where its settings come from.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

COORDINATOR = 'DPO_JAX_COORDINATOR'
NUM_PROCESSES = 'DPO_JAX_NUM_PROCESSES'
PROCESS_ID = 'DPO_JAX_PROCESS_ID'
# auto: ask JAX, whatever the environment looks like. off: one process.
MODE = 'DPO_JAX_DISTRIBUTED'
HEARTBEAT = 'DPO_JAX_HEARTBEAT_SECONDS'
FLAGS = {
  '--coordinator': COORDINATOR,
  '--num_processes': NUM_PROCESSES,
  '--process_id': PROCESS_ID,
}
_MODES = ('auto', 'off')


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to start; None of a field is left to JAX's cluster detection."""

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  heartbeat_seconds: int = 100


class OtherProcessError(RuntimeError):
  """The run cannot go on because another process failed."""


def take_flags(
  argv: Sequence[str], environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
  """(argv without --coordinator, --num_processes and --process_id, settings).

  The settings are the environment with these flags in place of its variables.
  Raises ValueError for a flag without a value.
  """
  rest, found = [], dict(environment)
  words = iter(argv)
  for word in words:
    name, equals, value = word.partition('=')
    if name not in FLAGS:
      rest.append(word)
      continue
    value = value if equals else next(words, '')
    if not value:
      raise ValueError(f'{name}: the value is missing')
    found[FLAGS[name]] = value
  return rest, found


def read_settings(environment: Mapping[str, str]) -> Settings | None:
  """What the environment asks for; None is a single process.

  In order: DPO_JAX_DISTRIBUTED=off; the three DPO_JAX_ variables, which go
  together; DPO_JAX_DISTRIBUTED=auto; what tells of several processes: a step
  of SLURM with several tasks, Open MPI, JAX_COORDINATOR_ADDRESS, or the TPU
  variables of GKE. The rest is JAX's to find out.

  Raises ValueError naming the variable that is wrong or missing.
  """
  mode = environment.get(MODE, '')
  if mode and mode not in _MODES:
    raise ValueError(f'{MODE}={mode}: allowed are {", ".join(_MODES)}')
  heartbeat = _number(environment, HEARTBEAT, low=1) or 100
  if mode == 'off':
    return None
  names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
  given = [name for name in names if environment.get(name)]
  if given:
    missing = [name for name in names if name not in given]
    if missing:
      raise ValueError(
        f'{", ".join(missing)} is missing where {", ".join(given)} is given; '
        'give all three, or none'
      )
    return _explicit(environment, heartbeat)
  if mode == 'auto' or _is_cluster(environment):
    return Settings(heartbeat_seconds=heartbeat)
  return None


def _explicit(environment, heartbeat):
  address = environment[COORDINATOR]
  host, _, port = address.rpartition(':')
  if not host or not port.isdigit():
    raise ValueError(f'{COORDINATOR}={address}: must be HOST:PORT')
  count = _number(environment, NUM_PROCESSES, low=1)
  index = _number(environment, PROCESS_ID, low=0)
  if index >= count:
    raise ValueError(
      f'{PROCESS_ID}={index}: must be below {NUM_PROCESSES}={count}'
    )
  return Settings(address, count, index, heartbeat)


def _number(environment, name, *, low):
  text = environment.get(name, '')
  if not text:
    return None
  if not text.isdigit() or int(text) < low:
    raise ValueError(f'{name}={text}: must be a whole number, at least {low}')
  return int(text)


def _is_cluster(environment) -> bool:
  tasks = environment.get('SLURM_NTASKS', '1')
  # Only srun sets the step's nodes: a shell in an allocation is one process.
  if 'SLURM_STEP_NODELIST' in environment and tasks.isdigit():
    return int(tasks) > 1
  if environment.get('OMPI_COMM_WORLD_SIZE', '1') != '1':
    return True
  if 'JAX_COORDINATOR_ADDRESS' in environment:
    return True
  hosts = environment.get('TPU_WORKER_HOSTNAMES', '')
  return ',' in hosts or 'MEGASCALE_COORDINATOR_ADDRESS' in environment


def start(settings: Settings | None) -> None:
  """Joins the other processes; before anything asks JAX for its devices.

  Raises ValueError, in one line, when they cannot be found or reached.
  """
  if settings is None:
    return
  # Virtual CPU devices need it; other backends have collectives of their own.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(
      coordinator_address=settings.coordinator,
      num_processes=settings.num_processes,
      process_id=settings.process_id,
      heartbeat_timeout_seconds=settings.heartbeat_seconds,
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      'the processes did not find each other '
      f'({" ".join(str(error).split())[:300]}); on TPU, GKE and SLURM '
      f'start through launch/, elsewhere set {COORDINATOR}=HOST:PORT, '
      f'{NUM_PROCESSES} and {PROCESS_ID}, or {MODE}=off'
    ) from error


def join(argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
  """Joins the processes that flags and environment tell of, once.

  Returns argv without these flags. Errors are those of the parts above.
  """
  rest, environment = take_flags(argv, environment)
  if not jax.distributed.is_initialized():
    start(read_settings(environment))
  return rest


def check_started() -> None:
  """Raises ValueError where JAX sees several processes that were not joined.

  A TPU slice shows all its hosts' chips though nobody asked for it.
  """
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise ValueError(
      f'{jax.process_count()} processes share these devices but do not know '
      f'of each other; set {MODE}=auto on all of them'
    )


def is_primary() -> bool:
  """Whether this is the process that writes logs, reports and exports."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints to standard error, once and not once a process."""
  if is_primary():
    print(text, file=sys.stderr, flush=True)


def from_primary(record: Any) -> Any:
  """What process 0 gives, of JSON types, in all processes; all call it."""
  if jax.process_count() == 1:
    return record
  data = json.dumps(record).encode() if is_primary() else b''
  length = multihost_utils.broadcast_one_to_all(np.int32(len(data)))
  buffer = np.zeros(int(length), np.uint8)
  if is_primary():
    buffer[:] = np.frombuffer(data, np.uint8)
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer)))


def wait_for_all(*, seconds: int = 3600) -> None:
  """Returns once every process has come here.

  The coordination service waits as long as it is told. A program's first
  collective does not: between virtual CPU devices gloo gives up when one
  process comes 30 s after another, which compiling on a busy machine brings
  about.
  """
  wait = ocp.multihost.get_barrier_sync_fn()
  wait(key='dpo_jax.wait_for_all', timeout_ms=1000 * seconds)


def run_together(jitted: Callable) -> Callable:
  """The function; with several processes it runs once all have compiled it.

  It is then for arguments of the first call's shapes only.
  """
  if jax.process_count() == 1:
    return jitted
  compiled = []

  def run(*args):
    if not compiled:
      compiled.append(jitted.lower(*args).compile())
      wait_for_all()
    return compiled[0](*args)

  return run


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Fails on all processes if the body fails on any; used once a run.

  Else the others would wait for the one that failed until its heartbeat is
  missed. Where the body succeeded OtherProcessError is raised.
  """
  if jax.process_count() == 1:
    yield
    return
  try:
    yield
  except Exception:
    _agree(False)
    raise
  failed = _agree(True)
  if failed:
    raise OtherProcessError(
      f'process {jax.process_index()}: process '
      f'{", ".join(map(str, failed))} failed; its log says why'
    )


def _agree(good: bool) -> list[int]:
  """Indices of the processes for which it is not good."""
  wait_for_all()
  flags = multihost_utils.process_allgather(np.int32(good)).reshape(-1)
  return np.flatnonzero(flags == 0).tolist()


def explain(error: Exception) -> str:
  """One line for an error of the runtime in a run of several processes."""
  words = ' '.join(str(error).split())[:200]
  return (
    f'process {jax.process_index()} of {jax.process_count()} cannot go on: '
    f'another process is gone, or the connection to it ({words}). Start the '
    'same command on all processes to continue from the newest checkpoint'
  )
