"""Training of rewards from a few labels; several networks in one program."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import keys as keys_lib
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax import task as task_lib
from dpo_jax import types
from dpo_jax.models import clip_features
from dpo_jax.models import reward as reward_lib
from dpo_jax.objectives import reward_losses

LOSSES = ('bce', 'pairwise')
DRAWS = ('eps', 't', 'posterior')


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
  """What a reward is shown of a picture.

  Attributes:
    model: the generator whose x_t or x_0 it judges; None: pixels as they are.
    noised: x_t at a random timestep (kind `time`), instead of x_0.
    features: CLIP's, of the pixels (kind `features`); its parameters are
      frozen['clip'].
  """

  model: sd_lib.StableDiffusion | None
  noised: bool
  features: clip_features.ClipFeatures | None = None

  def __post_init__(self):
    if self.noised and self.model is None:
      raise ValueError('a reward on x_t needs the schedule of its generator')
    if self.features is not None and self.model is not None:
      raise ValueError('CLIP looks at pixels, not at what a generator has')

  def make(
    self, frozen: types.PyTree, batch: dict[str, jax.Array], key: types.Key
  ) -> tuple[Float[Array, 'b *h c'], types.Timesteps]:
    """(x, t): of `images` uint8 [b H W 3], draws by `id` [b] and `epoch`."""
    t = jnp.zeros(len(batch['images']), jnp.int32)
    if self.noised:
      draws = _draws(key, batch)['t']
      t = keys_lib.randint(draws, 0, self.model.schedule.num_steps)
    return self.make_at(frozen, batch, key, t), t

  def make_at(
    self,
    frozen: types.PyTree,
    batch: dict[str, jax.Array],
    key: types.Key,
    t: types.Timesteps,
  ) -> Float[Array, 'b *h c']:
    """As `make`, at given timesteps [b]; they are not looked at for x_0."""
    images = sd_lib.to_float(batch['images'])
    if self.features is not None:
      return self.features(frozen['clip'], images)
    if self.model is None:
      return images
    draws = _draws(key, batch)
    shape = self.model.latent_shape(images.shape[1:3])
    x_0 = self.model.encode_images(
      frozen['vae'], images, keys_lib.normal(draws['posterior'], shape)
    )
    if not self.noised:
      return x_0
    alpha_t, sigma_t = (
      value[:, None, None, None] for value in self.model.schedule.alpha_sigma(t)
    )
    return alpha_t * x_0 + sigma_t * keys_lib.normal(draws['eps'], shape)


def _draws(key, batch):
  return {
    name: keys_lib.per_example(named, batch['id'], batch['epoch'])
    for name, named in keys_lib.by_name(key, DRAWS).items()
  }


def make_scorer(
  *, module: reward_lib.Reward, members: int, inputs: Inputs
) -> task_lib.LossFn:
  """A LossFn of nothing whose metrics are the logits [b] at timesteps `t` [b].

  `t` is of the batch. They have the names of the networks, '000' and so on;
  `row` [b] of the batch is given back too. Params are those of make_task.
  """

  def score(params, frozen, batch, key):
    t = batch['t']
    x = inputs.make_at(frozen, batch, key, t)
    logits = {
      f'{k:03d}': module.apply({'params': params['reward'][f'{k:03d}']}, x, t)
      for k in range(members)
    }
    return jnp.zeros(len(x)), logits | {'row': batch['row']}

  return score


def make_task(
  *,
  module: reward_lib.Reward,
  members: Sequence[types.Params],
  inputs: Inputs,
  frozen: types.PyTree,
  benign_weight: float,
  loss: str = 'bce',
) -> task_lib.Task:
  """Trains K networks at once, each on the examples that are its own.

  batch: `images` [b ...], `liked` [b] (1 benign, 0 malign), `members` [b K]
  (1 where example i is among network k's labels); with loss `pairwise` all are
  [b 2 ...], benign first. The gradient of each network is that which it would
  have alone: the losses are summed over them. Metrics are means over an
  example's own networks, NaN where it has none.

  Raises ValueError for a loss that there is not.
  """
  if loss not in LOSSES:
    raise ValueError(f'loss={loss!r}: must be one of {", ".join(LOSSES)}')
  names = [f'{k:03d}' for k in range(len(members))]

  def logits_of(params, x, t):
    return jnp.stack(
      [
        module.apply({'params': params['reward'][name]}, x, t) for name in names
      ],
      axis=-1,
    )

  def finish(losses, right, own):
    count = own.sum(-1)
    shown = jnp.where(count > 0, (own * right).sum(-1) / count, jnp.nan)
    return (own * losses).sum(-1), {'reward/right': shown}

  def pointwise(params, frozen, batch, key):
    logits = logits_of(params, *inputs.make(frozen, batch, key))
    labels = batch['liked'].astype(jnp.float32)[:, None]
    losses = reward_losses.weighted_bce(
      logits, labels, benign_weight=benign_weight
    )
    right = ((logits > 0) == (labels > 0.5)).astype(jnp.float32)
    return finish(losses, right, batch['members'].astype(jnp.float32))

  def pairwise(params, frozen, batch, key):
    # Both of a pair at one timestep and with one noise.
    sides = [
      logits_of(
        params,
        *inputs.make(
          frozen, {**batch, 'images': batch['images'][:, side]}, key
        ),
      )
      for side in (types.WIN, types.LOSE)
    ]
    right = (sides[0] > sides[1]).astype(jnp.float32)
    own = batch['members'].astype(jnp.float32)
    return finish(reward_losses.pairwise(*sides), right, own)

  chosen = {'bce': pointwise, 'pairwise': pairwise}[loss]
  return task_lib.Task(
    params={'reward': dict(zip(names, members, strict=True))},
    frozen=frozen,
    loss=chosen,
    evaluators={'labels': chosen},
  )
