"""Training of a classifier of pictures by the generator that drew them."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from dpo_jax import keys as keys_lib
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax import task as task_lib
from dpo_jax import types


def augment(
  images: jax.Array,
  draws: types.Key,
  *,
  noise: float,
  gain: float,
  blur: float,
  shift: int,
) -> jax.Array:
  """Random flip, shift, brightness, blur and noise, one draw an image.

  images [b H W 3] in [-1, 1]. A generator's pictures are a little softer and
  noisier than real ones: the judge must not hang on that. noise: standard
  deviation at most, gain: of the distance from white in each channel, blur:
  share of a 3x3 box mean at most, shift: pixels at most.
  """

  def one(image, key):
    flip, move, light, soft, amount, grain = jax.random.split(key, 6)
    image = jnp.where(jax.random.bernoulli(flip), image[:, ::-1], image)
    offset = jax.random.randint(move, (2,), -shift, shift + 1)
    # Wrapping is harmless on pictures with a plain border.
    image = jnp.roll(image, offset, axis=(0, 1))
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode='edge')
    around = sum(
      padded[i : i + image.shape[0], j : j + image.shape[1]]
      for i in range(3)
      for j in range(3)
    )
    mix = blur * jax.random.uniform(soft)
    image = (1 - mix) * image + mix * around / 9
    scale = 1 + gain * jax.random.normal(light, (3,))
    level = noise * jax.random.uniform(amount)
    image = 1 - scale * (1 - image)
    image += level * jax.random.normal(grain, image.shape)
    return jnp.clip(image, -1.0, 1.0)

  return jax.vmap(one)(images, draws)


def make_task(
  *,
  classifier: nn.Module,
  params: types.Params,
  noise: float,
  gain: float,
  blur: float,
  shift: int,
) -> task_lib.Task:
  """Cross entropy of logits [b k] with `batch['label']` [b].

  The pictures are augmented (see `augment`) in training only.
  """

  def score(params, images, labels):
    logits = classifier.apply({'params': params['classifier']}, images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
    return loss, {'classify/accuracy': correct}

  def loss(params, frozen, batch, key):
    del frozen
    draws = keys_lib.per_example(
      keys_lib.by_name(key, ['augment'])['augment'],
      batch['id'],
      batch['epoch'],
    )
    images = augment(
      sd_lib.to_float(batch['images']),
      draws,
      noise=noise,
      gain=gain,
      blur=blur,
      shift=shift,
    )
    return score(params, images, batch['label'])

  def plain(params, frozen, batch, key):
    del frozen, key
    return score(params, sd_lib.to_float(batch['images']), batch['label'])

  return task_lib.Task(
    params={'classifier': params},
    frozen={},
    loss=loss,
    evaluators={'images': plain},
  )
