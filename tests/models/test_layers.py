import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import layers


@pytest.mark.parametrize('flip_sin_to_cos', [False, True])
@pytest.mark.parametrize('freq_shift', [0, 1])
def test_timestep_features_equal_the_formula(flip_sin_to_cos, freq_shift):
  # Integers of training, numbers between them of a sampler, and a size.
  t = np.array([0, 1, 999, 213.75, 1024])
  i = np.arange(5)
  angles = t[:, None] * 10000.0 ** (-i / (5 - freq_shift))
  parts = [np.sin(angles), np.cos(angles)]
  expected = np.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
  out = layers.timestep_features(
    jnp.asarray(t, jnp.float32),
    10,
    flip_sin_to_cos=flip_sin_to_cos,
    freq_shift=freq_shift,
  )
  assert out.dtype == jnp.float32
  # An angle of 1024 has a float32 spacing of 1e-4.
  np.testing.assert_allclose(out, expected, atol=2e-4)


def test_integer_and_float_timesteps_are_one():
  out = [
    layers.timestep_features(
      jnp.asarray([3, 951], dtype), 8, flip_sin_to_cos=True, freq_shift=0
    )
    for dtype in (jnp.int32, jnp.float32)
  ]
  np.testing.assert_array_equal(*out)


def test_time_scales_and_shifts_the_second_norm():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 4, 4, 8), dtype=np.float32)
  temb = rng.standard_normal((2, 6), dtype=np.float32)
  block = layers.ResnetBlock2D(8, 2, 1e-5, scale_shift=True)
  params = block.init(jax.random.key(0), x, temb)['params']
  assert params['time_emb_proj']['kernel'].shape == (6, 16)
  # Scale -1 and shift 0 leave nothing of the norm; silu(0) is 0, and what is
  # left of the branch is the bias of its last convolution.
  params['time_emb_proj'] = {
    'kernel': jnp.zeros((6, 16)),
    'bias': jnp.repeat(jnp.asarray([-1.0, 0.0]), 8),
  }
  params['conv2']['bias'] = jnp.full(8, 0.5)
  out = block.apply({'params': params}, x, temb)
  np.testing.assert_allclose(out, x + 0.5, rtol=1e-6)
