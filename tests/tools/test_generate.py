"""The generate tool: files, resume, inputs of every kind, and errors."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from dpo_jax import keys as keys_lib
from dpo_jax.tools import arguments, generate
from dpo_jax.weights import pipeline

FAST = ['--steps=2', '--size=16', '--batch=8', '--sampler=ddim']


@pytest.fixture
def prompts(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  rows = [
    {'id': 'apple', 'prompt': 'red apple'},
    {'id': 'cat', 'prompt': 'a cat', 'negative_prompt': 'dog'},
    {'prompt': 'the sun', 'seed': 7},
  ]
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


def _run(out, model, prompts, *more):
  argv = [f'--model={model}', f'--prompts={prompts}', f'--out={out}']
  return arguments.run(generate.main, [*argv, *FAST, *more])


def _manifest(out):
  lines = (out / 'manifest.jsonl').read_text().splitlines()
  return {entry['file']: entry for entry in map(json.loads, lines)}


def _pixels(out, name):
  with Image.open(out / name) as image:
    return np.asarray(image).astype(int)


def test_pictures_manifest_and_resume(tiny_folder, prompts, tmp_path, capsys):
  out = tmp_path / 'out'
  options = ('--images_per_prompt=2',)
  assert _run(out, tiny_folder, prompts, *options) == 0
  entries = _manifest(out)
  assert list(entries) == [
    'apple_0.png',
    'apple_1.png',
    'cat_0.png',
    'cat_1.png',
    '000002_0.png',
    '000002_1.png',
  ]
  assert entries['cat_0.png']['negative_prompt'] == 'dog'
  assert entries['cat_0.png']['settings']['num_steps'] == 2
  assert entries['000002_1.png']['seed'] == 8
  first, second = _pixels(out, 'apple_0.png'), _pixels(out, 'apple_1.png')
  assert first.shape == (16, 16, 3) and first.std() > 5
  assert np.abs(first - second).max() > 1
  assert (out / 'contact_sheet.png').is_file()

  # One is lost and one is damaged: these two are made again, alike.
  kept = (out / 'cat_0.png').stat().st_mtime_ns
  (out / 'apple_0.png').unlink()
  (out / 'apple_1.png').write_bytes(b'nonsense')
  capsys.readouterr()
  assert _run(out, tiny_folder, prompts, *options) == 0
  assert '4 pictures are there' in capsys.readouterr().err
  assert (out / 'cat_0.png').stat().st_mtime_ns == kept
  assert np.abs(_pixels(out, 'apple_0.png') - first).max() <= 1
  assert np.abs(_pixels(out, 'apple_1.png') - second).max() <= 1
  assert _manifest(out).keys() == entries.keys()

  # Another guidance would mix two kinds of pictures in one folder.
  assert _run(out, tiny_folder, prompts, '--guidance_scale=2') == 2
  error = capsys.readouterr().err
  assert "guidance_scale': 7.5" in error and 'choose another --out' in error


def test_a_picture_hangs_on_its_id_not_on_its_neighbours(
  tiny_folder, prompts, tmp_path
):
  assert _run(tmp_path / 'all', tiny_folder, prompts) == 0
  alone = tmp_path / 'alone.json'
  alone.write_text('[{"id": "cat", "prompt": "a cat"}]')
  more = ['--negative_prompt=dog']
  assert _run(tmp_path / 'one', tiny_folder, alone, *more) == 0
  whole, one = (_pixels(tmp_path / n, 'cat_0.png') for n in ('all', 'one'))
  assert np.abs(whole - one).max() <= 1
  assert np.abs(whole - _pixels(tmp_path / 'all', 'apple_0.png')).max() > 1


def test_given_noise_replaces_the_seeds(tiny_folder, prompts, tmp_path):
  key = jax.random.fold_in(jax.random.key(0), 5)
  noise = np.asarray(keys_lib.normal(key[None], (4, 4, 4)))
  np.save(tmp_path / 'noise.npy', noise)
  single = tmp_path / 'one.json'
  single.write_text('[{"id": "a", "prompt": "red apple", "seed": 5}]')
  assert _run(tmp_path / 'seed', tiny_folder, single) == 0
  other = tmp_path / 'other.json'
  other.write_text('[{"id": "a", "prompt": "red apple", "seed": 6}]')
  given = f'--latents={tmp_path / "noise.npy"}'
  assert _run(tmp_path / 'given', tiny_folder, other, given) == 0
  wanted, found = (_pixels(tmp_path / n, 'a_0.png') for n in ('seed', 'given'))
  assert np.abs(wanted - found).max() <= 1


def test_editing_keeps_the_picture_at_low_strength(
  tiny_folder, prompts, tmp_path
):
  start = tmp_path / 'start'
  start.mkdir()
  rng = np.random.default_rng(0)
  for name in ('apple', 'cat', '000002'):
    pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(start / f'{name}.png')
  for strength in ('0.1', '1.0'):
    more = [f'--init_images={start}', f'--strength={strength}', '--steps=10']
    out = tmp_path / strength
    assert _run(out, tiny_folder, prompts, *more) == 0
  low, high = (_pixels(tmp_path / s, 'cat_0.png') for s in ('0.1', '1.0'))
  assert np.abs(low - high).max() > 20


def test_sdxl_with_its_refiner(
  tiny_xl_folder, tiny_refiner_folder, tmp_path, capsys
):
  prompts = tmp_path / 'p.txt'
  prompts.write_text('red apple\na cat ' + 'and a long tail ' * 9)
  refiner = f'--refiner={tiny_refiner_folder}'
  out = tmp_path / 'out'
  assert _run(out, tiny_xl_folder, prompts, '--refiner_start=0.5', refiner) == 0
  assert '1 of 2 prompts are longer' in capsys.readouterr().err
  assert _run(tmp_path / 'base', tiny_xl_folder, prompts) == 0
  refined, base = (
    _pixels(tmp_path / name, '000000_0.png') for name in ('out', 'base')
  )
  assert np.abs(refined - base).max() > 1
  record = json.loads((out / 'settings.json').read_text())
  assert record['refiner']['name'] == str(tiny_refiner_folder)


def test_weights_of_a_pipeline_and_of_a_unet(tiny_folder, prompts, tmp_path):
  unet = pipeline.load(tiny_folder).params['unet']
  changed = jax.tree.map(lambda leaf: 1.5 * leaf, unet)
  tuned = tmp_path / 'tuned'
  pipeline.save(tuned, base=tiny_folder, params={'unet': changed})
  assert _run(tmp_path / 'base', tiny_folder, prompts) == 0
  assert _run(tmp_path / 'wanted', tuned, prompts) == 0
  wanted = _pixels(tmp_path / 'wanted', 'cat_0.png')
  assert np.abs(wanted - _pixels(tmp_path / 'base', 'cat_0.png')).max() > 1
  for i, weights in enumerate((tuned, tuned / 'unet')):
    out = tmp_path / str(i)
    assert _run(out, tiny_folder, prompts, f'--weights={weights}') == 0
    np.testing.assert_array_equal(_pixels(out, 'cat_0.png'), wanted)


@pytest.mark.parametrize(
  'more, words',
  [
    (['--stpes=3'], '--stpes: there is no such flag; did you mean --steps?'),
    (['--steps=0'], "--steps: '0': give an integer, at least 1"),
    (['--size=3xx'], 'give height and width'),
    (['--size=17'], 'multiples of the VAE downscale factor 4'),
    (['--batch=3'], 'multiple of the 8 devices'),
    (['--sampler=best'], "invalid choice: 'best'"),
    (['--eta=1', '--sampler=euler'], 'eta'),
    (['--karras=yes'], 'give true or false'),
    (['--weights=nowhere'], "nowhere: neither a run's workdir"),
    (['--latents=nowhere.npy'], 'nowhere.npy'),
    (['--init_images=nowhere'], 'no picture apple'),
    (['--strength=2'], 'at most 1'),
    (['--prompts=nowhere.txt'], 'nowhere.txt: no such file'),
    (['--model=nowhere'], 'nowhere'),
  ],
)
def test_bad_input_is_one_line(
  tiny_folder, prompts, tmp_path, capsys, more, words
):
  assert _run(tmp_path / 'out', tiny_folder, prompts, *more) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert lines[-1].startswith('error: ') and words in lines[-1]
  assert len(lines) == 1
  assert not (tmp_path / 'out').exists()


def test_missing_flags_are_named(capsys):
  assert arguments.run(generate.main, []) == 2
  assert '--model, --prompts, --out' in capsys.readouterr().err


def test_misshapen_noise_is_refused(tiny_folder, prompts, tmp_path, capsys):
  np.save(tmp_path / 'n.npy', np.zeros((3, 4, 4, 3)))
  more = f'--latents={tmp_path / "n.npy"}'
  assert _run(tmp_path / 'out', tiny_folder, prompts, more) == 2
  assert '(3, 4, 4, 3); give (3, 4, 4, 4)' in capsys.readouterr().err
