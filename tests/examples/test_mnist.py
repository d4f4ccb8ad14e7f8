"""The sevens' builder, and the architecture that they are trained in."""

import json
import pathlib
import runpy

import jax
import numpy as np
import pytest

from configs import mnist
from dpo_jax.data import images as images_lib
from dpo_jax.data import pairs as pairs_lib
from dpo_jax.weights import diffusers_maps, pipeline

MNIST = pathlib.Path(__file__).parents[2] / 'examples' / 'mnist'


@pytest.fixture(scope='module')
def build():
  return runpy.run_path(str(MNIST / 'build_sevens.py'))['main']


@pytest.fixture
def package(tmp_path):
  """An unpacked package of three sevens."""
  values = np.random.default_rng(0).integers(0, 256, (3, 28, 28))
  folder = tmp_path / 'package' / 'src' / 'digits'
  folder.mkdir(parents=True)
  flat = [round(value / 255, 6) for value in values.ravel().tolist()]
  (folder / '7.json').write_text(json.dumps({'data': flat}))
  return tmp_path, values.astype(np.uint8)


def test_every_seven_is_read_back_once(build, package, tmp_path):
  folder, values = package
  for given in (folder, folder / 'package'):
    out = tmp_path / 'new' / f'{given.name}.parquet'
    build([f'--mnist={given}', f'--out={out}'])
    found = pairs_lib.read_images(str(out))
    assert found.captions == ['seven 0000', 'seven 0001', 'seven 0002']
    pictures = np.stack([images_lib.decode(data) for data in found.images])
    np.testing.assert_array_equal(pictures, np.stack([values] * 3, axis=-1))
  build([f'--mnist={folder}', f'--out={out}', '--limit=2'])
  assert len(pairs_lib.read_images(str(out))) == 2


@pytest.mark.parametrize(
  'content, flags, words',
  [
    (None, ['--digit=6'], 'no src/digits/6.json there'),
    ('{"data": [0.5, 2.0]}', [], 'not the digits of mnist'),
    ('{"data": []}', [], 'must hold numbers from 0 to 1'),
    (json.dumps({'data': [1.5] * 784}), [], 'must hold numbers from 0 to 1'),
    ('{}', [], 'not the digits of mnist'),
    (None, ['--limit=0'], '--limit=0: must be at least 1'),
  ],
)
def test_what_is_no_package_is_named(
  build, package, tmp_path, capsys, content, flags, words
):
  folder, _ = package
  if content is not None:
    path = folder / 'package' / 'src' / 'digits' / '7.json'
    path.write_text(content)
  out = tmp_path / 'out.parquet'
  with pytest.raises(SystemExit):
    build([f'--mnist={folder}', f'--out={out}', *flags])
  assert words in capsys.readouterr().err
  assert not out.exists()


def test_the_architecture_is_small_and_fits_the_recipe():
  c = mnist.get_config()
  parts = pipeline.load(MNIST / 'architecture', without=('unet',))
  config = parts.configs['unet']
  assert parts.class_name == 'DDPMPipeline' and config.in_channels == 1
  values = diffusers_maps.load_config(MNIST / 'architecture' / 'unet')
  assert values['sample_size'] == c.data.resolution
  assert c.data.resolution % 2 ** (len(config.block_out_channels) - 1) == 0
  shapes = diffusers_maps.COMPONENTS['unet'].init_shapes(config)
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert 5e5 < count < 1e6
