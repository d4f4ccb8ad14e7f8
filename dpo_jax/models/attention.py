"""Attention: one function that every model calls, and its module."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dpo_jax import types
from dpo_jax.models import attention_kernels, layers

BACKENDS = ('auto', 'xla', 'cudnn', 'splash')
# Where each backend runs; JAX calls a GPU by either name.
_PLATFORMS = {'cudnn': ('gpu', 'cuda'), 'splash': ('tpu',)}


def choose(name: str, *, platform: str, dtype: types.DTypeLike) -> str:
  """The backend for `platform`, which is that of the mesh's devices.

  'auto' is splash on a TPU, cudnn on a GPU in half precision, xla elsewhere.
  Raises ValueError where a backend that was asked for cannot run.
  """
  half = jnp.dtype(dtype).itemsize == 2
  if name == 'auto':
    for backend, platforms in _PLATFORMS.items():
      if platform in platforms and (half or backend != 'cudnn'):
        return backend
    return 'xla'
  if platform not in _PLATFORMS.get(name, (platform,)):
    raise ValueError(
      f'model.attention={name}: runs on {_PLATFORMS[name][0]} only, and this '
      f'is {platform}; use auto'
    )
  if name == 'cudnn' and not half:
    raise ValueError(
      'model.attention=cudnn: computes in half precision only; set '
      'model.dtype=bfloat16, or use auto'
    )
  return name


def attend(
  q: Float[Array, 'n q h d'],
  k: Float[Array, 'n k h d'],
  v: Float[Array, 'n k h d'],
  *,
  is_causal: bool = False,
  backend: str = 'xla',
) -> Float[Array, 'n q h d']:
  """softmax(q k^T / sqrt(d)) v, per head; output in the dtype of `v`.

  Scores and softmax are float32 whatever the inputs are, which is what
  diffusers calls upcast_attention. Vaswani et al. 2017, equation 1.

  backend: as `choose` returns it, or 'whole', which keeps all scores and is
  for counting FLOPs. What its kernel does not take (few or odd
  tokens, wide heads) is computed by xla, with the same result to rounding.
  """
  if backend == 'whole':
    return attention_kernels.whole(q, k, v, is_causal=is_causal)
  if backend == 'xla' or is_causal:
    return attention_kernels.xla(q, k, v, is_causal=is_causal)
  return attention_kernels.run(backend, q, k, v)


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
  backend: str = 'xla'

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
    out = attend(q, k, v, backend=self.backend)
    out = out.reshape(*x.shape[:-1], channels)
    return layers.Dense(channels, dtype=self.dtype, name='to_out_0')(out)
