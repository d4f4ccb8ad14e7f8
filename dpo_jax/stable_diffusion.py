"""Stable Diffusion: the one place where models meet diffusion."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dpo_jax import types
from dpo_jax.diffusion import flow as flow_lib
from dpo_jax.diffusion import guidance
from dpo_jax.diffusion import schedule as schedule_lib

# What stands beside the sizes in the refiner's micro-conditioning: how much
# a picture is liked, of 10; Podell et al., 2023, and diffusers' defaults.
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
  """A latent text-to-image model: its networks and a schedule.

  An unconditional pixel-space model is one whose VAE is the identity
  (models.pixels) and which has no text encoders: k is 0, its conditioning an
  empty dict. Parameters are not held here; every method takes them.

  Attributes:
    text_encoders: 'text_encoder' and 'text_encoder_2', those there are, in
      the order of the axis k of input_ids [n k s].
    scaling_factor: brings the VAE's latents to about unit variance.
    micro_cond_dim: numbers of micro-conditioning: 0 (SD), 6 (SDXL), 5 (the
      refiner: the last two sizes give way to an aesthetic score).
    zero_uncond: without a negative prompt the unconditional branch gets
      zeros instead of the encoding of '' (SDXL base).
  """

  unet: nn.Module
  vae: nn.Module
  text_encoders: Mapping[str, nn.Module]
  schedule: schedule_lib.Schedule | flow_lib.Flow
  scheduler_config: Mapping[str, Any]
  scaling_factor: float
  latent_channels: int
  downscale: int
  micro_cond_dim: int = 0
  zero_uncond: bool = False

  def latent_shape(
    self, resolution: int | tuple[int, int]
  ) -> tuple[int, int, int]:
    """(h, w, c) of the latents of images of a side, or (height, width)."""
    if isinstance(resolution, int):
      resolution = (resolution, resolution)
    if any(side % self.downscale for side in resolution):
      shown = 'x'.join(map(str, resolution))
      raise ValueError(
        f'resolution {shown}: both sides must be multiples of the VAE '
        f'downscale factor {self.downscale}'
      )
    h, w = (side // self.downscale for side in resolution)
    return h, w, self.latent_channels

  def encode_images(
    self,
    vae_params: types.Params,
    images: Float[Array, 'n H W 3'],
    noise: Float[Array, 'n h w c'],
  ) -> types.Latents:
    """x_0: a posterior sample (not the mode) times the scaling factor."""
    return self.sample_posterior(
      *self.encode_posterior(vae_params, images), noise
    )

  def encode_posterior(
    self, vae_params: types.Params, images: Float[Array, 'n H W 3']
  ) -> tuple[Float[Array, 'n h w c'], Float[Array, 'n h w c']]:
    """The posterior's (mean, logvar), float32, not scaled."""
    return self.vae.apply({'params': vae_params}, images, method='encode')

  def sample_posterior(
    self,
    mean: Float[Array, 'n h w c'],
    logvar: Float[Array, 'n h w c'],
    noise: Float[Array, 'n h w c'],
  ) -> types.Latents:
    """x_0: mean + exp(logvar / 2) * noise, times the scaling factor."""
    x_0 = mean + jnp.exp(0.5 * logvar) * noise
    return (self.scaling_factor * x_0).astype(jnp.float32)

  def decode_latents(
    self, vae_params: types.Params, x_0: types.Latents
  ) -> Float[Array, 'n H W 3']:
    """Images in [-1, 1] (clipped) from scaled latents."""
    images = self.vae.apply(
      {'params': vae_params}, x_0 / self.scaling_factor, method='decode'
    )
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)

  def encode_text(
    self, params: Mapping[str, types.Params], input_ids: Int[Array, 'n k s']
  ) -> types.Conditioning:
    """Conditioning of n prompts, tokenized for each of the k text encoders.

    SD: `prompt_embeds` is the encoder's last hidden state. SDXL: the
    penultimate states of all encoders side by side, and `pooled_embeds` the
    projected state of the last one (Podell et al., 2023, section 2.1).
    Without text encoders it is empty.
    """
    outputs = [
      encoder.apply({'params': params[name]}, input_ids[:, i])
      for i, (name, encoder) in enumerate(self.text_encoders.items())
    ]
    if not outputs:
      return {}
    if not self.micro_cond_dim:
      return {'prompt_embeds': outputs[0].last_hidden_state}
    states = [output.penultimate for output in outputs]
    return {
      'prompt_embeds': jnp.concatenate(states, axis=-1),
      'pooled_embeds': outputs[-1].pooled,
    }

  def add_micro_cond(
    self,
    cond: types.Conditioning,
    *,
    sizes: Float[Array, 'n 4'],
    target: tuple[int, int],
    aesthetic_score: float = AESTHETIC_SCORE,
  ) -> types.Conditioning:
    """`cond` with `micro_cond` [n 6] (refiner: [n 5]); SD's stays as it is.

    sizes: original height and width, crop top and left, in pixels; target:
    (height, width) of the image. Podell et al., 2023, section 2.2.
    """
    if not self.micro_cond_dim:
      return cond
    last = target if self.micro_cond_dim == 6 else (aesthetic_score,)
    last = jnp.broadcast_to(
      jnp.asarray(last, jnp.float32), (len(sizes), len(last))
    )
    micro = jnp.concatenate([sizes.astype(jnp.float32), last], axis=-1)
    return {**cond, 'micro_cond': micro}

  def check_guidance(self, guidance_scale: float) -> None:
    """Raises ValueError for guidance by text where there is no text."""
    if guidance_scale > 1.0 and not self.text_encoders:
      raise ValueError(
        f'guidance_scale={guidance_scale}: this model is unconditional, there '
        'is no text to guide it; set it to 1'
      )

  def apply_unet(
    self,
    unet_params: types.Params,
    x_t: types.Latents,
    t: types.Timesteps,
    cond: types.Conditioning,
  ) -> types.Latents:
    """The UNet's output, eps_hat, v_hat or a flow's, by the schedule's type."""
    return self.unet.apply({'params': unet_params}, x_t, t, **cond)

  def make_denoise_fn(
    self,
    unet_params: types.Params,
    cond: types.Conditioning,
    uncond: types.Conditioning,
    *,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    negative_params: types.Params | None = None,
  ) -> types.DenoiseFn:
    """The guided network as a function of (x_t, t) alone.

    negative_params: of another UNet, which is guided away from: it takes
    `uncond`, and models without text can be guided so too.

    Raises ValueError as check_guidance does, and for negative_params with a
    guidance_scale of 1 or less, where they would have no say.
    """
    if negative_params is None:
      self.check_guidance(guidance_scale)
    elif guidance_scale <= 1.0:
      raise ValueError(
        f'guidance_scale={guidance_scale}: nothing is guided away from the '
        'other UNet; set it above 1'
      )

    def apply_fn(x_t, t, cond):
      return self.apply_unet(unet_params, x_t, t, cond)

    def uncond_fn(x_t, t, cond):
      return self.apply_unet(negative_params, x_t, t, cond)

    return guidance.classifier_free(
      apply_fn,
      cond,
      uncond,
      guidance_scale=guidance_scale,
      guidance_rescale=guidance_rescale,
      uncond_fn=None if negative_params is None else uncond_fn,
    )


def to_float(images: jax.Array) -> jax.Array:
  """uint8 [...] in [0, 255] to float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
  """float [...] in [-1, 1] to uint8, rounded and clipped."""
  return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def constant_sizes(n: int, size: tuple[int, int]) -> Float[Array, 'n 4']:
  """Sizes of pictures that were never resized nor cropped: (h, w, 0, 0)."""
  return jnp.broadcast_to(jnp.asarray([*size, 0.0, 0.0], jnp.float32), (n, 4))
