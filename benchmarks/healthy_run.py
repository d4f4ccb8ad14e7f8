"""A healthy, a flat and a collapsing run of the emoji model, and their plot.

  python -m benchmarks.healthy_run --workdir=runs/healthy [--plot=FILE]

The plot is docs/healthy_run.png, which docs/healthy_run.md explains. A run
that is there already is not repeated.
"""

import argparse
import json
import pathlib
import subprocess
import sys

RECIPE = 'configs/quickstart.py'
# Name to what differs from the recipe.
RUNS = {
  'healthy': {},
  'flat': {'optim.lr': 6e-9},
  'collapsing': {
    'objective.numbers.beta': 5.0,
    'objective.reward_beta': 5.0,
    'optim.lr': 6e-4,
  },
}
# No picture is needed.
FEW = {
  'train.eval_every': 0,
  'eval.num_prompts': 8,
  'eval.num_draws': 1,
  'eval.num_steps': 2,
  'eval.batch_size': 8,
  'eval.judge': '',
  'eval.retrieval': False,
}
BINS = 10


def command(name: str, workdir: pathlib.Path) -> list[str]:
  """The run's command."""
  values = FEW | RUNS[name]
  return [
    sys.executable,
    '-m',
    'dpo_jax.main',
    f'--config={RECIPE}',
    f'--workdir={workdir / name}',
    *(f'--config.{key}={value}' for key, value in values.items()),
  ]


def read(path: pathlib.Path) -> list[dict[str, float]]:
  """The lines of a run's log that have a loss."""
  lines = path.read_text().splitlines()
  return [record for record in map(json.loads, lines) if 'loss' in record]


def plot(runs: dict[str, list[dict[str, float]]], path: pathlib.Path) -> None:
  """One column a run: loss, margin, accuracy, errors, timestep bins."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(
    5, len(runs), figsize=(3.2 * len(runs), 9.5), dpi=90, squeeze=False
  )
  for column, (name, records) in zip(axes.T, runs.items(), strict=True):
    steps = [record['step'] for record in records]

    def draw(ax, keys, steps=steps, records=records):
      for key, label in keys.items():
        ax.plot(steps, [r[key] for r in records], label=label)
      if len(keys) > 1:
        ax.legend(frameon=False, fontsize=8)

    draw(column[0], {'loss': 'loss'})
    column[0].axhline(0.6931, color='0.7', lw=0.8)
    # One scale: a thousandth is no fall, and no margin.
    column[0].set_ylim(0, 0.75)
    draw(column[1], {'reward/margin': 'margin'})
    column[1].set_ylim(bottom=-0.5, top=max(1.0, column[1].get_ylim()[1]))
    draw(column[2], {'reward/accuracy': 'accuracy'})
    column[2].set_ylim(0.3, 1.02)
    draw(
      column[3],
      {'err/delta_win': 'd_w (winner)', 'err/delta_lose': 'd_l (loser)'},
    )
    column[3].axhline(0, color='0.7', lw=0.8)
    shares = [_mean(records, f'reward/accuracy_t{i}') for i in range(BINS)]
    column[4].bar(range(BINS), shares, color='C0')
    column[4].set_ylim(0.3, 1.02)
    column[4].set_xticks(range(BINS))
    column[0].set_title(name)
  for row, label in zip(
    axes[:, 0],
    (
      'loss',
      'reward/margin',
      'reward/accuracy',
      'err/delta',
      'accuracy in bins\n(0: little noise)',
    ),
    strict=True,
  ):
    row.set_ylabel(label)
  for ax in axes[3]:
    ax.set_xlabel('step')
  for ax in axes[4]:
    ax.set_xlabel('tenth of the timesteps')
  figure.tight_layout()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
  pyplot.close(figure)


def _mean(records, key):
  """Over the second half of the run."""
  values = [r[key] for r in records[len(records) // 2 :] if key in r]
  return sum(values) / max(1, len(values))


def main(argv: list[str]) -> int:
  """Runs what is missing and plots; the exit code of a run that failed."""
  parser = argparse.ArgumentParser('benchmarks.healthy_run')
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument(
    '--plot', type=pathlib.Path, default=pathlib.Path('docs/healthy_run.png')
  )
  values = parser.parse_args(argv)
  for name in RUNS:
    if not (values.workdir / name / 'report.json').exists():
      code = subprocess.run(command(name, values.workdir)).returncode
      if code:
        return code
  plot(
    {name: read(values.workdir / name / 'metrics.jsonl') for name in RUNS},
    values.plot,
  )
  print(f'{values.plot}: {", ".join(RUNS)}')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
