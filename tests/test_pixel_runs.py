"""Pixel models through the commands: from scratch, aligned, and drawn from."""

import json
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo_jax import loading, main, sharding
from dpo_jax.tools import arguments as tools
from dpo_jax.tools import generate

COMMON = {
  'data__resolution': 8,
  'train__num_steps': 2,
  'train__eval_every': 0,
  'train__checkpoint_every': 2,
  'eval__guidance_scale': 1.0,
}


@pytest.fixture
def architecture(tiny_pixel_folder, tmp_path):
  """The folder without its weights."""
  folder = shutil.copytree(tiny_pixel_folder, tmp_path / 'architecture')
  for path in folder.rglob('*.safetensors'):
    path.unlink()
  return folder


@pytest.fixture
def nameless_pairs(tiny_pairs, tmp_path):
  """Pairs whose caption is ''."""
  table = pq.read_table(tiny_pairs)
  place = table.schema.get_field_index('caption')
  empty = pa.array([''] * len(table), pa.string())
  path = tmp_path / 'nameless.parquet'
  pq.write_table(table.set_column(place, 'caption', empty), path)
  return path


def _losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [r['loss'] for r in map(json.loads, lines) if 'loss' in r]


def _unet(folder):
  opened = loading.open_model(
    str(folder), mesh=sharding.make_mesh(), dtype='float32'
  )
  return jax.device_get(opened.params['unet'])


def _generate(model, out, prompts, *more):
  argv = [f'--model={model}', f'--prompts={prompts}', f'--out={out}', *more]
  return tools.run(generate.main, [*argv, '--steps=2', '--batch=8'])


def test_from_scratch_to_pictures(arguments, architecture, tmp_path, capsys):
  argv = arguments(
    'configs/mnist.py',
    **COMMON,
    model__folder=architecture,
    objective__numbers__beta=None,
    objective__reward_beta=None,
  )
  assert main.run(argv) == 0, capsys.readouterr().err
  run = tmp_path / 'run'
  # The output begins at 0, so that the error is that of the noise: 1.
  first, second = _losses(run)
  assert first == pytest.approx(1.0, abs=0.15) and second != first
  assert (run / 'samples' / 'samples.png').is_file()
  assert sorted(path.name for path in (run / 'export').iterdir()) == [
    'README.md',
    'model_index.json',
    'scheduler',
    'unet',
  ]

  prompts = tmp_path / 'names.txt'
  prompts.write_text('one\ntwo\n')
  assert _generate(run / 'export', tmp_path / 'drawn', prompts) == 0
  said = capsys.readouterr().err
  assert 'is unconditional: the prompts only name the pictures' in said
  with Image.open(tmp_path / 'drawn' / '000001_0.png') as image:
    pixels = np.asarray(image)
  assert pixels.shape == (8, 8, 3)
  np.testing.assert_array_equal(pixels, pixels[..., :1].repeat(3, -1))
  record = json.loads((tmp_path / 'drawn' / 'settings.json').read_text())
  assert record['settings']['guidance_scale'] == 1.0
  assert record['settings']['sampler'] == 'ddpm'
  for flag, words in (
    ('--guidance_scale=3', 'guidance_scale=3.0: this model is unconditional'),
    ('--negative_prompt=dog', '--negative_prompt: '),
    ('--refiner=nowhere', 'nowhere'),
  ):
    out = tmp_path / 'refused'
    assert _generate(run / 'export', out, prompts, flag) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and not out.exists()


def test_pairs_without_captions_align_it(
  arguments, tiny_pixel_folder, nameless_pairs, tmp_path, capsys
):
  argv = arguments(
    **COMMON,
    model__folder=tiny_pixel_folder,
    data__path=nameless_pairs,
    data__holdout=0.0,
    eval__retrieval=False,
  )
  assert main.run(argv) == 0, capsys.readouterr().err
  run = tmp_path / 'run'
  first, second = _losses(run)
  assert first == pytest.approx(np.log(2), abs=1e-6) and second != first
  report = json.loads((run / 'report.json').read_text())
  assert 0 <= report['implicit_accuracy'] <= 1
  before, after = _unet(tiny_pixel_folder), _unet(run / 'export')
  assert not np.array_equal(
    before['conv_in']['kernel'], after['conv_in']['kernel']
  )


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'eval__guidance_scale': 7.5}, 'guidance_scale=7.5: this model is uncond'),
    ({'data__prompt_dropout': 0.2}, 'data.prompt_dropout=0.2: this model is'),
    ({'task': 'autoencode'}, 'works on pixels and has no VAE to train'),
  ],
)
def test_what_a_pixel_model_has_not_is_one_line(
  arguments, tiny_pixel_folder, capsys, changes, words
):
  argv = arguments(**(COMMON | {'model__folder': tiny_pixel_folder} | changes))
  assert main.run(argv) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert words in lines[-1]
