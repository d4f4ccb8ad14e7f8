import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.models import classifier


def _config(**changes):
  return classifier.ImageClassifierConfig.from_dict(
    {'classes': ['noto', 'twemoji'], **changes}
  )


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_size_and_collections():
  model = classifier.ImageClassifier(_config())
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3))
  )
  assert set(variables) == {'params'}
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
  # Convolutions 3-16, 16-16, 16-32, 32-32, 32-64, 64-64 with biases, two
  # GroupNorm vectors each, and a 64 x 2 head with bias.
  convs = [(3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
  expected = sum(9 * i * o + o + 2 * o for i, o in convs) + 64 * 2 + 2
  assert _count(variables) == expected
  assert expected < 100_000


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_and_per_image(dtype):
  model = classifier.ImageClassifier(_config(widths=[8, 16]), dtype)
  images = jax.random.uniform(
    jax.random.key(1), (4, 32, 32, 3), minval=-1.0, maxval=1.0
  )
  variables = model.init(jax.random.key(0), images)
  together = model.apply(variables, images)
  alone = jnp.concatenate(
    [model.apply(variables, images[i : i + 1]) for i in range(4)]
  )
  assert together.shape == (4, 2) and together.dtype == jnp.float32
  np.testing.assert_allclose(
    together, alone, atol=1e-5 if dtype == jnp.float32 else 2e-2
  )


def test_learns_texture_rather_than_place():
  """Stripes against flat patches of the same mean, at random places."""
  rng = np.random.default_rng(0)

  def draw(n):
    labels = rng.integers(0, 2, n)
    images = np.full((n, 16, 16, 3), 0.8, np.float32)
    for image, label in zip(images, labels, strict=True):
      top, left = rng.integers(0, 8, 2)
      patch = rng.uniform(-0.6, 0.4, (1, 1, 3)).repeat(8, 0).repeat(8, 1)
      if label:
        patch += 0.4 * np.where(np.arange(8) % 2, 1, -1)[:, None, None]
      image[top : top + 8, left : left + 8] = patch
    return jnp.asarray(images), jnp.asarray(labels)

  model = classifier.ImageClassifier(_config(widths=[8, 16], image_size=16))
  params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  optimizer = optax.adam(1e-2)
  state = optimizer.init(params)

  @jax.jit
  def step(params, state, images, labels):
    def loss(params):
      return optax.softmax_cross_entropy_with_integer_labels(
        model.apply(params, images), labels
      ).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  for _ in range(40):
    params, state = step(params, state, *draw(32))
  images, labels = draw(200)
  accuracy = (model.apply(params, images).argmax(-1) == labels).mean()
  assert accuracy > 0.95


def test_another_image_size_is_refused():
  model = classifier.ImageClassifier(_config())
  with pytest.raises(ValueError, match=r'\(1, 64, 64, 3\).*32, 32, 3'):
    model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'width': [8]}, 'width'),
    ({'classes': ['noto']}, 'classes'),
    ({'classes': 'noto'}, 'classes'),
    ({'classes': ['noto', 'noto']}, 'classes'),
    ({'classes': ['noto', 3]}, 'classes'),
    ({'widths': []}, 'widths'),
    ({'widths': [12]}, 'widths.*num_groups'),
    ({'widths': [8.0]}, 'widths'),
    ({'num_groups': 0}, 'num_groups'),
    ({'image_size': True}, 'image_size'),
    ({'image_size': 20}, 'image_size.*divisible by 8'),
  ],
)
def test_bad_options_are_named(changes, named):
  with pytest.raises(ValueError, match=named):
    _config(**changes)


def test_classes_are_required():
  with pytest.raises(ValueError, match='classes: missing'):
    classifier.ImageClassifierConfig.from_dict({'widths': [8]})
