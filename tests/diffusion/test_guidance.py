import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.diffusion import guidance

X_T = jnp.ones((2, 1, 1, 1))
T = jnp.zeros((2,), jnp.int32)


def _scale_by(calls):
  def apply_fn(x_t, t, cond):
    calls.append((len(x_t), len(t)))
    return x_t * cond['text'][:, None, None]

  return apply_fn


def test_guidance_by_hand():
  calls = []
  cond = {'text': jnp.array([[3.0], [5.0]]), 'pooled': None}
  uncond = {'text': jnp.array([[1.0], [2.0]]), 'pooled': None}
  guided = guidance.classifier_free(
    _scale_by(calls), cond, uncond, guidance_scale=2.5
  )(X_T, T)
  np.testing.assert_allclose(guided[:, 0, 0, 0], [1 + 2.5 * 2, 2 + 2.5 * 3])
  assert calls == [(4, 4)]


@pytest.mark.parametrize('scale', [1.0, 0.0])
def test_a_scale_of_one_or_less_is_off(scale):
  calls = []
  cond = {'text': jnp.array([[3.0], [5.0]])}
  plain = guidance.classifier_free(
    _scale_by(calls), cond, None, guidance_scale=scale
  )(X_T, T)
  np.testing.assert_allclose(plain[:, 0, 0, 0], [3.0, 5.0])
  assert calls == [(2, 2)]


def test_every_leaf_is_beside_its_own_example():
  rng = np.random.default_rng(0)
  cond = {
    'a': rng.standard_normal((3, 2, 4)).astype(np.float32),
    'b': (rng.standard_normal((3, 5)).astype(np.float32),),
  }
  uncond = jax.tree.map(lambda leaf: leaf + 1, cond)
  x_t = jnp.asarray(rng.standard_normal((3, 2, 2, 1)), jnp.float32)
  t = jnp.array([1.0, 2.0, 3.0])

  def apply_fn(x_t, t, cond):
    numbers = cond['a'].sum((1, 2)) + 2 * cond['b'][0].sum(1) + t
    return x_t**2 * numbers[:, None, None, None]

  guided = guidance.classifier_free(apply_fn, cond, uncond, guidance_scale=3.0)
  first, second = apply_fn(x_t, t, uncond), apply_fn(x_t, t, cond)
  np.testing.assert_allclose(
    guided(x_t, t), first + 3.0 * (second - first), rtol=1e-5, atol=1e-5
  )


def test_rescale_equals_diffusers():
  torch = pytest.importorskip('torch')
  pytest.importorskip('diffusers')
  from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion

  rng = np.random.default_rng(0)
  guided, cond = rng.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
  guided *= 5
  wanted = pipeline_stable_diffusion.rescale_noise_cfg(
    torch.tensor(guided), torch.tensor(cond), guidance_rescale=0.7
  )
  ours = guidance.rescale(guided, cond, guidance_rescale=0.7)
  np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-5)


def test_rescale_is_applied_to_the_guided_output():
  rng = np.random.default_rng(0)
  x_t = jnp.asarray(rng.standard_normal((2, 4, 4, 1)), jnp.float32)
  cond = {'text': jnp.array([[3.0], [5.0]])}
  uncond = {'text': jnp.array([[1.0], [2.0]])}
  guided = guidance.classifier_free(
    _scale_by([]), cond, uncond, guidance_scale=4.0, guidance_rescale=1.0
  )(x_t, T)
  # All of the spread is the conditional output's, and the shape is x_t's.
  np.testing.assert_allclose(guided[0], 3.0 * x_t[0], rtol=1e-5)
  np.testing.assert_allclose(guided[1], 5.0 * x_t[1], rtol=1e-5)


@pytest.mark.parametrize(
  ('scale', 'rescale', 'words'),
  [
    (5.0, 1.5, 'guidance_rescale=1.5 is not in'),
    (5.0, -0.1, 'guidance_rescale=-0.1 is not in'),
    (1.0, 0.7, 'guidance_rescale=0.7 has no effect'),
  ],
)
def test_impossible_rescale_is_refused(scale, rescale, words):
  with pytest.raises(ValueError, match=words):
    guidance.classifier_free(
      _scale_by([]), {}, {}, guidance_scale=scale, guidance_rescale=rescale
    )


def test_the_doubled_batch_stays_on_its_devices():
  if len(jax.devices()) < 8:
    pytest.skip('needs 8 devices')
  mesh = jax.make_mesh((8,), ('batch',), devices=jax.devices()[:8])
  split = jax.NamedSharding(mesh, jax.P('batch'))
  args = (
    jax.ShapeDtypeStruct((16, 2, 2, 1), jnp.float32, sharding=split),
    jax.ShapeDtypeStruct((16,), jnp.int32, sharding=split),
    {'text': jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=split)},
  )

  def run(x_t, t, cond):
    uncond = jax.tree.map(jnp.zeros_like, cond)
    return guidance.classifier_free(
      _scale_by_mean, cond, uncond, guidance_scale=2.0, guidance_rescale=0.5
    )(x_t, t)

  text = jax.jit(run).lower(*args).compile().as_text()
  for word in ('all-gather', 'all-to-all', 'collective-permute', 'all-reduce'):
    assert word not in text, word


def _scale_by_mean(x_t, t, cond):
  return jnp.sin(x_t) * (cond['text'].mean(1) + t)[:, None, None, None]


def test_another_network_may_be_guided_away_from():
  def apply_fn(x_t, t, cond):
    return x_t * cond['text'][:, None, None]

  def uncond_fn(x_t, t, cond):
    return 10.0 * x_t * cond['text'][:, None, None]

  cond = {'text': jnp.array([[3.0], [5.0]])}
  uncond = {'text': jnp.array([[1.0], [2.0]])}
  guided = guidance.classifier_free(
    apply_fn, cond, uncond, guidance_scale=1.5, uncond_fn=uncond_fn
  )(X_T, T)
  np.testing.assert_allclose(
    guided[:, 0, 0, 0], [10 + 1.5 * (3 - 10), 20 + 1.5 * (5 - 20)]
  )
