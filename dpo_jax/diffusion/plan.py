"""A sampler as tables: one row of numbers for each step."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dpo_jax import types


class Rows(NamedTuple):
  """Static numbers of each step, [s] arrays made in float64.

  All samplers here make the same linear step,

    next = sum over names of weights[name] * term[name],

  with the terms `state`, `x_0` and `eps` (what the network's output says of
  them), `last_x_0` (x_0 of the step before) and `noise`. The network sees
  x_t = scale * state, which is alpha * x_0 + sigma * eps.

  Attributes:
    t: timesteps for the network, int32 or (fractional) float32.
    init_scale: the state at pure noise is this times standard normal noise.
    weights: name -> [s]; terms that a sampler does not have are absent.
    index: place of the step in the whole range, from 0.
  """

  t: np.ndarray
  alpha: Float[np.ndarray, ' s']
  sigma: Float[np.ndarray, ' s']
  scale: Float[np.ndarray, ' s']
  weights: dict[str, Float[np.ndarray, ' s']]
  index: np.ndarray
  init_scale: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """The steps of one sampler from a first to a last noise level.

  Attributes:
    rows: the steps to make, float32; not `index` and `t`.
    prediction_type: what the network outputs.
    clip_range: x_0_hat is clipped to +- this, or None.
  """

  rows: Rows
  prediction_type: str
  clip_range: float | None

  @property
  def num_steps(self) -> int:
    """Number of steps, each one call of the network."""
    return len(self.rows.t)

  @property
  def needs_noise(self) -> bool:
    """Whether the sampler draws noise at its steps."""
    return 'noise' in self.rows.weights

  @property
  def draws_posterior(self) -> bool:
    """Whether its step is a draw of q(x_prev | x_t, x_0): ddpm's is."""
    return {'x_0', 'state', 'noise'} == set(self.rows.weights)

  def from_noise(self, eps: types.Latents) -> types.Latents:
    """The state [n h w c] at pure noise, from standard normal eps.

    Raises ValueError for a plan that starts later (strength, start).
    """
    first = int(self.rows.index[0])
    if first:
      raise ValueError(
        f'this plan begins at step {first}, not at pure noise: give '
        'from_image an image, or go on from the state of another plan'
      )
    return jnp.float32(self.rows.init_scale) * eps.astype(jnp.float32)

  def from_image(self, x_0: types.Latents, eps: types.Latents) -> types.Latents:
    """The state [n h w c] of x_0 noised to the level of the first step.

    SDEdit (Meng et al., 2022, arXiv 2108.01073); eps is standard normal.
    """
    alpha, sigma, scale = (
      jnp.float32(column[0])
      for column in (self.rows.alpha, self.rows.sigma, self.rows.scale)
    )
    x_t = alpha * x_0.astype(jnp.float32) + sigma * eps.astype(jnp.float32)
    return x_t / scale


def alpha_after(rows: Rows) -> Float[np.ndarray, ' s']:
  """alpha at the end of each step: the next one's, 1 after the last."""
  return np.append(np.float64(rows.alpha[1:]), 1.0)


def vp_levels(
  edm_sigmas: Float[np.ndarray, ' s'],
) -> tuple[Float[np.ndarray, ' s'], Float[np.ndarray, ' s']]:
  """(alpha, sigma) with sigma / alpha = edm_sigma on the unit circle."""
  alpha = 1.0 / np.sqrt(edm_sigmas**2 + 1.0)
  return alpha, edm_sigmas * alpha


def find_range(
  t: np.ndarray, total: int, *, strength: float, start: float, end: float
) -> tuple[int, int]:
  """(first, last) of the steps to make, `last` exclusive.

  `strength` as in diffusers' image-to-image pipelines: the last
  int(strength * steps) steps. `start` and `end` as SDXL's denoising_start and
  denoising_end: the timesteps below (1 - start) T, and those from (1 - end) T
  on, of T = total.

  Raises ValueError for values out of range and when no step is left.
  """
  if not 0.0 < strength <= 1.0:
    raise ValueError(f'strength={strength} is not in (0, 1]; 1 is all steps')
  if not 0.0 <= start < end <= 1.0:
    raise ValueError(
      f'start={start} and end={end} must obey 0 <= start < end <= 1'
    )
  if strength < 1.0 and start > 0.0:
    raise ValueError(
      f'strength={strength} and start={start} both say where to begin; '
      'give one of them'
    )
  first = len(t) - int(len(t) * strength)
  if start > 0.0:
    first = len(t) - int(np.sum(t < round(total - start * total)))
  last = len(t)
  if end < 1.0:
    last = first + int(np.sum(t[first:] >= round(total - end * total)))
  if first >= last:
    raise ValueError(
      f'strength={strength}, start={start}, end={end} leave none of '
      f'{len(t)} steps; use more steps or a wider range'
    )
  return first, last


def cut(rows: Rows, first: int, last: int) -> Rows:
  """Rows first to last - 1 in float32.

  The first one has no x_0 of a step before (samplers start from zeros), so
  that weight goes to its own x_0 too: a multistep method starts at first
  order.
  """
  weights = {
    name: column[first:last].copy() for name, column in rows.weights.items()
  }
  if 'last_x_0' in weights:
    weights['x_0'][0] += weights['last_x_0'][0]
  rows = rows._replace(
    weights=weights,
    **{
      name: getattr(rows, name)[first:last]
      for name in ('t', 'alpha', 'sigma', 'scale', 'index')
    },
  )
  return jax.tree.map(_to_float32, rows)


def _to_float32(column):
  wide = isinstance(column, np.ndarray) and column.dtype == np.float64
  return column.astype(np.float32) if wide else column
