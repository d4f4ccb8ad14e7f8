"""The 8x8 sevens' builder, their hand labels and their architecture."""

import gzip
import json
import pathlib
import runpy

import jax
import numpy as np
import pytest

from dpo_jax.data import images as images_lib
from dpo_jax.data import labels as labels_lib
from dpo_jax.data import pairs as pairs_lib
from dpo_jax.weights import diffusers_maps, pipeline

DIGITS = pathlib.Path(__file__).parents[2] / 'examples' / 'digits'


@pytest.fixture(scope='module')
def build():
  return runpy.run_path(str(DIGITS / 'build_sevens.py'))['main']


@pytest.fixture
def digits(tmp_path):
  """(file of 20 sevens among other digits, the sevens)."""
  values = np.random.default_rng(0).integers(0, 17, (40, 8, 8))
  kinds = np.tile([7, 1], 20)
  rows = np.c_[values.reshape(40, -1), kinds]
  path = tmp_path / 'digits.csv.gz'
  path.write_bytes(gzip.compress(_text(rows)))
  return path, values[kinds == 7]


def _text(rows):
  return '\n'.join(','.join(map(str, row)) for row in rows).encode()


def _hand(path, **changes):
  hand = {'n_sevens': 20, 'crossed': [*range(14)], 'ambiguous': [14]}
  path.write_text(json.dumps(hand | changes))
  return path


def test_every_seven_and_label_is_read_back_once(build, digits, tmp_path):
  path, values = digits
  out, folder = tmp_path / 'new' / 'sevens.parquet', tmp_path / 'labels'
  hand = _hand(tmp_path / 'hand.json')
  build(
    [f'--digits={path}', f'--out={out}', f'--hand={hand}']
    + [f'--labels={folder}', '--folds=5']
  )
  found = pairs_lib.read_images(str(out))
  assert found.captions == [f'seven {i:04}' for i in range(20)]
  pictures = np.stack([images_lib.decode(data) for data in found.images])
  assert (pictures.min(), pictures.max()) == (0, 255)
  np.testing.assert_allclose(pictures[..., 0], values * 255 / 16, atol=0.5)
  whole, _ = labels_lib.read([str(folder / 'all')])
  named = dict(zip(whole.captions, whole.liked.tolist(), strict=True))
  crossed = {f'seven {i:04}': 0.0 for i in range(14)}
  assert named == crossed | {f'seven {i:04}': 1.0 for i in range(15, 20)}
  data = dict(zip(whole.captions, whole.images, strict=True))
  assert data['seven 0003'] == found.images[3]
  seen = []
  for fold in range(5):
    train, held = (
      labels_lib.read([str(folder / f'fold_{fold}' / name)])[0]
      for name in ('train', 'held')
    )
    assert held.count()['benign'] == 1 and held.count()['malign'] in (2, 3)
    assert sorted(train.names + held.names) == sorted(whole.names)
    seen += held.names
  assert sorted(seen) == sorted(whole.names)


@pytest.mark.parametrize(
  ('content', 'changes', 'words'),
  [
    (b'no archive', {}, "not the file digits.csv.gz of scikit-learn's wheel"),
    (_text([[3] * 64 + [7]] * 2)[:-9], {}, 'not the file digits.csv.gz'),
    (_text([[17] * 64 + [7]]), {}, 'in numbers from 0 to 16'),
    (_text([[3] * 64 + [1]]), {}, 'must hold sevens'),
    (None, {'n_sevens': 179}, 'no labels of these 20 sevens (179 sevens)'),
    (None, {'crossed': [20]}, 'no labels of these 20 sevens'),
    (None, {'crossed': None, 'ambiguous': 'x'}, 'no labels of these'),
  ],
)
def test_other_files_are_named(
  build, digits, tmp_path, capsys, content, changes, words
):
  path, _ = digits
  if content is not None:
    text = content.startswith(b'no')
    path.write_bytes(content if text else gzip.compress(content))
  hand, out = _hand(tmp_path / 'h.json', **changes), tmp_path / 'out.parquet'
  with pytest.raises(SystemExit):
    build(
      [f'--digits={path}', f'--out={out}', f'--hand={hand}']
      + [f'--labels={tmp_path / "labels"}']
    )
  assert words in capsys.readouterr().err
  assert not out.exists()


def test_the_hand_labels_are_of_179_sevens():
  hand = json.loads((DIGITS / 'crossed7.json').read_text())
  crossed, doubtful = set(hand['crossed']), set(hand['ambiguous'])
  assert hand['n_sevens'] == 179 and not crossed & doubtful
  assert (len(crossed), len(doubtful)) == (161, 5)
  assert crossed | doubtful < set(range(179)) and hand['labelled_by']
  assert len(hand['sha1_crossed']) == 161


def test_the_architecture_is_tiny():
  parts = pipeline.load(DIGITS / 'architecture', without=('unet',))
  config = parts.configs['unet']
  assert parts.class_name == 'DDPMPipeline' and config.in_channels == 1
  values = diffusers_maps.load_config(DIGITS / 'architecture' / 'unet')
  assert values['sample_size'] == 8
  shapes = diffusers_maps.COMPONENTS['unet'].init_shapes(config)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 2e5
