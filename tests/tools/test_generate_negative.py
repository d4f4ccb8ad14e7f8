"""tools.generate away from another UNet (Diffusion-NPO)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dpo_jax import loading, sharding
from dpo_jax.tools import arguments, generate
from dpo_jax.weights import pipeline

FAST = ['--steps=2', '--size=8', '--batch=8', '--images_per_prompt=4']


@pytest.fixture(scope='module')
def other(tiny_pixel_folder, tmp_path_factory):
  """The pixel model with other weights."""
  unet = pipeline.load(tiny_pixel_folder).params['unet']
  changed = jax.tree.map(lambda leaf: 1.5 * leaf + 0.01, unet)
  out = tmp_path_factory.mktemp('other') / 'model'
  pipeline.save(out, base=tiny_pixel_folder, params={'unet': changed})
  return out


def _run(tmp_path, name, model, *more):
  prompts = tmp_path / 'prompts.txt'
  prompts.write_text('a\nb\n')
  argv = [f'--model={model}', f'--prompts={prompts}']
  argv += [f'--out={tmp_path / name}', *FAST, *more]
  return arguments.run(generate.main, argv)


def _pixels(folder):
  return np.stack(
    [
      np.asarray(Image.open(path)).astype(int)
      for path in sorted(folder.glob('00000*.png'))
    ]
  )


def test_the_other_network_takes_the_negative_branch(tiny_pixel_folder, other):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  opened = loading.open_model(
    str(tiny_pixel_folder), mesh=mesh, dtype='float32'
  )
  model, own = opened.model, opened.params['unet']
  away = pipeline.load(other).params['unet']
  x = jax.random.normal(jax.random.key(0), (2, *model.latent_shape((8, 8))))
  t = jnp.array([3, 700])
  guided = model.make_denoise_fn(
    own, {}, {}, guidance_scale=2.5, negative_params=away
  )(x, t)
  along, without = (model.apply_unet(p, x, t, {}) for p in (own, away))
  assert np.abs(along - without).max() > 0.1
  np.testing.assert_allclose(
    guided, 2.5 * along - 1.5 * without, rtol=1e-4, atol=1e-4
  )
  with pytest.raises(ValueError, match='guidance_scale=1: nothing is'):
    model.make_denoise_fn(own, {}, {}, guidance_scale=1, negative_params=away)


def test_pictures_and_what_is_written_of_them(
  tiny_pixel_folder, other, tmp_path
):
  assert _run(tmp_path, 'plain', tiny_pixel_folder) == 0
  for name, folder in (('itself', tiny_pixel_folder), ('away', other)):
    more = [f'--negative_weights={folder}', '--guidance_scale=2']
    assert _run(tmp_path, name, tiny_pixel_folder, *more) == 0
  plain, itself, away = (
    _pixels(tmp_path / name) for name in ('plain', 'itself', 'away')
  )
  assert len(plain) == 8
  # w (a - a) + a is a.
  assert np.abs(plain - itself).max() <= 1
  assert np.abs(plain - away).max() > 1
  record = json.loads((tmp_path / 'away' / 'settings.json').read_text())
  assert record['negative_weights']['path'] == str(other)
  assert record['negative_weights']['unet_sha256'] != record['unet_sha256']
  assert record['settings']['guidance_scale'] == 2.0


@pytest.mark.parametrize(
  'more, message',
  [
    ((), 'guidance scale of 1; give --guidance_scale above 1'),
    (('--guidance_scale=1',), 'guidance scale of 1; give --guidance_scale'),
  ],
)
def test_without_guidance_it_would_say_nothing(
  more, message, tiny_pixel_folder, other, tmp_path, capsys
):
  given = [f'--negative_weights={other}', *more]
  assert _run(tmp_path, 'out', tiny_pixel_folder, *given) == 2
  assert message in capsys.readouterr().err
