"""The identity in the place of a VAE."""

import numpy as np
import pytest

from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.diffusion import schedule as schedule_lib
from dpo_jax.models import pixels, unet_2d


def _model(channels):
  return sd_lib.StableDiffusion(
    unet=unet_2d.UNet2DModel(unet_2d.UNet2DConfig()),
    vae=pixels.Pixels(channels),
    text_encoders={},
    schedule=schedule_lib.from_config({}),
    scheduler_config={},
    scaling_factor=1.0,
    latent_channels=channels,
    downscale=1,
  )


def test_a_sample_of_the_posterior_is_the_picture_bitwise():
  model, rng = _model(3), np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 4, 6, 3), np.uint8)
  given = sd_lib.to_float(images)
  # Where the mean is next to nothing the least noise would show.
  given[0, 0] = 1e-30
  noise = 5 * rng.standard_normal(images.shape, dtype=np.float32)
  x_0 = model.encode_images({}, given, noise)
  np.testing.assert_array_equal(x_0, given)
  assert model.latent_shape((4, 6)) == x_0.shape[1:]
  shown = sd_lib.to_uint8(model.decode_latents({}, sd_lib.to_float(images)))
  np.testing.assert_array_equal(shown, images)


def test_grey_is_the_mean_of_the_colours_and_comes_back_as_three():
  model = _model(1)
  image = np.array([[[[-1.0, 0.5, 0.5], [1.0, 1.0, 1.0]]]], np.float32)
  x_0 = model.encode_images({}, image, np.ones((1, 1, 2, 1), np.float32))
  np.testing.assert_array_equal(x_0, [[[[0.0], [1.0]]]])
  shown = model.decode_latents({}, 2 * x_0)
  np.testing.assert_array_equal(shown, [[[[0.0] * 3, [1.0] * 3]]])


def test_there_is_no_text_and_no_guidance_by_it():
  model = _model(1)
  assert model.encode_text({}, np.zeros((4, 0, 1), np.int32)) == {}
  model.check_guidance(1.0)
  words = 'guidance_scale=1.5: this model is unconditional'
  for call in (
    lambda: model.check_guidance(1.5),
    lambda: model.make_denoise_fn({}, {}, {}, guidance_scale=1.5),
  ):
    with pytest.raises(ValueError, match=words):
      call()
