import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import attention, layers


def _oracle(q, k, v, *, is_causal):
  """One head and one query at a time, float64."""
  out = np.zeros(q.shape)
  for n, i, h in np.ndindex(*q.shape[:3]):
    last = i + 1 if is_causal else k.shape[1]
    scores = k[n, :last, h] @ q[n, i, h] / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max())
    out[n, i, h] = weights / weights.sum() @ v[n, :last, h]
  return out


@pytest.mark.parametrize('is_causal', [False, True])
def test_attend_equals_the_formula(is_causal):
  rng = np.random.default_rng(0)
  q, k, v = rng.standard_normal((3, 2, 5, 3, 4))
  if not is_causal:
    k, v = k[:, :2], v[:, :2]
  expected = _oracle(q, k, v, is_causal=is_causal)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
  out = attention.attend(q, k, v, is_causal=is_causal)
  np.testing.assert_allclose(out, expected, atol=1e-6)


def test_bfloat16_scores_are_float32():
  # 256 and 257 are one number in bfloat16: with bfloat16 scores the two
  # values would be mixed half and half instead of by sigmoid(1).
  q = jnp.asarray([[[[1.0, 1.0, 0.0, 0.0]]]], jnp.bfloat16)
  k = jnp.asarray([[[[512.0, 0, 0, 0]], [[512.0, 2, 0, 0]]]], jnp.bfloat16)
  v = jnp.asarray([[[[0.0] * 4], [[1.0] * 4]]], jnp.bfloat16)
  out = attention.attend(q, k, v)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(out, np.float32), 1 / (1 + np.exp(-1)), rtol=0.01
  )


@pytest.mark.parametrize('make', ['group_norm', 'layer_norm'])
def test_norms_have_two_pass_float32_statistics(make):
  # A large mean: E[x^2] - E[x]^2 in float32, or bfloat16 sums, lose it all.
  x = 1e4 + np.random.default_rng(0).standard_normal((1, 8, 8, 4))
  x = jnp.asarray(x, jnp.float32)
  if make == 'group_norm':
    norm = layers.group_norm(1, 1e-5, dtype=jnp.bfloat16, name='norm')
    axes = (1, 2, 3)
  else:
    norm = layers.layer_norm(dtype=jnp.bfloat16, name='norm')
    axes = (3,)
  y = norm.apply({'params': {'scale': jnp.ones(4), 'bias': jnp.zeros(4)}}, x)
  assert y.dtype == jnp.bfloat16
  exact = np.asarray(x, np.float64)
  mean = exact.mean(axes, keepdims=True)
  expected = (exact - mean) / np.sqrt(exact.var(axes, keepdims=True) + 1e-5)
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.03)
