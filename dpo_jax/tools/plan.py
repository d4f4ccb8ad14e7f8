"""Plans a training run: what it needs and takes, on chips that are not here.

  python -m dpo_jax.tools.plan --config=configs/sdxl.py \\
    --topology=v5e:16x16 --config.mesh.fsdp=16 [--json] [--cached=true]

Compiles the real training step of the config for that topology and prints what
one device holds at its peak, FLOPs, traffic, and how long the run takes. No
chip, no weights and no data are needed: --config.model.folder names a diffusers
folder with its JSON files, or sd15, sd21, sdxl or sdxl_refiner (by default what
the recipe is called). Topologies: v5e:16x16, v6e:8x8, v5p:4x4x4 (with the
package libtpu), h100:8 (with jax[cuda12]), cpu:8; --config.mesh.dcn_data=2 is
so many slices of it. --cached: train from latents and
text states (by default if data.path has them). Other overrides as for
dpo_jax.main. With --json the last line is one JSON object. --hlo=FILE keeps the
compiled program's text: SDXL's takes half an hour and 20 GiB of memory to
compile for a v5e.

Exit code: 0, 1 when the run does not fit into memory, 2 when the input is wrong
or the compiler for the topology is missing.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import ml_collections

from dpo_jax import flags, limits
from dpo_jax.planning import chips, devices, estimate, shapes
from dpo_jax.planning import step as step_lib
from dpo_jax.tools import arguments

DOES_NOT_FIT = 1


def _split(argv: Sequence[str]):
  """(own flags, the words that are flags of the config)."""
  parser = arguments.Parser('dpo_jax.tools.plan', __doc__)
  parser.add_argument('--topology', required=True, help='v5e:16x16, h100:8 ...')
  parser.add_argument('--json', action='store_true')
  parser.add_argument('--hlo', default='', metavar='FILE')
  parser.add_argument('--cached', type=arguments.switch, help='true or false')
  return parser.parse_known_args(list(argv))


def _recipe_model(argv: Sequence[str]) -> str:
  """The released model that a recipe is called after, or ''."""
  for word in argv:
    if word.startswith('--config='):
      path, _, variant = word.partition('=')[2].partition(':')
      stem = pathlib.Path(path).stem
      for name in (f'{stem}_{variant}', stem):
        if name in shapes.RELEASED:
          return name
  return ''


def _read(argv: Sequence[str]) -> ml_collections.ConfigDict:
  """The validated config; model.folder is filled in, data need not be."""
  config, _ = flags.parse(['plan', *argv, '--workdir=none'])
  with config.unlocked():
    if not config.model.folder:
      config.model.folder = _recipe_model(argv)
  checked = config.copy_and_resolve_references()
  with checked.unlocked():
    # Neither is opened.
    checked.data.path = checked.data.path or 'none'
    checked.model.folder = '.'
    checked.eval.judge = ''
    checked.eval.scorer = checked.eval.scorer_tokenizer = ''
    checked.eval.score_prompts, checked.export.select = '', 'auto'
  limits.validate(checked)
  return config


def main(argv: Sequence[str]) -> int:
  """Prints the plan; ValueError says what is wrong with the input."""
  own, rest = _split(argv)
  topology = chips.parse_topology(own.topology)
  config = _read(rest)
  if own.hlo and not pathlib.Path(own.hlo).absolute().parent.is_dir():
    raise ValueError(f'--hlo={own.hlo}: there is no such folder; make it first')
  # Shapes are computed by jax, which looks at its settings only once.
  devices.prepare(topology)
  model = shapes.read_model(config.model.folder)
  from_cache = own.cached
  if from_cache is None:
    from_cache = config.data.use_cache and step_lib.is_cached(config.data.path)
  problem = step_lib.make_problem(
    config,
    model,
    devices.make(topology, slices=config.mesh.dcn_data),
    from_cache=from_cache,
  )
  plan = estimate.make_plan(config, topology, problem, hlo_path=own.hlo)
  suggestions = estimate.advice(plan, config, from_cache=from_cache)
  print(f'{"model":28s} {config.model.folder}, jax {jax.__version__}')
  print(estimate.describe(plan, suggestions))
  if own.json:
    record = plan.to_json() | {
      'model': config.model.folder,
      'from_cache': from_cache,
      'advice': suggestions,
      'jax': jax.__version__,
    }
    print(json.dumps(record))
  return 0 if plan.fits else DOES_NOT_FIT


def run(argv: Sequence[str]) -> int:
  """Exit code; a line on standard error says what is wrong."""
  codes = []
  code = arguments.run(lambda words: codes.append(main(words)), argv)
  return code or codes[0]


if __name__ == '__main__':
  sys.exit(run(sys.argv[1:]))
