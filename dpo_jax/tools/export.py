"""Writes a run's model as a diffusers folder.

  python -m dpo_jax.tools.export --workdir=runs/sd15 --out=exports/sd15 \\
    [--step=1000 | --step=best] [--dtype=float16]

The newest checkpoint if no step is given, and its running mean where the run
keeps one; `best` is the step that the run's judge (eval.scorer) likes best, as
best.json says. Everything that was not trained is copied from the run's base.
"""

import json
import sys
from collections.abc import Sequence

import jax

from dpo_jax import folders, loading, sharding
from dpo_jax.tools import arguments
from dpo_jax.train import best, checkpoint
from dpo_jax.weights import diffusers_maps

BEST = 'best'
NOTES = 'Step {step} of a dpo_jax run of task {task}{objective}.'


def _parse(argv: Sequence[str]):
  parser = arguments.Parser('dpo_jax.tools.export', __doc__)
  parser.add_argument('--workdir', required=True, help="the run's folder")
  parser.add_argument('--out', required=True, help='folder to write')
  parser.add_argument(
    '--step', type=_step, help='a number, or best; default: the newest'
  )
  parser.add_argument(
    '--dtype',
    choices=tuple(diffusers_maps.DTYPES),
    help="of the written weights; default: the run's export.dtype",
  )
  return parser.parse(argv)


def _step(text: str) -> int | str:
  return text if text == BEST else arguments.number(int, low=0)(text)


def main(argv: Sequence[str]) -> None:
  """Exports; ValueError says what is wrong with the input."""
  values = _parse(argv)
  record = read_run(values.workdir)
  if record['task'] not in ('preference', 'denoise'):
    raise ValueError(
      f'{values.workdir}: a run of task {record["task"]} is exported when it '
      'ends, into its folder export/'
    )
  wanted = values.step
  if wanted == BEST:
    found = best.read(values.workdir)
    if found is None:
      raise ValueError(
        f'--step=best: {values.workdir} has no best.json, as its run had no '
        'judge (eval.scorer); give a number, or leave it out for the newest'
      )
    wanted = found['step']
  params, step = checkpoint.restore_params(values.workdir, step=wanted)
  name = record['objective']['name']
  objective = f', objective {name}' if record['task'] == 'preference' else ''
  loading.save_model(
    values.out,
    _open(values.workdir, record),
    params,
    dtype=values.dtype or record['export']['dtype'],
    notes=NOTES.format(step=step, task=record['task'], objective=objective),
  )
  print(f'wrote step {step} to {values.out}', file=sys.stderr)


def read_run(workdir: str) -> dict:
  """The config of a run; ValueError if this is no run's folder."""
  path = folders.to_path(workdir) / 'config.json'
  try:
    record = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(
      f'{path}: cannot be read; give --workdir of a dpo_jax run'
    ) from error
  if not isinstance(record, dict) or 'export' not in record:
    raise ValueError(f'{path}: is not the config of a dpo_jax run')
  return record


def _open(workdir: str, record: dict) -> loading.Opened:
  """The run's model at its start, at the commit that it was."""
  model = record['model']
  path = folders.to_path(workdir) / 'source.json'
  revision = model['revision']
  if '://' not in model['folder'] and path.exists():
    revision = json.loads(path.read_text())['revision']
  return loading.open_model(
    model['folder'],
    mesh=sharding.make_mesh(devices=jax.local_devices()[:1]),
    revision=revision,
    variant=model['variant'],
    configs=model['configs'],
    prediction_type=model['prediction_type'],
    random_init=tuple(model['random_init']),
    seed=record['seed'],
    dtype='float32',
  )


if __name__ == '__main__':
  sys.exit(arguments.run(main, sys.argv[1:]))
