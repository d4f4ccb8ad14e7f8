"""Rewards that censor a generator: what they are shown, and what they say.

  place    space     the gradient goes through
  x_t      latents   the reward alone (Yoon et al., 2023, section 3.1)
  x_0_hat  latents   and the UNet (Bansal et al., 2023, universal guidance)
  x_0_hat  pixels    and the VAE's decoder, and CLIP under kind `features`

Both of the latter compute the blocks of the UNet and of the decoder again in
the backward pass instead of keeping what is inside them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dpo_jax import stable_diffusion as sd_lib
from dpo_jax import types
from dpo_jax.diffusion import options as options_lib
from dpo_jax.diffusion import reward_guidance
from dpo_jax.models import clip_features, pixels, reward, vae


@dataclasses.dataclass(frozen=True)
class Censor:
  """A reward and how it steers; its members are params['reward'], a list.

  Attributes:
    config: the shape of its networks.
    decodes: they are shown decoded pictures [n H W 3], not the x_t or x_0 that
      the sampler has.
    guidance: how much the reward may say; with scale 0 and no backward steps
      it only scores.
    recurrence: R, see samplers.make_step.
    start: the share of the trajectory before it steers, in timesteps as
      SDXL's denoising_start: 0.3 is below 700 of 1000. At high noise a reward
      knows little and pushes all pictures one way (guidance in an interval:
      Kynkaanniemi et al., 2024, arXiv 2404.07724).
    remat: one of transformer.REMAT, where there is a gradient through the
      model.
    offsets: added to its networks' logits, see reward.find_offset.
    features: of kind `features`, CLIP's, its parameters are params['clip'].
  """

  config: reward.RewardConfig
  decodes: bool
  guidance: reward_guidance.Settings
  recurrence: int = 1
  start: float = 0.0
  remat: str = 'full'
  features: clip_features.ClipFeatures | None = None
  offsets: tuple[float, ...] = ()

  @property
  def steers(self) -> bool:
    """Whether sampling is another one than without it."""
    guidance = self.guidance
    acts = guidance.scale or guidance.backward_steps
    return bool(acts) or self.recurrence > 1

  def first_step(self, t: Float[np.ndarray, ' s'], total: int) -> int:
    """Index of the first step that it steers, of timesteps t out of total."""
    return int(np.sum(t >= round(total - self.start * total)))

  def log_reward(
    self,
    params: Mapping[str, types.PyTree],
    x: Float[Array, 'n *h c'],
    t: types.Timesteps,
  ) -> Float[Array, ' n']:
    """log r of what the networks are shown."""
    module = reward.Reward(self.config)
    if self.features is not None:
      x = self.features(params['clip'], x)
    return reward.make_log_reward_fn(module, params['reward'], self.offsets)(
      x, t
    )

  def prepare(self, model: sd_lib.StableDiffusion) -> sd_lib.StableDiffusion:
    """The model whose gradients are asked for, if they are."""
    if self.guidance.place == 'x_t' or not self.guidance.scale:
      unet = model.unet
    else:
      unet = model.unet.clone(remat=self.remat)
    decoder = model.vae
    if self.decodes and isinstance(decoder, vae.AutoencoderKL):
      decoder = decoder.clone(remat=self.remat)
    return dataclasses.replace(model, unet=unet, vae=decoder)

  def make_log_reward_fn(
    self,
    model: sd_lib.StableDiffusion,
    params: Mapping[str, types.PyTree],
  ) -> reward_guidance.LogRewardFn:
    """(x, t) -> log r [n] of the sampler's x; see reward_guidance.guide."""

    def log_reward_fn(x, t):
      if self.decodes:
        # Not clipped to [-1, 1]: where it is, there is no slope.
        x = model.vae.apply(
          {'params': params['vae']}, x / model.scaling_factor, method='decode'
        )
      return self.log_reward(params, x.astype(jnp.float32), t)

    return log_reward_fn

  def score(
    self,
    model: sd_lib.StableDiffusion,
    params: Mapping[str, types.PyTree],
    x_0: types.Latents,
    images: UInt8[Array, 'n H W 3'],
  ) -> Float[Array, ' n']:
    """log r of finished pictures: as they are saved, or of their latents."""
    t = jnp.zeros(len(x_0), jnp.int32)
    if self.decodes:
      x_0 = sd_lib.to_float(images)
    elif isinstance(model.vae, pixels.Pixels):
      x_0, _ = model.encode_posterior(params['vae'], sd_lib.to_float(images))
    return self.log_reward(params, x_0.astype(jnp.float32), t)


def decodes(
  config: reward.RewardConfig,
  record: Mapping[str, Any],
  model: sd_lib.StableDiffusion,
  size: tuple[int, int],
) -> bool:
  """Whether this model's x_0 must be decoded for a reward to look at.

  record: what weights.rewards keeps of the reward. size: (height, width) of
  pictures.

  Raises ValueError where the reward was trained for something else.
  """
  if config.kind == 'features':
    if tuple(record['size']) != tuple(size):
      _refuse_size(record, size)
    return True
  is_pixel_model = isinstance(model.vae, pixels.Pixels)
  own = record['space'] == 'latents' or (
    is_pixel_model and config.in_channels == model.latent_channels
  )
  if not own and record['place'] == 'x_t':
    raise ValueError(
      "looks at noisy pixels, and this model's noise is in latents; train it "
      'on the latents of this model'
    )
  h, w, channels = model.latent_shape(size) if own else (*size, 3)
  if config.in_channels != channels:
    raise ValueError(
      f'takes {config.in_channels} channels, and there are {channels} in the '
      f'{"latents" if own else "pixels"} of this model; train it with this one'
    )
  if tuple(record['size']) != (h, w):
    _refuse_size(record, (h, w))
  _check_timesteps(record, model)
  return not own


def _refuse_size(record, size) -> NoReturn:
  shown, given = ('x'.join(map(str, s)) for s in (record['size'], size))
  raise ValueError(
    f'was trained on {record["space"]} of {shown}, and --size makes {given}; '
    'choose the size it knows, or train it at this one'
  )


def _check_timesteps(record, model) -> None:
  known, own = record['num_train_timesteps'], model.schedule.num_steps
  if record['place'] == 'x_t' and known != own:
    raise ValueError(
      f'knows noise of {known} timesteps, and this model has {own}; train it '
      'with this one'
    )


def check_recurrence(recurrence: int, model: sd_lib.StableDiffusion) -> None:
  """Raises ValueError for one that the model's schedule does not have."""
  if recurrence > 1 and options_lib.is_flow(model.scheduler_config):
    raise ValueError(
      f'--recurrence={recurrence} is not possible with a rectified flow, whose '
      'noise does not add up so; leave it at 1'
    )
