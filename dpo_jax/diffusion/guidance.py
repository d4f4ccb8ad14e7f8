"""Guidance: functions that combine or alter a network's output."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax import types


def _interleave(first: jax.Array, second: jax.Array) -> jax.Array:
  """[n ...] twice to [2n ...], row by row: f0, s0, f1, s1, ...

  A batch-sharded array stays where it is, as with the pair axis; putting one
  behind the other would move half of it to other devices.
  """
  both = jnp.stack([first, second], axis=1)
  return both.reshape(-1, *both.shape[2:])


def rescale(
  guided: types.Latents, cond: types.Latents, *, guidance_rescale: float
) -> types.Latents:
  """Gives each example of `guided` back the spread of `cond`, in part.

  r * guided * std(cond) / std(guided) + (1 - r) * guided, with the standard
  deviation (n - 1 in the denominator) over all axes but the first (Lin et
  al., 2023, arXiv 2305.08891, eq. 15 and 16).
  """
  axes = tuple(range(1, guided.ndim))
  spread = jnp.std(cond, axes, ddof=1, keepdims=True)
  spread /= jnp.std(guided, axes, ddof=1, keepdims=True)
  return (guidance_rescale * spread + 1.0 - guidance_rescale) * guided


def classifier_free(
  apply_fn: Callable[[types.Latents, jax.Array, types.PyTree], types.Latents],
  cond: types.PyTree,
  uncond: types.PyTree,
  *,
  guidance_scale: float,
  guidance_rescale: float = 0.0,
  uncond_fn: Callable | None = None,
) -> types.DenoiseFn:
  """Network output guided by text: uncond + w (cond - uncond).

  Ho and Salimans, 2022, arXiv 2207.12598, with w = guidance_scale in the
  convention where 1.0 is no guidance. As in diffusers, a scale of 1 or less
  is off: then one forward is made, not two, and `uncond` may be None.
  Otherwise the batch is doubled, each example beside its unconditional twin.

  Args:
    apply_fn: (x_t [n h w c], t [n], conditioning) -> [n h w c].
    cond: a tree of arrays [n ...], like `uncond`.
    guidance_rescale: 0 (off) to 1, see `rescale`.
    uncond_fn: as apply_fn, another network for what is guided away from: one
      trained on swapped labels (Diffusion-NPO, Wang et al., 2025).

  Raises:
    ValueError: guidance_rescale outside [0, 1], or given without guidance.
  """
  if not 0.0 <= guidance_rescale <= 1.0:
    raise ValueError(
      f'guidance_rescale={guidance_rescale} is not in [0, 1]; 0 is off'
    )
  if guidance_scale <= 1.0:
    if guidance_rescale:
      raise ValueError(
        f'guidance_rescale={guidance_rescale} has no effect with '
        f'guidance_scale={guidance_scale} (no guidance); set it to 0'
      )
    return lambda x_t, t: apply_fn(x_t, t, cond)
  doubled = None
  if uncond_fn is None:
    doubled = jax.tree.map(_interleave, uncond, cond)

  def both(x_t, t):
    if doubled is None:
      return uncond_fn(x_t, t, uncond), apply_fn(x_t, t, cond)
    output = apply_fn(_interleave(x_t, x_t), _interleave(t, t), doubled)
    pairs = output.reshape(-1, 2, *output.shape[1:])
    return pairs[:, 0], pairs[:, 1]

  def denoise(x_t, t):
    without, along = (output.astype(jnp.float32) for output in both(x_t, t))
    guided = without + guidance_scale * (along - without)
    if not guidance_rescale:
      return guided
    return rescale(guided, along, guidance_rescale=guidance_rescale)

  return denoise
