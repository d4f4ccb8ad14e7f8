"""CLIP judges against OpenCLIP's and HPSv2's own programs."""

import importlib.util

import jax
import numpy as np
import pytest

from benchmarks import scorer_parity
from dpo_jax import scoring, sharding
from dpo_jax.data import clip_texts
from dpo_jax.evaluate import clip_pixels

# Of the captions and pictures of benchmarks.scorer_parity, printed by it with
# hpsv2 1.2.0, open_clip_torch 3.3.0, torchvision 0.28, torch 2.13, seed 0.
GOLDEN = {
  'hpsv2': [
    [0.06571, 0.05189, 0.05362, 0.05016, 0.06610, 0.05003, 0.05053],
    [0.10870, 0.09555, 0.09670, 0.09649, 0.10637, 0.09371, 0.09730],
    [0.06342, 0.04717, 0.04841, 0.04679, 0.06187, 0.04367, 0.04823],
    [0.07918, 0.06585, 0.06719, 0.06697, 0.07692, 0.06377, 0.06820],
    [0.15371, 0.13837, 0.13959, 0.13777, 0.15221, 0.13410, 0.13945],
    [0.17889, 0.16442, 0.16569, 0.16397, 0.17735, 0.16029, 0.16564],
    [0.20440, 0.18884, 0.19008, 0.18735, 0.20361, 0.18443, 0.18899],
  ],
  'clip': [
    [6.57062, 6.27694, 6.45146, 5.81649, 6.60611, 6.45042, 5.77740],
    [10.86999, 10.26048, 10.27694, 10.10633, 10.63086, 9.77026, 9.68682],
    [6.34164, 5.76613, 5.79444, 5.47720, 6.18101, 5.40211, 5.07640],
    [7.91831, 7.27703, 7.31724, 7.14612, 7.68669, 6.74123, 6.66080],
    [15.37071, 14.80754, 14.86023, 14.58496, 15.21545, 14.36231, 14.14670],
    [17.88923, 17.32925, 17.39839, 17.14862, 17.73011, 16.85494, 16.70007],
    [20.44000, 19.95781, 20.04783, 19.67003, 20.35561, 19.64516, 19.31452],
  ],
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return scorer_parity.write_folder(tmp_path_factory.mktemp('parity'))


@pytest.mark.parametrize('name', ['hpsv2', 'clip'])
def test_scores_are_what_the_originals_printed(folder, name):
  found = scorer_parity.our_scores(name, folder)
  np.testing.assert_allclose(found, GOLDEN[name], atol=2e-5, rtol=1e-5)


def test_both_releases_of_hpsv2_are_prepared_alike(folder):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  for name in ('hpsv2', 'hpsv21'):
    scorer = scoring.open_scorer(name, str(folder), mesh=mesh)
    assert scorer.preprocess == clip_pixels.FitPreprocess(16)


def test_hpsv2_keeps_the_whole_picture():
  # By hand: 40 x 20 in a square of 10 is 10 x 5, one row of five black ones
  # less above than below.
  white = np.full((20, 40, 3), 255, np.uint8)
  plain = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
  found = clip_pixels.FitPreprocess(10, **plain)(white)
  wanted = np.zeros((10, 10, 3), np.float32)
  wanted[2:7] = 1
  np.testing.assert_allclose(found, wanted, atol=1e-6)
  tall = clip_pixels.FitPreprocess(10, **plain)(white.transpose(1, 0, 2))
  np.testing.assert_allclose(tall, wanted.transpose(1, 0, 2), atol=1e-6)


def test_a_sigma_ends_its_word():
  # str.lower's, which OpenCLIP's tokenizer calls.
  assert clip_texts.clean('\u039f\u03a3 \u03a3') == '\u03bf\u03c2 \u03c3'


def test_the_originals_beside_ours(folder, tmp_path):
  for name in ('torch', 'torchvision', 'open_clip', 'hpsv2'):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f'{name} is not installed')
  scorer_parity.declare_torchvision_ops()
  # torchvision's and Pillow's filters differ in rounding.
  for what, gap in scorer_parity.compare_pixels().items():
    assert gap < 1e-4, what
  for what, gap in scorer_parity.compare_features(folder).items():
    assert gap < 1e-5, what
  assert scorer_parity.compare_tokens(tmp_path) == []
  hps = scorer_parity.hpsv2_scores(tmp_path)
  np.testing.assert_allclose(hps, GOLDEN['hpsv2'], atol=1e-5)
  clip = scorer_parity.open_clip_scores(tmp_path)
  np.testing.assert_allclose(clip, GOLDEN['clip'], atol=2e-5)
