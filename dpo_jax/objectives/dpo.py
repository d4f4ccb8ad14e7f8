"""Diffusion-DPO."""

import jax
from jaxtyping import Array, Float

from dpo_jax.objectives import rewards


def dpo(
  policy: Float[Array, 'b 2'],
  ref: Float[Array, 'b 2'],
  *,
  beta: float,
) -> tuple[Float[Array, ' b'], dict[str, jax.Array]]:
  """-log sigmoid(margin) per pair; Wallace et al., CVPR 2024, eq. 14.

    reward_i = 0.5 beta (ref_i - policy_i)
    margin   = reward_win - reward_lose

  policy, ref: float32 mean squared errors, winner first. The 0.5 and the
  mean are those of the authors' program. No gradient reaches `ref`.
  At policy == ref the loss is log 2.
  """
  margin = rewards.margin(rewards.implicit(policy, ref, beta=beta))
  return -jax.nn.log_sigmoid(margin), {}
