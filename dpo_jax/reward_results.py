"""What a run of task reward leaves behind: export, measures and pictures."""

import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from dpo_jax import (
  build,
  datasets,
  distributed,
  folders,
  reward_runs,
  selecting,
  sharding,
)
from dpo_jax.data import label_loader, labels
from dpo_jax.evaluate import grid, stats
from dpo_jax.tasks import reward as reward_task
from dpo_jax.train import evaluators, loop
from dpo_jax.weights import rewards

# Where rewards on x_t are measured, as shares of the schedule.
LEVELS = (0.0, 0.25, 0.5, 0.75)
# Pictures of each sheet.
SHOWN = 64


def finish(
  job: build.Job,
  chosen: selecting.Chosen,
  result: loop.Result,
  path: pathlib.Path,
) -> None:
  """Exports to `path`/export and measures; all processes call it."""
  parts, train = job.reward, job.data.train
  names = [f'{k:03d}' for k in range(parts.networks)]
  used = train.labels.select(np.flatnonzero(train.members.any(1)))
  sets = {'training': used}
  if job.data.counts['held_out_labels']:
    sets['held_out'] = job.data.held.labels
  measured = {
    name: _measure(job, chosen.params, some) for name, some in sets.items()
  }
  if not distributed.is_primary():
    return
  rewards.save(
    path / 'export',
    config=parts.module.config,
    members=[chosen.params['reward'][name] for name in names],
    record=parts.describe(used.count(), find_odds(job)),
  )
  report = {
    'networks': parts.networks,
    'variant': job.record['reward']['variant'],
    'benign_is': 'mean over the networks of log r above log 0.5',
    'data': job.counts,
    'exported': chosen.record,
    'train_seconds': round(result.seconds, 1),
    'compile_seconds': round(result.compile_seconds, 1),
    **{
      name: [
        {'t': t, **describe(logits, sets[name].liked)}
        for t, logits in found.items()
      ]
      for name, found in measured.items()
    },
  }
  folders.write_json(folders.to_path(path / 'report.json'), report)
  for name, found in measured.items():
    first = next(iter(found.values()))
    _show(job, path / 'samples' / f'{name}.png', sets[name], first)


def find_odds(job: build.Job) -> list[float] | None:
  """Benign to malign labels of each network, weights counted; of pairs none."""
  settings, train = job.record['reward'], job.data.train
  if settings['loss'] != 'bce':
    return None
  liked = train.labels.liked > 0.5
  counts = [np.float64(train.members[rows]).sum(0) for rows in (liked, ~liked)]
  return (settings['benign_weight'] * counts[0] / counts[1]).tolist()


def _measure(job, params, chosen: labels.Labels) -> dict[int, np.ndarray]:
  """Timestep to logits [n K] of the labels as they are."""
  parts, task = job.reward, job.loop_arguments['task']
  frozen, params = (
    jax.device_put(tree, sharding.state_shardings(tree, job.mesh))
    for tree in (task.frozen, params)
  )
  key = jax.random.key(job.record['seed'])
  model = parts.inputs.model
  examples = reward_runs.all_of(
    chosen, networks=parts.networks, seed=job.record['seed']
  )
  levels = [0]
  if parts.inputs.noised:
    levels = [int(share * model.schedule.num_steps) for share in LEVELS]
  score = evaluators.make_per_example(
    sharding.over(
      job.mesh,
      reward_task.make_scorer(
        module=parts.module, members=parts.networks, inputs=parts.inputs
      ),
    ),
    job.mesh,
  )
  batches = datasets.make_held_batches(
    examples,
    job.tokenizer,
    batch_size=job.record['eval']['batch_size'],
    seed=job.record['seed'],
    resolution=job.record['data']['resolution'],
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  found = {
    t: np.empty((len(chosen), parts.networks), np.float32) for t in levels
  }
  for batch, valid in batches():
    for t, logits in found.items():
      steps = np.full(len(batch['id']), t, np.int32)
      values = score(params, frozen, batch | {'t': steps}, key)
      for k in range(parts.networks):
        # The loader's order is not that of the labels.
        logits[values['row'][:valid], k] = values[f'{k:03d}'][:valid]
  return found


def describe(
  logits: Float[np.ndarray, 'n k'], liked: Float[np.ndarray, ' n']
) -> dict[str, Any]:
  """How well labels are told apart, by each network and by all together.

  logits: of n labels by k networks; benign is what is above 0. All together:
  log r as models.reward.log_reward has it, benign where its mean over the
  networks is above log 0.5. Shares have Wilson's intervals, the balanced
  accuracy that of Newcombe (1998, method 10) of their mean, the area DeLong's.
  """
  if logits.shape[1] == 1:
    return {'ensemble': _tell_apart(logits[:, 0], liked)}
  return {
    'ensemble': _tell_apart(_mean_log_reward(logits) - np.log(0.5), liked),
    'members': [_tell_apart(one, liked) for one in logits.T],
  }


def _mean_log_reward(logits) -> Float[np.ndarray, ' n']:
  return -np.logaddexp(0.0, -logits.astype(np.float64)).mean(1)


def _tell_apart(scores, liked) -> dict[str, Any]:
  benign = liked > 0.5
  passed = stats.share(scores[benign] > 0)
  stopped = stats.share(scores[~benign] <= 0)
  rates = passed, stopped
  value = sum(rate['value'] for rate in rates) / 2
  low, high = (
    0.5 * float(np.hypot(*(rate['value'] - rate[end] for rate in rates)))
    for end in ('low', 'high')
  )
  return {
    'accuracy': stats.share((scores > 0) == benign),
    'benign_passed': passed,
    'malign_stopped': stopped,
    'balanced_accuracy': {
      'value': value,
      'low': value - low,
      'high': value + high,
      'n': len(scores),
    },
    'auc': stats.area(scores[benign], scores[~benign]),
  }


def _show(job, path, chosen, logits) -> None:
  """The labels as pictures, the smallest reward first."""
  mean = np.exp(_mean_log_reward(logits))
  order = np.argsort(mean, kind='stable')
  if len(order) > SHOWN:
    # From one end to the other.
    order = order[np.linspace(0, len(order) - 1, SHOWN).round().astype(int)]
  words, liked = ('malign', 'benign'), chosen.liked
  grid.save_contact_sheet(
    path,
    label_loader.load_pictures(chosen, order, job.record['data']['resolution']),
    [
      ' '.join([f'{mean[i]:.3f}', words[int(liked[i])], chosen.captions[i]])
      for i in order
    ],
    title=f'{path.stem.replace("_", "-")} labels by their reward',
  )
