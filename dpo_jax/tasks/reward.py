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
  """

  model: sd_lib.StableDiffusion | None
  noised: bool

  def __post_init__(self):
    if self.noised and self.model is None:
      raise ValueError('a reward on x_t needs the schedule of its generator')

  def make(
    self, frozen: types.PyTree, batch: dict[str, jax.Array], key: types.Key
  ) -> tuple[Float[Array, 'b h w c'], types.Timesteps]:
    """(x, t): of `images` uint8 [b H W 3], draws by `id` [b] and `epoch`."""
    images = sd_lib.to_float(batch['images'])
    t = jnp.zeros(len(images), jnp.int32)
    if self.model is None:
      return images, t
    draws = {
      name: keys_lib.per_example(named, batch['id'], batch['epoch'])
      for name, named in keys_lib.by_name(key, DRAWS).items()
    }
    shape = self.model.latent_shape(images.shape[1:3])
    x_0 = self.model.encode_images(
      frozen['vae'], images, keys_lib.normal(draws['posterior'], shape)
    )
    if not self.noised:
      return x_0, t
    t = keys_lib.randint(draws['t'], 0, self.model.schedule.num_steps)
    alpha_t, sigma_t = (
      value[:, None, None, None] for value in self.model.schedule.alpha_sigma(t)
    )
    return alpha_t * x_0 + sigma_t * keys_lib.normal(draws['eps'], shape), t


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
