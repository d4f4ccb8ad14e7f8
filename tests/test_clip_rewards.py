"""Rewards of kind features: a head on CLIP, from labels to guided pictures."""

import json

import clip_folder
import jax
import numpy as np
import pytest
from PIL import Image

from dpo_jax import clip_features, main, scoring, sharding
from dpo_jax.evaluate import clip_pixels
from dpo_jax.models import clip_pair
from dpo_jax.tools import arguments as tool_arguments
from dpo_jax.tools import generate
from dpo_jax.weights import clip_files, rewards

SETTINGS = {
  'data__resolution': 8,
  'reward__kind': 'features',
  'reward__space': 'pixels',
  'reward__per_class': 3,
  'reward__networks': 2,
  'reward__widths': '(8,)',
  'objective__numbers__beta': None,
  'objective__reward_beta': None,
  'optim__warmup_steps': None,
  'optim__lr': 1e-2,
  'train__num_steps': 60,
  'train__batch_size': 8,
  'train__eval_every': 0,
}


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  return clip_folder.write(tmp_path_factory.mktemp('clip') / 'c')


@pytest.fixture
def reward_arguments(arguments, make_labels, clip):
  def make(**overrides):
    values = {'model__folder': '', 'reward__clip': clip}
    values |= {'data__path': make_labels()}
    return arguments(
      'configs/reward.py:bedroom', None, **SETTINGS | values | overrides
    )

  return make


@pytest.mark.parametrize('size', [(16, 16), (40, 28), (9, 12)])
def test_pixels_are_those_of_scorers(clip, size):
  """Of bytes by Pillow and of floats by JAX, but for rounding to bytes."""
  y, x = np.mgrid[: size[0], : size[1]] / 9
  picture = np.stack([np.sin(y), np.cos(x), np.sin(x + y)], -1)
  pixels = np.uint8(127.5 + 100 * picture)
  opened = clip_features.open_features(str(clip))
  floats = np.float32(pixels)[None] / 127.5 - 1
  config, params = clip_files.load(clip)
  wanted = clip_pixels.Preprocess(16)(pixels)
  found = opened.features.pixels(floats)[0]
  # A byte is 0.015 of a channel's deviation.
  np.testing.assert_allclose(found, wanted, atol=0.03)
  embedded = clip_pair.CLIP(config).embed_images(params, found[None])
  np.testing.assert_allclose(
    opened.features(opened.params, floats) / np.sqrt(12), embedded, atol=1e-5
  )


def test_the_slope_is_that_of_differences(clip):
  opened = clip_features.open_features(str(clip))
  rng = np.random.default_rng(0)
  x, step = (
    rng.normal(size=(1, 24, 24, 3)).astype(np.float32) for _ in range(2)
  )

  def first(x):
    return opened.features(opened.params, x)[0, 0]

  slope = (jax.grad(first)(x) * step).sum()
  either = first(x + 1e-2 * step) - first(x - 1e-2 * step)
  assert abs(slope) > 1e-2
  np.testing.assert_allclose(slope, either / 2e-2, rtol=1e-2)


def test_labels_make_a_head_that_guides_and_judges(
  reward_arguments, tiny_pixel_folder, clip, tmp_path, capsys
):
  assert main.run(reward_arguments()) == 0, capsys.readouterr().err
  folder = tmp_path / 'run' / 'export'
  loaded = rewards.load(folder)
  record = loaded.record
  assert loaded.config.kind == 'features' and loaded.config.in_channels == 12
  assert record['clip']['name'] == str(clip) and record['size'] == [8, 8]
  assert record['model'] is None and record['place'] == 'x_0_hat'
  report = json.loads((tmp_path / 'run' / 'report.json').read_text())
  (level,) = report['training']
  assert level['ensemble']['auc']['value'] > 0.9

  prompts = tmp_path / 'prompts.txt'
  prompts.write_text('a\nb\n')
  found, pictures = {}, {}
  for scale in (0, 3):
    out = tmp_path / f'out{scale}'
    argv = [f'--model={tiny_pixel_folder}', f'--prompts={prompts}']
    argv += [f'--out={out}', '--steps=3', '--size=8', '--batch=8']
    argv += [f'--reward={folder}', f'--reward_scale={scale}']
    assert tool_arguments.run(generate.main, argv) == 0
    lines = (out / 'manifest.jsonl').read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    found[scale] = np.array([entry['log_reward'] for entry in entries])
    pictures[scale] = [
      np.asarray(Image.open(out / entry['file']).convert('RGB'))
      for entry in entries
    ]
  assert found[3].mean() > found[0].mean() + 1e-3
  judge = scoring.open_scorer(
    'reward', str(folder), mesh=sharding.make_mesh(devices=jax.devices()[:1])
  )
  np.testing.assert_allclose(
    judge.score(pictures[0], ['', '']), found[0], rtol=1e-4, atol=1e-5
  )

  # Moved it is found by the flag; another CLIP is not taken for it.
  moved = clip.rename(tmp_path / 'moved')
  try:
    argv[2] = f'--out={tmp_path / "again"}'
    assert tool_arguments.run(generate.main, argv) == 2
    assert str(clip) in capsys.readouterr().err
    again = [*argv, f'--reward_clip={moved}']
    assert tool_arguments.run(generate.main, again) == 0
    other = clip_folder.write(tmp_path / 'other', seed=1)
    assert (
      tool_arguments.run(generate.main, [*argv, f'--reward_clip={other}']) == 2
    )
    assert 'is not the CLIP that the reward was' in capsys.readouterr().err
  finally:
    moved.rename(clip)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'reward__clip': ''}, 'reward.clip is empty: reward.kind=features'),
    ({'reward__clip': 'tests'}, 'tests'),
    ({'model__folder': 'examples/emoji/model'}, 'looks at no generator'),
    ({'reward__kind': 'clean'}, ': is for reward.kind=features; leave it'),
    ({'reward__space': 'latents'}, "reward.space='latents': CLIP looks at"),
    ({'reward__widths': '(8,8)'}, 'reward.widths=(8, 8): reward.kind=features'),
    ({'reward__depth': 2}, 'reward.depth=2: is for networks of blocks'),
    ({'reward__num_heads': 2}, 'leave it at 4 with features'),
  ],
)
def test_bad_settings_are_one_line(reward_arguments, capsys, changes, words):
  assert main.run(reward_arguments(**changes)) == 2
  lines = [
    line
    for line in capsys.readouterr().err.splitlines()
    if line.startswith('error: ')
  ]
  assert len(lines) == 1 and words in lines[0]
