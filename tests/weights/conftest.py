import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from dpo_jax.weights import diffusers_maps, pipeline

CONFIGS = dict(
  unet=dict(
    block_out_channels=[16, 16],
    down_block_types=['CrossAttnDownBlock2D', 'DownBlock2D'],
    up_block_types=['UpBlock2D', 'CrossAttnUpBlock2D'],
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=16,
    attention_head_dim=2,
    sample_size=8,
  ),
  vae=dict(
    block_out_channels=[8, 8],
    down_block_types=['DownEncoderBlock2D'] * 2,
    up_block_types=['UpDecoderBlock2D'] * 2,
    norm_num_groups=4,
    sample_size=16,
  ),
  text_encoder=dict(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=8,
    bos_token_id=18,
    eos_token_id=19,
    pad_token_id=19,
  ),
  scheduler=dict(
    _class_name='DDIMScheduler',
    beta_schedule='scaled_linear',
    beta_start=0.00085,
    beta_end=0.012,
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
  ),
)


@pytest.fixture(scope='session')
def configs():
  return CONFIGS


@pytest.fixture(scope='session')
def shapes():
  """The parameters' shapes of the tiny components."""
  return {
    name: component.init_shapes(component.make_config(CONFIGS[name]))
    for name, component in diffusers_maps.COMPONENTS.items()
  }


@pytest.fixture(scope='session')
def params(shapes):
  """Random values that float16 and bfloat16 both hold exactly."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    values = 0.1 * rng.standard_normal(leaf.shape) + (len(leaf.shape) == 1)
    # float16 has fewer bits below 2^-14.
    values = np.where(np.abs(values) < 1e-3, 1e-3, values)
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)

  return jax.tree.map(draw, shapes)


@pytest.fixture(scope='session')
def tokenizer_dir(tmp_path_factory):
  """A CLIP tokenizer of single letters a to h."""
  folder = tmp_path_factory.mktemp('tokenizer')
  letters = [*'abcdefgh', *(f'{letter}</w>' for letter in 'abcdefgh')]
  words = [*letters, '!', '!</w>', '<|startoftext|>', '<|endoftext|>']
  entries = ', '.join(f'"{word}": {i}' for i, word in enumerate(words))
  (folder / 'vocab.json').write_text(f'{{{entries}}}')
  (folder / 'merges.txt').write_text('#version: 0.2\n')
  (folder / 'tokenizer_config.json').write_text(
    '{"tokenizer_class": "CLIPTokenizer", "model_max_length": 8,'
    ' "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",'
    ' "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}'
  )
  return folder


@pytest.fixture(scope='session')
def _made(tmp_path_factory, params, tokenizer_dir):
  out = tmp_path_factory.mktemp('made') / 'tiny'
  pipeline.create(out, **CONFIGS, tokenizer_dir=tokenizer_dir, params=params)
  return out


@pytest.fixture
def folder(_made, tmp_path):
  """A tiny pipeline of the test's own, to be spoilt."""
  return shutil.copytree(_made, tmp_path / 'tiny')
