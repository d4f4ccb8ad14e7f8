"""What tools.generate does with a reward: guidance, and rejection."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax import clip_features, distributed, loading, sharding, trees, types
from dpo_jax.diffusion import reward_guidance
from dpo_jax.evaluate import censor as censor_lib
from dpo_jax.evaluate import generate, manifest, rejection
from dpo_jax.models import reward as reward_lib
from dpo_jax.tools import arguments
from dpo_jax.train import progress
from dpo_jax.weights import json_files, rewards

# First draws that the threshold is found on, at most, and what is few.
CALIBRATION, FEW = 256, 20
THRESHOLD = 'threshold.json'
TRIES = 20
OF_A_REWARD = (
  'reward_clip',
  'reward_scale',
  'reward_start',
  'malign_share',
  'recurrence',
  'backward_steps',
  'backward_rate',
  'reject',
)


def add_flags(add: Callable) -> None:
  """The flags of a reward, to a parser."""
  number = arguments.number
  add('--reward', help='folder of a reward that says what is benign')
  add('--reward_clip', help='where the CLIP is that it stands on, if moved')
  add(
    '--reward_scale',
    type=number(float, low=0),
    help='how much it guides; default: 1, with --reject 0',
  )
  add(
    '--reward_start',
    type=number(float, low=0, high=0.999),
    help='share of the trajectory before it guides, 0.3 of 1000 timesteps: '
    'below 700; default: 0',
  )
  add(
    '--malign_share',
    type=number(float, low=1e-6, high=0.999999),
    help='of what the model draws: corrects log r of labels of another share',
  )
  add('--recurrence', type=number(int, low=1), help='rounds a step; default: 1')
  add(
    '--backward_steps',
    type=number(int, low=0),
    help="Adam's on x_0 at each step; default: 0",
  )
  add('--backward_rate', type=number(float, low=1e-9), help='default: 0.01')
  add(
    '--reject',
    type=number(float, low=0, high=0.999),
    help='draw again what the reward puts below this quantile of first draws',
  )
  add(
    '--reject_tries', type=number(int, low=1), help=f'at most; default: {TRIES}'
  )


def check_flags(values) -> None:
  """Raises ValueError for flags that would be ignored."""
  for name in OF_A_REWARD:
    if not values.reward and getattr(values, name) is not None:
      raise ValueError(f'--{name}: is for a reward; give --reward=FOLDER too')
  if values.reject_tries is not None and values.reject is None:
    raise ValueError('--reject_tries: is for rejection; give --reject too')
  if values.backward_rate is not None and not values.backward_steps:
    raise ValueError(
      '--backward_rate: is of backward steps; give --backward_steps too'
    )
  if values.reject is not None and values.latents:
    raise ValueError(
      '--reject draws new noise and --latents gives the noise; leave one out'
    )
  if _scale(values) or values.backward_steps:
    return
  if (values.recurrence or 1) > 1:
    raise ValueError(
      f'--recurrence={values.recurrence}: repeats guidance, and there is none; '
      'give --reward_scale or --backward_steps above 0'
    )
  if values.reward_start:
    raise ValueError(
      f'--reward_start={values.reward_start}: is where guidance begins, and '
      'there is none; give --reward_scale or --backward_steps above 0'
    )


def _scale(values) -> float:
  if values.reward_scale is not None:
    return values.reward_scale
  return 1.0 if values.reject is None else 0.0


class Reward(NamedTuple):
  """A reward that fits the model; what it adds to params, placed."""

  censor: censor_lib.Censor
  params: dict[str, types.PyTree]
  record: dict[str, Any]


def open_reward(
  values, opened: loading.Opened, settings: generate.Settings, mesh
) -> Reward:
  """The reward of the flags; ValueError where it does not fit the model."""
  loaded = rewards.load(values.reward)
  try:
    decodes = censor_lib.decodes(
      loaded.config, loaded.record, opened.model, settings.size
    )
  except ValueError as error:
    raise ValueError(f'--reward={values.reward}: {error}') from error
  clip = None
  if loaded.config.kind == 'features':
    clip = clip_features.open_recorded(
      loaded.record, folder=values.reward_clip or ''
    )
  elif values.reward_clip:
    raise ValueError(
      f'--reward_clip={values.reward_clip}: {values.reward} looks at no CLIP; '
      'leave it out'
    )
  recurrence = values.recurrence or 1
  censor_lib.check_recurrence(recurrence, opened.model)
  _note_model(values, opened, loaded)
  place = loaded.record['place']
  options = {}
  if values.backward_rate is not None:
    options['backward_rate'] = values.backward_rate
  guidance = reward_guidance.Settings(
    scale=_scale(values),
    place=place,
    backward_steps=values.backward_steps or 0,
    **options,
  )
  members = list(loaded.members)
  record = {
    'path': values.reward,
    'sha256': trees.digest(members),
    'networks': len(members),
    'place': place,
    'space': loaded.record['space'],
    'scale': guidance.scale,
    'malign_share': values.malign_share,
    'start': values.reward_start or 0.0,
    'recurrence': recurrence,
    'backward_steps': guidance.backward_steps,
    'backward_rate': guidance.backward_rate,
    'reject': values.reject,
  }
  params = {'reward': members}
  if clip is not None:
    params['clip'], record['clip'] = clip.params, clip.source
  return Reward(
    censor_lib.Censor(
      loaded.config,
      decodes,
      guidance,
      recurrence,
      start=record['start'],
      offsets=_offsets(values, loaded),
      features=clip and clip.features,
    ),
    jax.device_put(params, sharding.replicated(mesh)),
    record,
  )


def _offsets(values, loaded) -> tuple[float, ...]:
  share, odds = values.malign_share, loaded.record['odds']
  if share is None:
    return ()
  if odds is None:
    raise ValueError(
      f'--malign_share={share}: {values.reward} does not say at which odds its '
      'labels came (reward.loss=pairwise, or an older export); leave it out'
    )
  return tuple(reward_lib.find_offset(share, one) for one in odds)


def _note_model(values, opened, loaded) -> None:
  known = (loaded.record['model'] or {}).get('name')
  if known and known != opened.source['name']:
    distributed.say(
      f'{values.reward} was trained for {known}, and this is '
      f'{opened.source["name"]}: their latents must mean the same',
    )


def add_images(
  pictures: manifest.Pictures, entries: list[dict], made: Any
) -> None:
  """Adds what a sample function made; with a reward, its log r too."""
  images = made
  if isinstance(made, dict):
    images = made['images']
    entries = [
      {**entry, 'log_reward': float(value)}
      for entry, value in zip(entries, made['log_reward'], strict=True)
    ]
  pictures.add(entries, images)


def keep_accepted(
  batches: Callable[[np.ndarray, np.ndarray], Iterator[tuple[slice, Any]]],
  entries: list[dict],
  missing: np.ndarray,
  pictures: manifest.Pictures | None,
  *,
  values,
  batch_size: int,
) -> list[dict]:
  """Draws until the missing pictures are accepted; those that never were.

  batches: (rows, noise numbers) -> (part of them, what was made), as
  generate.generate_batches. pictures: on the main process, else None. The
  threshold is the quantile of the first draws of all pictures, at most
  CALIBRATION of them; it is found once and stands in threshold.json.
  """
  seeds = np.array([entry['seed'] for entry in entries], np.uint32)
  todo = np.flatnonzero(missing)
  counted = {'draws': 0, 'kept': 0, 'seconds': 0.0}

  def draw(places, numbers, bar=None):
    started, made = time.perf_counter(), []
    for rows, part in batches(places, numbers):
      made.append(part)
      if bar is not None:
        bar.update(rows.stop, {})
    counted['draws'] += len(places)
    counted['seconds'] += time.perf_counter() - started
    return tuple(
      np.concatenate([part[name] for part in made])
      for name in ('images', 'log_reward')
    )

  threshold, first = _threshold(draw, seeds, pictures, values)
  index = {int(row): i for i, row in enumerate(todo)}
  with progress.Progress(0, len(todo), label='accepted') as bar:
    for kept in rejection.accept(
      lambda places, numbers: draw(todo[places], numbers),
      seeds[todo],
      threshold=threshold,
      tries=values.reject_tries or TRIES,
      batch_size=batch_size,
      first={index[row]: known for row, known in first if row in index},
    ):
      counted['kept'] += len(kept)
      missing[[todo[one.place] for one in kept]] = False
      if pictures is not None and kept:
        pictures.add(
          [_entry(entries[todo[one.place]], one) for one in kept],
          np.stack([one.image for one in kept]),
        )
      bar.update(counted['kept'], {})
  if counted['kept']:
    draws, n, seconds = counted['draws'], counted['kept'], counted['seconds']
    distributed.say(
      f'kept {n} pictures of {draws} draws: {draws / n:.2f} draws and '
      f'{seconds / n:.3g} s a picture, compilation included; log r '
      f'at least {threshold:.4g}',
    )
  return [entry for entry, left in zip(entries, missing, strict=True) if left]


def _entry(entry: dict, kept: rejection.Kept) -> dict:
  return {
    **entry,
    'log_reward': kept.log_reward,
    'tries': kept.tries,
    'noise_number': kept.number,
  }


def _threshold(draw, seeds, pictures, values):
  """(threshold, [(place, first try)] where they were drawn for it)."""
  known = np.full((), np.nan, np.float64)
  path = None if pictures is None else pictures.path / THRESHOLD
  if path is not None and path.is_file():
    known[...] = float(json_files.read(path)['log_reward'])
  if jax.process_count() > 1:
    known = multihost_utils.broadcast_one_to_all(np.float32(known))
  if np.isfinite(known):
    return float(known), []
  places = np.arange(min(len(seeds), CALIBRATION))
  with progress.Progress(0, len(places), label='first draws') as bar:
    images, found = draw(places, seeds[places], bar)
  threshold = rejection.find_threshold(found, values.reject)
  # As log r itself is, and as other processes read it.
  threshold = float(np.float32(threshold))
  if len(places) < FEW:
    distributed.say(
      f'the quantile {values.reject} is taken of {len(places)} draws only',
    )
  if path is not None:
    record = {'log_reward': threshold, 'quantile': values.reject}
    json_files.write(path, record | {'draws': len(places)})
  return threshold, list(enumerate(zip(images, found.tolist(), strict=True)))


def refuse_rest(rest: list[dict], values) -> None:
  """Raises ValueError that names pictures which no try was accepted of."""
  if rest:
    raise ValueError(
      f'{len(rest)} pictures were not accepted in '
      f'{values.reject_tries or TRIES} tries, the first is {rest[0]["file"]}; '
      'the same command with more --reject_tries goes on'
    )
