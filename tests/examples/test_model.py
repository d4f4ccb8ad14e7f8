"""The shipped pipeline and its judge: size, loading, accuracy."""

import pathlib

import numpy as np
import pytest

from dpo_jax import loading
from dpo_jax.data import images as images_lib
from dpo_jax.data import pairs as pairs_lib
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.evaluate import judge as judge_lib
from dpo_jax.models import classifier
from dpo_jax.weights import classifiers, pipeline

EMOJI = pathlib.Path(__file__).parents[2] / 'examples' / 'emoji'
MODEL = EMOJI / 'model'


def test_the_model_is_small_and_complete():
  files = [path for path in MODEL.rglob('*') if path.is_file()]
  assert sum(path.stat().st_size for path in files) <= 6_000_000
  parts = pipeline.load(MODEL)
  assert set(parts.params) == {'unet', 'vae', 'text_encoder'}
  tokenizer = tokenizer_lib.load(parts.tokenizer_folders[0])
  assert tokenizer.vocab_size == parts.configs['text_encoder'].vocab_size
  model = loading.make_model(parts, dtype='float32')
  assert model.latent_shape(32) == (8, 8, 4)


def test_diffusers_opens_the_model():
  pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  opened = diffusers.StableDiffusionPipeline.from_pretrained(MODEL)
  assert opened.unet.config.cross_attention_dim == 96


def test_the_judge_knows_real_pictures():
  config, params = classifiers.load(EMOJI / 'judge')
  pictures = pairs_lib.read_images(EMOJI / 'pairs.parquet')
  rows = np.arange(0, len(pictures), 5)
  shown = np.stack([images_lib.decode(pictures.images[i]) for i in rows])
  judge = judge_lib.StyleJudge(
    classifier=classifier.ImageClassifier(config),
    params=params,
    classes=config.classes,
    preferred='twemoji',
  )
  wanted = pictures.styles[rows] == pictures.style_names.index('twemoji')
  assert np.mean((judge.score(shown) > 0) == wanted) >= 0.97
