"""Eight virtual CPU devices, a compile cache, and a tiny real pipeline."""

import os

# Before jax is imported: tests place work on 1 to 8 of these.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ['JAX_PLATFORMS'] = 'cpu'

import pathlib
import zlib

import jax
import pyarrow.parquet as pq
import pytest
from absl import flags

from dpo_jax.weights import diffusers_maps, pipeline

ROOT = pathlib.Path(__file__).parent.parent
EMOJI = ROOT / 'examples' / 'emoji'
CACHE = ROOT / '.pytest_cache' / 'jax'

jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
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
  pipeline.create(
    folder,
    **configs,
    scheduler=SCHEDULER,
    tokenizer_dir=EMOJI / 'architecture' / 'tokenizer',
    params={name: _random_params(name, c) for name, c in configs.items()},
  )
  return folder


@pytest.fixture(scope='session')
def tiny_pairs(tmp_path_factory) -> pathlib.Path:
  """The first 48 rows of the shipped emoji pairs."""
  path = tmp_path_factory.mktemp('data') / 'pairs.parquet'
  table = pq.read_table(EMOJI / 'pairs.parquet').slice(0, 48)
  pq.write_table(table, path, row_group_size=16)
  return path
