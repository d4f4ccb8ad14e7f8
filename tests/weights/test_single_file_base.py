"""The folder that is made for a single-file checkpoint."""

import inspect
import json
import shutil

import jax
import ldm_layout
import numpy as np
import pytest

from dpo_jax import loading, sharding
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.diffusion import schedule as schedule_lib
from dpo_jax.weights import (
  diffusers_maps,
  json_files,
  model_index,
  pipeline,
  released,
  single_file,
)

FAMILIES = list(ldm_layout.FULL)
COMPONENTS = tuple(diffusers_maps.COMPONENTS)


@pytest.fixture(params=FAMILIES)
def family(request):
  return request.param


@pytest.fixture(scope='module')
def clip_tokenizer(tmp_path_factory):
  """As many words as CLIP has, in its order: bytes first, controls last."""
  folder = tmp_path_factory.mktemp('clip')
  letters = [chr(code) for code in range(ord('!'), ord('~') + 1)]
  words = [*letters, *(f'{letter}</w>' for letter in letters)]
  controls = ['<|startoftext|>', '<|endoftext|>']
  count = released.VOCABULARY - len(words) - len(controls)
  words += [f'word{i}' for i in range(count)] + controls
  entries = {word: i for i, word in enumerate(words)}
  (folder / 'vocab.json').write_text(json.dumps(entries))
  (folder / 'merges.txt').write_text('#version: 0.2\n')
  # Neither belongs to CLIP's own tokenizer; both would win.
  (folder / 'tokenizer.json').write_text('{}')
  (folder / 'special_tokens_map.json').write_text('{"pad_token": "a"}')
  return folder


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A tiny checkpoint of each family."""
  folder = tmp_path_factory.mktemp('files')
  for name in FAMILIES:
    ldm_layout.write(folder, name)
  return folder


@pytest.fixture
def file(files, family):
  return files / f'{family}.safetensors'


def _make_pipeline(out, family, tokenizer_dir):
  """A pipeline of the checkpoint's sizes, without weights."""
  configs = ldm_layout.tiny_configs(family)
  scheduler = released.scheduler_config(family, 'epsilon')
  tokenizers = list(released.PAD_TOKENS[family])
  for name in tokenizers:
    shutil.copytree(tokenizer_dir, out / name)
  (out / 'scheduler').mkdir()
  json_files.write(out / 'scheduler' / 'scheduler_config.json', scheduler)
  for name, values in configs.items():
    (out / name).mkdir()
    json_files.write(out / name / 'config.json', values)
  index = model_index.make(
    released.CLASS_NAMES[family],
    components=configs,
    flags=released.FLAGS[family],
  )
  entries = model_index.to_json(
    index,
    scheduler_class=scheduler['_class_name'],
    tokenizer_classes=dict.fromkeys(tokenizers, 'CLIPTokenizer'),
  )
  json_files.write(out / 'model_index.json', entries)
  return out


def _prediction_type(family):
  return 'v_prediction' if family == 'sd2' else ''


def test_with_the_released_configs(file, family, clip_tokenizer, tmp_path):
  out = tmp_path / 'new' / 'base'
  single_file.write_base(
    file,
    configs=clip_tokenizer,
    out=out,
    prediction_type=_prediction_type(family),
  )
  parts = pipeline.load(out, without=COMPONENTS)
  assert set(parts.configs) == set(single_file.PREFIXES[family])
  assert parts.requires_aesthetics_score == (family == 'sdxl_refiner')
  assert parts.force_zeros_for_empty_prompt == (family == 'sdxl')
  schedule = schedule_lib.from_config(parts.scheduler_config)
  wanted = _prediction_type(family) or 'epsilon'
  assert schedule.prediction_type == wanted
  sides = {'sd1': 64, 'sd2': 96, 'sdxl': 128, 'sdxl_refiner': 128}
  values = json.loads((out / 'unet' / 'config.json').read_text())
  assert values['sample_size'] == sides[family]
  assert not [*out.rglob('*.safetensors')]
  # 0 is '!', with which OpenCLIP pads; the last is the end of text.
  pads = {'sd1': [49407], 'sd2': [0], 'sdxl': [49407, 0], 'sdxl_refiner': [0]}
  rows, _ = tokenizer_lib.load_all(parts.tokenizer_folders).encode(['ab'])
  assert rows.shape[-1] == 77
  assert rows[0, :, 0].tolist() == [49406] * len(rows[0])
  assert rows[0, :, -1].tolist() == pads[family]


def test_diffusers_opens_the_released_configs(
  file, family, clip_tokenizer, tmp_path
):
  pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  transformers = pytest.importorskip('transformers')
  out = tmp_path / 'base'
  single_file.write_base(
    file,
    configs=clip_tokenizer,
    out=out,
    prediction_type=_prediction_type(family),
  )
  index = json.loads((out / 'model_index.json').read_text())
  assert hasattr(diffusers, index['_class_name'])
  scheduler = getattr(diffusers, index['scheduler'][1])
  opened, unknown = scheduler.from_pretrained(
    out, subfolder='scheduler', return_unused_kwargs=True
  )
  assert unknown.keys() <= {'_class_name'}
  assert opened.config.prediction_type == (
    _prediction_type(family) or 'epsilon'
  )
  for name in released.components(family):
    component = diffusers_maps.COMPONENTS[name]
    if component.library == 'diffusers':
      cls = getattr(diffusers, component.class_name)
      values = cls.load_config(out, subfolder=name)
      taken = inspect.signature(cls.__init__).parameters
      unknown = {key for key in values if key[0] != '_'} - taken.keys()
      assert not unknown
      continue
    values = json.loads((out / name / 'config.json').read_text())
    config = transformers.CLIPTextConfig.from_pretrained(out, subfolder=name)
    plain = transformers.CLIPTextConfig().to_dict().keys()
    assert values.keys() - plain <= {'architectures'}
    assert config.to_dict().items() >= values.items()
  for name, pad in released.PAD_TOKENS[family].items():
    tokenizer = transformers.CLIPTokenizer.from_pretrained(out, subfolder=name)
    assert tokenizer.pad_token == pad
    assert tokenizer.model_max_length == 77


def test_an_export_is_what_diffusers_makes_of_the_file(
  file, family, tokenizer_dir, tmp_path
):
  pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  folder = _make_pipeline(tmp_path / 'other', family, tokenizer_dir)
  base, out = tmp_path / 'base', tmp_path / 'export'
  single_file.write_base(file, configs=folder, out=base)
  parts = pipeline.load(base, without=COMPONENTS)
  params = single_file.load_params(file, parts.configs)
  pipeline.save(out, base=base, params=params)
  cls = getattr(diffusers, released.CLASS_NAMES[family])
  ours = cls.from_pretrained(out, local_files_only=True)
  theirs = cls.from_single_file(
    str(file), config=str(folder), local_files_only=True
  )
  assert set(ours.components) == set(theirs.components)
  for name in params:
    found = getattr(ours, name).state_dict()
    wanted = getattr(theirs, name).state_dict()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
      assert tensor.equal(found[key]), (name, key)


def test_a_model_from_a_single_file_is_saved_whole(
  file, family, tokenizer_dir, tmp_path, monkeypatch
):
  """Its base has no weights: what was not trained comes from the file."""
  monkeypatch.setenv('DPO_JAX_CACHE', str(tmp_path / 'cache'))
  folder = _make_pipeline(tmp_path / 'other', family, tokenizer_dir)
  opened = loading.open_model(
    str(file),
    mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    configs=str(folder),
    dtype='float32',
  )
  trained = {'unet': jax.tree.map(lambda x: x + 1, opened.params['unet'])}
  out = tmp_path / 'out'
  loading.save_model(out, opened, trained, dtype='float32')
  saved = pipeline.load(out).params
  wanted = opened.params | trained
  assert saved.keys() == wanted.keys()
  jax.tree.map(np.testing.assert_array_equal, saved, wanted)


def test_a_folder_is_copied_without_weights(files, tokenizer_dir, tmp_path):
  folder = _make_pipeline(tmp_path / 'other', 'sd1', tokenizer_dir)
  index = folder / 'model_index.json'
  entries = json.loads(index.read_text())
  entries |= {
    'safety_checker': ['stable_diffusion', 'StableDiffusionSafetyChecker'],
    'requires_safety_checker': True,
  }
  index.write_text(json.dumps(entries))
  (folder / 'safety_checker').mkdir()
  (folder / 'unet' / 'diffusion_pytorch_model.bin').write_bytes(b'x')
  (folder / 'unet' / 'model.safetensors.index.json').write_text('{}')
  (folder / 'secret.txt').write_text('no part of it')
  out = tmp_path / 'base'
  single_file.write_base(files / 'sd1.safetensors', configs=folder, out=out)
  names = {path.relative_to(out).as_posix() for path in out.rglob('*.*')}
  assert names == {
    'model_index.json',
    'scheduler/scheduler_config.json',
    'text_encoder/config.json',
    'tokenizer/merges.txt',
    'tokenizer/tokenizer_config.json',
    'tokenizer/vocab.json',
    'unet/config.json',
    'vae/config.json',
  }
  copied = json.loads((out / 'model_index.json').read_text())
  assert copied['safety_checker'] == [None, None]
  assert copied['requires_safety_checker'] is False


def test_the_cached_folder_follows_its_content(
  files, clip_tokenizer, tmp_path, monkeypatch
):
  monkeypatch.setenv('DPO_JAX_CACHE', str(tmp_path / 'cache'))
  path = files / 'sd2.safetensors'

  def make(prediction_type):
    return single_file.cached_base(
      path, configs=clip_tokenizer, prediction_type=prediction_type
    )

  first, other = make('epsilon'), make('v_prediction')
  assert first != other
  assert make('epsilon') == first
  assert sorted((tmp_path / 'cache').iterdir()) == sorted([first, other])
  assert (first / 'model_index.json').is_file()
  with pytest.raises(ValueError, match=r'no configs and no tokenizer.*\(sd2\)'):
    single_file.cached_base(path, configs='')


@pytest.mark.parametrize(
  'case, pattern',
  [
    ('empty', r'neither a diffusers pipeline \(model_index.json\) nor a CLIP'),
    ('no type', r"prediction_type='' for SD 2\.x.*epsilon, v_prediction"),
    ('bad type', r"prediction_type='sample'; allowed: epsilon, v_prediction"),
    ('small', r'vocab.json: 20 words, not the 49408'),
    ('family', r"but the file is of the family 'sdxl'"),
    ('both', r"leave prediction_type='epsilon' empty"),
    ('there', r'exists already'),
  ],
)
def test_errors(case, pattern, files, tokenizer_dir, clip_tokenizer, tmp_path):
  configs, out, options = clip_tokenizer, tmp_path / 'out', {}
  name = 'sdxl' if case == 'family' else 'sd2'
  if case == 'empty':
    configs = tmp_path
  elif case == 'bad type':
    options = {'prediction_type': 'sample'}
  elif case == 'small':
    configs, options = tokenizer_dir, {'prediction_type': 'epsilon'}
  elif case in ('family', 'both'):
    configs = _make_pipeline(tmp_path / 'other', 'sd2', tokenizer_dir)
    options = {'prediction_type': 'epsilon'} if case == 'both' else {}
  elif case == 'there':
    out.mkdir()
  before = sorted(tmp_path.iterdir())
  with pytest.raises(ValueError, match=pattern) as error:
    single_file.write_base(
      files / f'{name}.safetensors', configs=configs, out=out, **options
    )
  assert '\n' not in str(error.value)
  assert sorted(tmp_path.iterdir()) == before
