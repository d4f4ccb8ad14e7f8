"""How softmax(q k^T / sqrt(d)) v is computed: plain XLA, or a flash kernel.

Scores and softmax are float32 in all of them, and none holds the scores of all
queries and keys at once where there are many.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from dpo_jax import sharding

Queries = Float[Array, 'n q h d']
Keys = Float[Array, 'n k h d']

# Scores of a head at once, in xla; more are made a run of queries at a time.
# 2**21 is SD 1.5's 32x32 latents whole, and 512 queries of 64x64.
MAX_SCORES = 2**21
# cuDNN's kernel takes wider heads on Hopper only; where models have those
# (SD 1.5's 160) there are few tokens.
_CUDNN_MAX_WIDTH = 128
_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
# Below so many tokens XLA is as fast.
_MIN_TOKENS = 1024
# Blocks of 2048 overflow the fast memory of a v5e.
_SPLASH_BLOCKS = (1024, 512, 256, 128)


def whole(q: Queries, k: Keys, v: Keys, *, is_causal: bool = False) -> Queries:
  """Two products and a softmax, all scores at once."""
  return _rows(q, k, v, 0, is_causal)


def masked(q: Queries, k: Keys, v: Keys, mask: Bool[Array, 'n k']) -> Queries:
  """As `whole`, to the keys at which `mask` is true: one or more in a row."""
  return _rows(q, k, v, 0, False, mask[:, None, None, :])


def xla(q: Queries, k: Keys, v: Keys, *, is_causal: bool = False) -> Queries:
  """Two products and a softmax; a run of queries at a time where long.

  Each run is computed again in the backward pass, so that one run's scores are
  all that is ever in memory.
  """
  queries, keys = q.shape[1], k.shape[1]
  if queries * keys <= MAX_SCORES:
    return whole(q, k, v, is_causal=is_causal)
  size = max(1, MAX_SCORES // keys)
  count = -(-queries // size)
  # Queries of zeros at the end; what they give is cut off.
  padded = jnp.pad(q, ((0, 0), (0, count * size - queries), (0, 0), (0, 0)))
  runs = jnp.moveaxis(padded.reshape((len(q), count, size, *q.shape[2:])), 1, 0)

  @jax.checkpoint
  def compute(run, first):
    return _rows(run, k, v, first, is_causal)

  out = jax.lax.map(
    lambda x: compute(*x), (runs, size * jnp.arange(count, dtype=jnp.int32))
  )
  out = jnp.moveaxis(out, 0, 1).reshape((len(q), count * size, *q.shape[2:]))
  return out[:, :queries]


def _rows(q, k, v, first, is_causal, mask=None):
  """The output of the queries from number `first` on."""
  scores = jnp.einsum(
    'nqhd,nkhd->nhqk', q, k, preferred_element_type=jnp.float32
  )
  scores = scores * q.shape[-1] ** -0.5
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  if is_causal:
    place = first + jnp.arange(q.shape[1], dtype=jnp.int32)[:, None]
    past = place >= jnp.arange(k.shape[1], dtype=jnp.int32)
    scores = jnp.where(past, scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('nhqk,nkhd->nqhd', weights, v)


def takes_cudnn(q: Queries, k: Keys) -> bool:
  """Whether cuDNN's kernel and its gradient take these.

  Not an odd number of keys, such as the 77 of a text: in training it refuses
  them.
  """
  width = q.shape[-1]
  return (
    q.dtype in _CUDNN_DTYPES
    and width % 8 == 0
    and width <= _CUDNN_MAX_WIDTH
    and q.shape[1] % 2 == 0
    and k.shape[1] % 2 == 0
  )


def cudnn(q: Queries, k: Keys, v: Keys) -> Queries:
  """cuDNN's flash attention, for what takes_cudnn says."""
  return jax.nn.dot_product_attention(q, k, v, implementation='cudnn')


def takes_splash(q: Queries, k: Keys) -> bool:
  """Whether splash attention takes these, and is worth it."""
  return all(
    x.shape[1] >= _MIN_TOKENS and x.shape[1] % _SPLASH_BLOCKS[-1] == 0
    for x in (q, k)
  )


def splash(q: Queries, k: Keys, v: Keys, *, interpret: bool = False) -> Queries:
  """JAX's Pallas kernel for TPUs, its backward pass fused.

  interpret: run it in Python, where there is no TPU.
  """
  heads, width = q.shape[2:]
  kernel = _splash_kernel(heads, q.shape[1], k.shape[1], interpret)
  # The kernel itself does not scale.
  scaled = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
  by_head = [jnp.swapaxes(x, 1, 2) for x in (scaled, k, v)]
  return jnp.swapaxes(jax.vmap(kernel)(*by_head), 1, 2)


def _splash_kernel(heads, queries, keys, interpret):
  # Imported where it is used: Pallas takes a second to come up.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  block_q, block_kv = _block(queries), _block(keys)
  sizes = kernels.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_kv_compute=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_kv_dkv_compute=block_kv,
    use_fused_bwd_kernel=True,
  )
  mask = masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads)
  return kernels.make_splash_mha_single_device(
    mask, block_sizes=sizes, interpret=interpret
  )


def _block(length):
  return next(size for size in _SPLASH_BLOCKS if length % size == 0)


TAKES = {'cudnn': takes_cudnn, 'splash': takes_splash}
KERNELS: dict[str, Callable] = {'cudnn': cudnn, 'splash': splash}


def run(name: str, q: Queries, k: Keys, v: Keys) -> Queries:
  """The kernel of that name on each device's part, or xla if it takes none.

  Under a mesh (sharding.over) each device computes its images, and its heads
  where there is a tensor axis: the partitioner cannot look into a kernel.
  """
  spec = _spec(q)
  if spec is None or not TAKES[name](q, k):
    return xla(q, k, v)
  compute = KERNELS[name]
  if spec:
    compute = jax.shard_map(
      compute, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
  return compute(q, k, v)


def _spec(q) -> PartitionSpec | tuple | None:
  """How [n q h d] lies: () without a mesh, None if it cannot be split."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return ()
  if q.shape[0] % sharding.batch_ways(mesh):
    return None
  heads = None
  if sharding.TENSOR in mesh.axis_names:
    if q.shape[2] % mesh.shape[sharding.TENSOR]:
      return None
    heads = sharding.TENSOR
  return PartitionSpec(sharding.BATCH, None, heads, None)
