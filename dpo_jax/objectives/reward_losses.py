"""Losses of rewards, which learn from labels instead of from a reference."""

import jax
from jaxtyping import Array, Float


def weighted_bce(
  logits: Float[Array, ' n'],
  labels: Float[Array, ' n'],
  *,
  benign_weight: float,
) -> Float[Array, ' n']:
  """-a y log sigmoid(f) - (1 - y) log sigmoid(-f), float32; y 1 is benign.

  a = benign_weight below 1 makes letting a malign picture pass cost 1 / a times
  more than stopping a benign one (Yoon et al., 2023, section 3.1).
  """
  logits = logits.astype('float32')
  passed = jax.nn.log_sigmoid(logits)
  stopped = jax.nn.log_sigmoid(-logits)
  return -benign_weight * labels * passed - (1.0 - labels) * stopped


def pairwise(
  win: Float[Array, ' n'], lose: Float[Array, ' n']
) -> Float[Array, ' n']:
  """-log sigmoid(f_win - f_lose), float32 (Bradley and Terry, 1952)."""
  return -jax.nn.log_sigmoid(win.astype('float32') - lose.astype('float32'))
