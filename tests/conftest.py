"""Eight virtual CPU devices, a compile cache, and a tiny real pipeline."""

import os
import pathlib

import processor

# Before jax is imported: tests place work on 1 to 8 of these.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    # Tests compile far more than they compute. At 0 the policy's pass and the
    # reference's would round apart.
    '--xla_backend_optimization_level=1',
  ]
)
os.environ['JAX_PLATFORMS'] = 'cpu'
# What was compiled once serves all tests, workers, processes they start, and
# the next run, of another clone too.
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(
  os.environ.get('DPO_JAX_TEST_CACHE')
  or os.path.expanduser('~/.cache/dpo_jax_tests'),
  processor.name(),
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import json
import shutil
import zlib

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from absl import flags
from PIL import Image

from dpo_jax.weights import diffusers_maps, pipeline

ROOT = pathlib.Path(__file__).parent.parent
# Optimizer steps of the runs that `arguments` describes.
STEPS = 8
EMOJI = ROOT / 'examples' / 'emoji'

# Grain reads absl flags, which nothing has parsed under pytest.
flags.FLAGS.mark_as_parsed()

UNET = {
  'sample_size': 4,
  'in_channels': 4,
  'out_channels': 4,
  'block_out_channels': [16, 16],
  'down_block_types': ['CrossAttnDownBlock2D', 'DownBlock2D'],
  'up_block_types': ['UpBlock2D', 'CrossAttnUpBlock2D'],
  'layers_per_block': 1,
  'cross_attention_dim': 16,
  'attention_head_dim': 2,
  'norm_num_groups': 4,
}
VAE = {
  'in_channels': 3,
  'out_channels': 3,
  'latent_channels': 4,
  'block_out_channels': [8, 8, 8],
  'down_block_types': ['DownEncoderBlock2D'] * 3,
  'up_block_types': ['UpDecoderBlock2D'] * 3,
  'layers_per_block': 1,
  'norm_num_groups': 4,
  'scaling_factor': 0.7,
}
TEXT = {
  'vocab_size': 1024,
  'hidden_size': 16,
  'intermediate_size': 32,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'max_position_embeddings': 16,
  'hidden_act': 'quick_gelu',
  'bos_token_id': 1022,
  'eos_token_id': 1023,
  'pad_token_id': 1023,
}
SCHEDULER = {
  '_class_name': 'DDIMScheduler',
  'beta_schedule': 'scaled_linear',
  'beta_start': 0.00085,
  'beta_end': 0.012,
  'num_train_timesteps': 1000,
  'clip_sample': False,
  'set_alpha_to_one': False,
  'steps_offset': 1,
  'prediction_type': 'epsilon',
}
# SDXL in small: two text encoders side by side, 16 + 24, and sizes.
TEXT_2 = TEXT | {'hidden_size': 24, 'projection_dim': 24, 'hidden_act': 'gelu'}
UNET_XL = UNET | {
  'cross_attention_dim': 40,
  'attention_head_dim': [2, 4],
  'transformer_layers_per_block': [1, 2],
  'use_linear_projection': True,
  'addition_embed_type': 'text_time',
  'addition_time_embed_dim': 8,
  'projection_class_embeddings_input_dim': 24 + 6 * 8,
}
UNET_REFINER = UNET_XL | {
  'cross_attention_dim': 24,
  'projection_class_embeddings_input_dim': 24 + 5 * 8,
}
SCHEDULER_XL = {
  '_class_name': 'EulerDiscreteScheduler',
  'beta_schedule': 'scaled_linear',
  'beta_start': 0.00085,
  'beta_end': 0.012,
  'num_train_timesteps': 1000,
  'steps_offset': 1,
  'timestep_spacing': 'leading',
  'interpolation_type': 'linear',
  'use_karras_sigmas': False,
  'prediction_type': 'epsilon',
}


# Without text and VAE, in grey pixels.
UNET_PIXELS = {
  '_class_name': 'UNet2DModel',
  'sample_size': 8,
  'in_channels': 1,
  'out_channels': 1,
  'block_out_channels': [8, 8],
  'down_block_types': ['DownBlock2D', 'AttnDownBlock2D'],
  'up_block_types': ['AttnUpBlock2D', 'UpBlock2D'],
  'layers_per_block': 1,
  'attention_head_dim': 4,
  'norm_num_groups': 4,
}
SCHEDULER_PIXELS = {
  '_class_name': 'DDPMScheduler',
  'beta_schedule': 'linear',
  'beta_start': 0.0001,
  'beta_end': 0.02,
  'num_train_timesteps': 1000,
  'clip_sample': True,
  'prediction_type': 'epsilon',
  'variance_type': 'fixed_small',
}


def _random_params(name: str, config: dict):
  component = diffusers_maps.COMPONENTS[name]
  made = component.make_config(config)
  params = jax.jit(lambda key: component.init(made, key))(jax.random.key(7))

  def shake(path, leaf):
    # Zero-initialised leaves would make the network's output zero.
    number = zlib.crc32(jax.tree_util.keystr(path).encode())
    key = jax.random.fold_in(jax.random.key(8), number)
    return leaf + 0.05 * jax.random.normal(key, leaf.shape)

  return jax.device_get(jax.tree_util.tree_map_with_path(shake, params))


@pytest.fixture(scope='session')
def tiny_folder(tmp_path_factory) -> pathlib.Path:
  """A complete Stable Diffusion folder with tiny random networks."""
  folder = tmp_path_factory.mktemp('pipelines') / 'tiny'
  configs = {'unet': UNET, 'vae': VAE, 'text_encoder': TEXT}
  return _create(
    folder,
    configs=configs,
    scheduler=SCHEDULER,
    tokenizer_dir=EMOJI / 'architecture' / 'tokenizer',
  )


@pytest.fixture(scope='session')
def tokenizer_2_folder(tmp_path_factory) -> pathlib.Path:
  """The emoji tokenizer with SDXL's second padding, the token '!'."""
  folder = tmp_path_factory.mktemp('tokenizers') / 'tokenizer_2'
  shutil.copytree(EMOJI / 'architecture' / 'tokenizer', folder)
  path = folder / 'tokenizer_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'pad_token': '!'}))
  (folder / 'special_tokens_map.json').unlink()
  return folder


def _create(folder, *, configs, **options):
  pipeline.create(
    folder,
    **configs,
    params={name: _random_params(name, c) for name, c in configs.items()},
    **options,
  )
  return folder


@pytest.fixture(scope='session')
def tiny_xl_folder(tmp_path_factory, tokenizer_2_folder) -> pathlib.Path:
  """A complete SDXL folder with tiny random networks."""
  return _create(
    tmp_path_factory.mktemp('pipelines') / 'tiny_xl',
    configs={
      'unet': UNET_XL,
      'vae': VAE,
      'text_encoder': TEXT,
      'text_encoder_2': TEXT_2,
    },
    class_name='StableDiffusionXLPipeline',
    scheduler=SCHEDULER_XL,
    tokenizer_dir=EMOJI / 'architecture' / 'tokenizer',
    tokenizer_2_dir=tokenizer_2_folder,
  )


@pytest.fixture(scope='session')
def tiny_refiner_folder(tmp_path_factory, tokenizer_2_folder) -> pathlib.Path:
  """The refiner to `tiny_xl_folder`: one text encoder, five numbers."""
  return _create(
    tmp_path_factory.mktemp('pipelines') / 'tiny_refiner',
    configs={'unet': UNET_REFINER, 'vae': VAE, 'text_encoder_2': TEXT_2},
    class_name='StableDiffusionXLImg2ImgPipeline',
    flags={
      'requires_aesthetics_score': True,
      'force_zeros_for_empty_prompt': False,
    },
    scheduler=SCHEDULER_XL,
    tokenizer_2_dir=tokenizer_2_folder,
  )


@pytest.fixture(scope='session')
def tiny_pixel_folder(tmp_path_factory) -> pathlib.Path:
  """A complete DDPMPipeline folder with a tiny random UNet."""
  return _create(
    tmp_path_factory.mktemp('pipelines') / 'tiny_pixels',
    configs={'unet': UNET_PIXELS},
    class_name='DDPMPipeline',
    scheduler=SCHEDULER_PIXELS,
  )


@pytest.fixture(scope='session')
def bare_folder(tmp_path_factory) -> pathlib.Path:
  """A pipeline's JSON files, of a UNet of one level: enough for a plan."""
  folder = tmp_path_factory.mktemp('bare') / 'model'
  shutil.copytree(EMOJI / 'architecture', folder)
  path = folder / 'unet' / 'config.json'
  config = json.loads(path.read_text())
  config |= {
    'block_out_channels': [64],
    'down_block_types': ['CrossAttnDownBlock2D'],
    'mid_block_type': None,
    'up_block_types': ['UpBlock2D'],
  }
  path.write_text(json.dumps(config))
  return folder


@pytest.fixture(scope='session')
def tiny_pairs(tmp_path_factory) -> pathlib.Path:
  """The first 48 rows of the shipped emoji pairs."""
  path = tmp_path_factory.mktemp('data') / 'pairs.parquet'
  table = pq.read_table(EMOJI / 'pairs.parquet').slice(0, 48)
  pq.write_table(table, path, row_group_size=16)
  return path


@pytest.fixture
def make_labels(tmp_path):
  """Writes a folder of the likes page: malign pictures have a white square."""

  def make(name='labels', *, benign=8, malign=5, seed=0, **line):
    folder, rng = tmp_path / name, np.random.default_rng(seed)
    (folder / 'pictures').mkdir(parents=True)
    lines = []
    for i in range(benign + malign):
      pixels = rng.integers(0, 80, (8, 8, 3), np.uint8)
      if i < malign:
        pixels[2:6, 2:6] = 255
      image = f'pictures/{i:06d}_0.png'
      Image.fromarray(pixels).save(folder / image)
      made = {'caption': f'no {i}', 'image': image, 'liked': i >= malign}
      lines.append(json.dumps(made | line))
    (folder / 'likes.jsonl').write_text('\n'.join(lines) + '\n')
    return folder

  return make


@pytest.fixture
def arguments(tiny_folder, tiny_pairs, tmp_path, monkeypatch):
  """Makes a command line; keyword arguments are overrides, `.` as `__`."""
  monkeypatch.chdir(ROOT)

  def make(
    recipe='configs/quickstart.py', workdir=None, **overrides
  ) -> list[str]:
    values = {
      'model__folder': tiny_folder,
      'data__path': tiny_pairs,
      'data__resolution': 16,
      'data__holdout': 0.4,
      'objective__numbers__beta': 5000.0,
      'objective__reward_beta': 5000.0,
      'optim__lr': 1e-3,
      'optim__warmup_steps': 2,
      'train__num_steps': STEPS,
      'train__batch_size': 8,
      'train__log_every': 1,
      'train__eval_every': 4,
      'train__checkpoint_every': 1,
      'train__keep': 2,
      'eval__num_prompts': 8,
      'eval__num_steps': 2,
      'eval__batch_size': 8,
      'eval__num_draws': 2,
      'eval__judge': '',
      'export__dtype': 'float32',
    } | overrides
    if 'sft' in recipe:
      del values['objective__numbers__beta']
    return [
      'main',
      f'--config={recipe}',
      f'--workdir={workdir or tmp_path / "run"}',
      *(
        f'--config.{key.replace("__", ".")}={value}'
        for key, value in values.items()
        if value is not None
      ),
    ]

  return make


@pytest.fixture
def small_arguments(arguments):
  """As `arguments`, of a classifier: it compiles in a tenth of the time."""

  def make(workdir, **overrides) -> list[str]:
    values = {
      'model__folder': None,
      'data__holdout': 0.0,
      'classifier__widths': '(8, 8)',
      'classifier__palette': '(8,)',
      'train__eval_every': 0,
    }
    return arguments('configs/emoji_judge.py', workdir, **values | overrides)

  return make
