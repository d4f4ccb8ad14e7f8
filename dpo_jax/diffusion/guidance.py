"""Guidance: functions that combine or alter a network's output."""

from collections.abc import Callable

import jax.numpy as jnp

from dpo_jax import types


def classifier_free(
  apply_fn: Callable[
    [types.Latents, types.Timesteps, types.PromptEmbeds], types.Latents
  ],
  prompt_embeds: types.PromptEmbeds,
  uncond_embeds: types.PromptEmbeds,
  *,
  guidance_scale: float,
) -> types.DenoiseFn:
  """Network output guided by text: uncond + w (cond - uncond).

  Ho and Salimans, 2022, arXiv 2207.12598, with w = guidance_scale in the
  convention where 1.0 is no guidance (then one forward is made, not two).

  apply_fn: (x_t [n h w c], t [n], prompt_embeds [n s d]) -> [n h w c].
  """
  if guidance_scale == 1.0:
    return lambda x_t, t: apply_fn(x_t, t, prompt_embeds)
  both = jnp.concatenate([uncond_embeds, prompt_embeds])

  def denoise(x_t, t):
    output = apply_fn(
      jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both
    )
    uncond, cond = jnp.split(output, 2)
    return uncond + guidance_scale * (cond - uncond)

  return denoise
