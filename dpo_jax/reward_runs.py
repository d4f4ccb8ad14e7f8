"""Task reward of a config: its labels, its networks, what they are shown."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dpo_jax import clip_features, datasets, loading, reward_limits
from dpo_jax import task as task_lib
from dpo_jax.data import label_copies, label_loader, labels
from dpo_jax.models import reward
from dpo_jax.tasks import reward as reward_task


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
  """What a run of rewards is made of.

  Attributes:
    module: the network, of which there are `networks`.
    inputs: what it is shown.
    shape: of that, [h, w, c], or [e] of CLIP's features.
    size: (height, width) of the pictures or latents.
    source: of the generator, None where there is none.
    space: 'pixels' or 'latents'.
    clip: what kind `features` stands on, None for the others.
  """

  module: reward.Reward
  networks: int
  inputs: reward_task.Inputs
  shape: tuple[int, ...]
  size: tuple[int, int]
  source: dict[str, str] | None
  space: str
  clip: clip_features.Opened | None = None

  def describe(
    self, counts: dict[str, int], odds: list[float] | None
  ) -> dict[str, Any]:
    """The record of an export, see weights.rewards; counts of the labels."""
    model = self.inputs.model
    return {
      'space': self.space,
      'size': list(self.size),
      'place': 'x_t' if self.inputs.noised else 'x_0_hat',
      'model': self.source,
      'num_train_timesteps': model and model.schedule.num_steps,
      'labels': counts,
      'clip': self.clip and self.clip.source,
      'odds': odds,
    }


def make_parts(
  config: ml_collections.ConfigDict,
  opened: loading.Opened | None,
  *,
  networks: int,
) -> Parts:
  """Raises ValueError for a space that the generator does not have."""
  settings, side = config.reward, config.data.resolution
  if settings.kind == 'features':
    return _make_clip_parts(config, networks=networks)
  has_latents = opened is not None and bool(opened.params['vae'])
  if settings.space == 'latents' and not has_latents:
    raise ValueError(
      f"reward.space='latents': {config.model.folder} works on pixels; set it "
      "to 'pixels'"
    )
  if settings.kind == 'time' and has_latents and settings.space == 'pixels':
    raise ValueError(
      f"reward.kind='time': x_t of {config.model.folder} is latents; set "
      "reward.space to 'latents', or kind to 'clean'"
    )
  # A pixel model says how many channels pictures have.
  seen = opened is not None and (settings.space == 'latents' or not has_latents)
  model = opened.model if seen else None
  shape = model.latent_shape(side) if seen else (side, side, 3)
  return Parts(
    module=reward.Reward(
      reward_limits.make_shape(config, shape[-1]),
      dtype=jnp.dtype(config.model.dtype),
    ),
    networks=networks,
    inputs=reward_task.Inputs(model, noised=settings.kind == 'time'),
    shape=shape,
    size=shape[:2],
    source=opened and opened.source,
    space=settings.space,
  )


def _make_clip_parts(
  config: ml_collections.ConfigDict, *, networks: int
) -> Parts:
  """Heads on the embeddings of a CLIP, which looks at pixels."""
  clip = clip_features.open_features(config.reward.clip)
  side = config.data.resolution
  return Parts(
    module=reward.Reward(
      reward_limits.make_shape(config, clip.features.width),
      dtype=jnp.dtype(config.model.dtype),
    ),
    networks=networks,
    inputs=reward_task.Inputs(None, noised=False, features=clip.features),
    shape=(clip.features.width,),
    size=(side, side),
    source=None,
    space='pixels',
    clip=clip,
  )


def make_task(
  config: ml_collections.ConfigDict,
  parts: Parts,
  opened: loading.Opened | None,
) -> task_lib.Task:
  """Networks from random weights that follow from the seed and their number."""
  init, key = jax.jit(parts.module.init), jax.random.key(config.seed)
  example = jnp.zeros((1, *parts.shape)), jnp.zeros(1, jnp.int32)
  frozen = {'vae': opened.params['vae'] if parts.inputs.model else {}}
  if parts.clip is not None:
    frozen['clip'] = jax.tree.map(jnp.asarray, parts.clip.params)
  return reward_task.make_task(
    module=parts.module,
    members=[
      init(jax.random.fold_in(key, k), *example)['params']
      for k in range(parts.networks)
    ],
    inputs=parts.inputs,
    frozen=frozen,
    benign_weight=config.reward.benign_weight,
    loss=config.reward.loss,
  )


def read_labels(config: ml_collections.ConfigDict) -> datasets.Data:
  """The labels that a config names, drawn for its networks.

  Held out are those of data.eval_path, or a share of each class; with
  data.holdout 0 all are trained on and looked at. Raises ValueError as
  data.labels does.
  """
  settings, seed = config.reward, config.seed
  found, counts = labels.read(datasets.split_paths(config.data.path))
  if config.data.eval_path:
    held, _ = labels.read(datasets.split_paths(config.data.eval_path))
    if not all(held.count().values()):
      raise ValueError(
        f'data.eval_path={config.data.eval_path}: has {held.count()}; label '
        'some of both classes'
      )
    train, counts['also_held_out_dropped'] = labels.leave_out(found, held)
  else:
    train, held = labels.split(found, config.data.holdout)
  members = labels.choose(
    train.liked,
    settings.variant,
    networks=settings.networks,
    per_class=settings.per_class,
    seed=seed,
  )
  paired = settings.loss == 'pairwise'
  used = train.select(np.flatnonzero(members.any(1))).count()
  counts |= {
    **{f'training_{word}': count for word, count in used.items()},
    'labels_not_drawn': len(train) - sum(used.values()),
    'held_out_labels': 0 if held is train else len(held),
  }
  return datasets.Data(
    train=label_loader.make_examples(
      train,
      members,
      copies=label_copies.Copies(
        settings.copies, settings.rotation, settings.crop, settings.colour
      ),
      paired=paired,
      seed=seed,
    ),
    held=all_of(
      held,
      networks=members.shape[1],
      paired=paired,
      seed=seed,
      most=config.eval.num_pairs,
    ),
    counts=counts,
    fingerprint=hashlib.sha256(
      f'{train.digest()} {held.digest()}'.encode()
    ).hexdigest(),
    find_prompts=lambda count: sorted(set(held.captions))[:count],
  )


def all_of(
  chosen: labels.Labels,
  *,
  networks: int,
  seed: int,
  paired: bool = False,
  most: int = 0,
) -> label_loader.LabelExamples:
  """The labels as they are, for every network."""
  return label_loader.make_examples(
    chosen,
    np.ones((len(chosen), networks)),
    copies=label_copies.Copies(),
    paired=paired,
    seed=seed,
    most=most,
  )
