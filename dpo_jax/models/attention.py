"""Attention: one function that every model calls, and its module."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dpo_jax import types
from dpo_jax.models import layers


def attend(
  q: Float[Array, 'n q h d'],
  k: Float[Array, 'n k h d'],
  v: Float[Array, 'n k h d'],
  *,
  is_causal: bool = False,
) -> Float[Array, 'n q h d']:
  """softmax(q k^T / sqrt(d)) v, per head; output in the dtype of `v`.

  Scores and softmax are float32 whatever the inputs are, which is what
  diffusers calls upcast_attention. Vaswani et al. 2017, equation 1.
  """
  scores = jnp.einsum(
    'nqhd,nkhd->nhqk', q, k, preferred_element_type=jnp.float32
  )
  scores = scores * q.shape[-1] ** -0.5
  if is_causal:
    mask = jnp.tri(q.shape[1], k.shape[1], dtype=bool)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('nhqk,nkhd->nqhd', weights, v)


class Attention(nn.Module):
  """Multi-head attention with diffusers' parameter names.

  Without `context` it is self-attention. With `norm_groups` the input is
  group-normalised first, as in the VAE's middle block. The residual is the
  caller's.
  """

  heads: int
  qkv_bias: bool = False
  norm_groups: int | None = None
  norm_eps: float = 1e-6
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'n s c'],
    context: Float[Array, 'n k d'] | None = None,
  ) -> Float[Array, 'n s c']:
    channels = x.shape[-1]
    if self.norm_groups is not None:
      x = layers.group_norm(
        self.norm_groups, self.norm_eps, dtype=self.dtype, name='group_norm'
      )(x)
    context = x if context is None else context

    def project(name, inputs):
      out = layers.Dense(
        channels, use_bias=self.qkv_bias, dtype=self.dtype, name=name
      )(inputs)
      return out.reshape(*out.shape[:-1], self.heads, channels // self.heads)

    q = project('to_q', x)
    k, v = project('to_k', context), project('to_v', context)
    out = attend(q, k, v).reshape(*x.shape[:-1], channels)
    return layers.Dense(channels, dtype=self.dtype, name='to_out_0')(out)
