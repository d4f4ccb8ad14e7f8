import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import loading, sharding
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.evaluate import generate, implicit, judge
from dpo_jax.models import classifier
from dpo_jax.weights import classifiers, pipeline


@pytest.fixture(scope='module')
def setup(tiny_folder):
  parts = pipeline.load(tiny_folder)
  model = loading.make_model(parts, dtype='float32')
  tokenizers = tokenizer_lib.load_all(parts.tokenizer_folders)
  prompts = ['apple', 'car', 'dog', 'sun', 'cup']
  return (
    model,
    parts.params,
    generate.prompt_batch(model, tokenizers.encode, prompts),
  )


def _generate(setup, *, sampler='ddim', batch_size=8, devices=1, rows=5):
  model, params, inputs = setup
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  sample_fn = generate.make_sample_fn(
    model,
    generate.Settings(
      size=(16, 16), sampler=sampler, num_steps=3, guidance_scale=2.0
    ),
  )
  return generate.generate(
    sample_fn,
    jax.device_put(params, sharding.replicated(mesh)),
    {name: array[:rows] for name, array in inputs.items()},
    np.arange(rows, dtype=np.uint32),
    seed=3,
    batch_size=batch_size,
    mesh=mesh,
  ).astype(int)


@pytest.mark.parametrize('sampler', ['ddim', 'ddpm'])
def test_a_picture_does_not_depend_on_its_batch(setup, sampler):
  whole = _generate(setup, sampler=sampler)
  assert whole.shape == (5, 16, 16, 3) and whole.std() > 5
  parts = _generate(setup, sampler=sampler, batch_size=2)
  assert np.abs(whole - parts).max() <= 1
  spread = _generate(setup, sampler=sampler, devices=8)
  assert np.abs(whole - spread).max() <= 1


def test_prompts_and_seeds_matter(setup):
  model, params, inputs = setup
  whole = _generate(setup)
  assert np.abs(whole[0] - whole[1]).max() > 1
  one = {name: np.repeat(array[:1], 5, 0) for name, array in inputs.items()}
  same = _generate((model, params, one))
  assert np.abs(same[0] - same[1]).max() > 1
  assert np.abs(same[0] - whole[0]).max() <= 1


def test_judge_scores_are_log_odds(tmp_path):
  config = {'classes': ['a', 'b', 'c'], 'widths': [8], 'image_size': 16}
  made = classifier.ImageClassifierConfig.from_dict(config)
  module = classifier.ImageClassifier(made)
  params = module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params']
  params = jax.tree.map(
    lambda leaf: leaf + 0.1 * jnp.arange(leaf.size).reshape(leaf.shape) % 1,
    params,
  )
  classifiers.save(tmp_path, config=config, params=params)
  loaded, back = classifiers.load(tmp_path)
  assert loaded == made
  jax.tree.map(np.testing.assert_array_equal, params, back)
  images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
  found = judge.StyleJudge(
    classifier=module, params=back, classes=made.classes, preferred='b'
  ).score(images, batch_size=2)
  logits = module.apply({'params': params}, images / 127.5 - 1.0)
  p = np.asarray(jax.nn.softmax(logits), np.float64)[:, 1]
  np.testing.assert_allclose(found, np.log(p / (1 - p)), rtol=1e-4, atol=1e-5)


def test_a_misshapen_judge_is_refused(tmp_path):
  config = {'classes': ['a', 'b'], 'widths': [8], 'image_size': 16}
  made = classifier.ImageClassifierConfig.from_dict(config)
  params = classifier.ImageClassifier(made).init(
    jax.random.key(0), jnp.zeros((1, 16, 16, 3))
  )['params']
  classifiers.save(tmp_path, config=config | {'widths': [16]}, params=params)
  with pytest.raises(ValueError, match=r'model\.safetensors: tensor'):
    classifiers.load(tmp_path)


def test_implicit_accuracy_averages_draws_before_judging():
  # Pair 0: margins 3 and -1, mean above 0. Pair 1: -3 and 1. Pair 2 is
  # padding. Single draws would give one half for both.
  table = {0: [3.0, -3.0, 9.0], 1: [-1.0, 1.0, 9.0]}

  def batches(epoch):
    yield {'epoch': epoch}, 2

  found = implicit.accuracy(
    lambda batch: np.array(table[batch['epoch']]), batches, draws=2
  )
  assert found['value'] == 0.5 and found['n'] == 2
  first = implicit.accuracy(
    lambda batch: np.array([1.0, 2.0, 3.0]), batches, draws=1
  )
  assert first['value'] == 1.0
