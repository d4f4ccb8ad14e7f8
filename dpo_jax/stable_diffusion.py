"""Stable Diffusion: the one place where models meet diffusion."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dpo_jax import types
from dpo_jax.diffusion import guidance
from dpo_jax.diffusion import schedule as schedule_lib


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
  """A latent text-to-image model: three networks and a schedule.

  Parameters are not held here; every method takes them. `scaling_factor`
  brings the VAE's latents to about unit variance.
  """

  unet: nn.Module
  vae: nn.Module
  text_encoder: nn.Module
  schedule: schedule_lib.Schedule
  scaling_factor: float
  latent_channels: int
  downscale: int

  def latent_shape(self, resolution: int) -> tuple[int, int, int]:
    """(h, w, c) of the latents of square images of `resolution` pixels."""
    if resolution % self.downscale:
      raise ValueError(
        f'data.resolution={resolution} must be a multiple of the VAE '
        f'downscale factor {self.downscale}'
      )
    side = resolution // self.downscale
    return side, side, self.latent_channels

  def encode_images(
    self,
    vae_params: types.Params,
    images: Float[Array, 'n H W 3'],
    noise: Float[Array, 'n h w c'],
  ) -> types.Latents:
    """x_0: a posterior sample (not the mode) times the scaling factor."""
    mean, logvar = self.vae.apply(
      {'params': vae_params}, images, method='encode'
    )
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
    self, text_params: types.Params, input_ids: Int[Array, 'n s']
  ) -> types.PromptEmbeds:
    """prompt_embeds [n s d]: the text encoder's last hidden state."""
    states, _ = self.text_encoder.apply({'params': text_params}, input_ids)
    return states

  def apply_unet(
    self,
    unet_params: types.Params,
    x_t: types.Latents,
    t: types.Timesteps,
    prompt_embeds: types.PromptEmbeds,
  ) -> types.Latents:
    """The UNet's output, eps_hat or v_hat by the schedule's type."""
    return self.unet.apply({'params': unet_params}, x_t, t, prompt_embeds)

  def make_denoise_fn(
    self,
    unet_params: types.Params,
    prompt_embeds: types.PromptEmbeds,
    uncond_embeds: types.PromptEmbeds,
    *,
    guidance_scale: float,
  ) -> types.DenoiseFn:
    """The guided network as a function of (x_t, t) alone."""

    def apply_fn(x_t, t, embeds):
      return self.apply_unet(unet_params, x_t, t, embeds)

    return guidance.classifier_free(
      apply_fn, prompt_embeds, uncond_embeds, guidance_scale=guidance_scale
    )


def to_float(images: jax.Array) -> jax.Array:
  """uint8 [...] in [0, 255] to float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
  """float [...] in [-1, 1] to uint8, rounded and clipped."""
  return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def drop_prompts(
  input_ids: Int[Array, 'b s'],
  empty_ids: Int[Array, ' s'],
  keys: types.Key,
  *,
  rate: float,
) -> Int[Array, 'b s']:
  """Replaces a caption by the empty prompt with probability `rate`.

  One draw an example, so both images of a pair lose their caption together.
  """
  if not rate:
    return input_ids
  draw = jax.vmap(jax.random.uniform)(keys)
  return jnp.where((draw < rate)[:, None], empty_ids, input_ids)
