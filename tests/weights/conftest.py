import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from dpo_jax.weights import diffusers_maps, pipeline, safetensors_io

UNET = dict(
  block_out_channels=[16, 16],
  down_block_types=['CrossAttnDownBlock2D', 'DownBlock2D'],
  up_block_types=['UpBlock2D', 'CrossAttnUpBlock2D'],
  layers_per_block=1,
  norm_num_groups=8,
  cross_attention_dim=16,
  attention_head_dim=2,
  sample_size=8,
)
VAE = dict(
  block_out_channels=[8, 8],
  down_block_types=['DownEncoderBlock2D'] * 2,
  up_block_types=['UpDecoderBlock2D'] * 2,
  norm_num_groups=4,
  sample_size=16,
)
TEXT = dict(
  vocab_size=20,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=2,
  max_position_embeddings=8,
  bos_token_id=18,
  eos_token_id=19,
  pad_token_id=19,
)
TEXT_2 = TEXT | dict(hidden_size=24, hidden_act='gelu', projection_dim=12)
# Widths of text states 16 + 24, pooled 12 + 6 numbers of 4 sinusoids.
XL_UNET = UNET | dict(
  cross_attention_dim=40,
  transformer_layers_per_block=[1, 2],
  use_linear_projection=True,
  addition_embed_type='text_time',
  addition_time_embed_dim=4,
  projection_class_embeddings_input_dim=36,
)
SCHEDULER = dict(
  _class_name='DDIMScheduler',
  beta_schedule='scaled_linear',
  beta_start=0.00085,
  beta_end=0.012,
  clip_sample=False,
  set_alpha_to_one=False,
  steps_offset=1,
)
FAMILIES = {
  'sd': dict(unet=UNET, vae=VAE, text_encoder=TEXT),
  'xl': dict(unet=XL_UNET, vae=VAE, text_encoder=TEXT, text_encoder_2=TEXT_2),
  'refiner': dict(
    unet=XL_UNET
    | dict(cross_attention_dim=24, projection_class_embeddings_input_dim=32),
    vae=VAE,
    text_encoder_2=TEXT_2,
  ),
}
CLASSES = {
  'sd': 'StableDiffusionPipeline',
  'xl': 'StableDiffusionXLPipeline',
  'refiner': 'StableDiffusionXLImg2ImgPipeline',
}
FLAGS = {
  'sd': {},
  'xl': dict(force_zeros_for_empty_prompt=True),
  'refiner': dict(
    force_zeros_for_empty_prompt=False, requires_aesthetics_score=True
  ),
}


def make_params(name, config):
  """Random values that float16 and bfloat16 both hold exactly."""
  component = diffusers_maps.COMPONENTS[name]
  rng = np.random.default_rng(0)

  def draw(leaf):
    values = 0.1 * rng.standard_normal(leaf.shape) + (len(leaf.shape) == 1)
    # float16 has fewer bits below 2^-14.
    values = np.where(np.abs(values) < 1e-3, 1e-3, values)
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)

  return jax.tree.map(
    draw, component.init_shapes(component.make_config(config))
  )


@pytest.fixture(scope='session')
def write_shards():
  """Splits the weights of a component's folder into n files and an index.

  `index` and `shard` are patterns of their names.
  """

  def write(
    folder,
    n=2,
    index='{stem}.safetensors.index.json',
    shard='{stem}-{i:05}-of-{n:05}.safetensors',
  ):
    (whole,) = folder.glob('*.safetensors')
    tensors = safetensors_io.load(whole)
    names = sorted(tensors)
    weight_map = {}
    for i in range(n):
      part = names[i::n]
      file = shard.format(stem=whole.stem, i=i + 1, n=n)
      safetensors_io.save(folder / file, {key: tensors[key] for key in part})
      weight_map |= dict.fromkeys(part, file)
    whole.unlink()
    path = folder / index.format(stem=whole.stem)
    path.write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
    return path

  return write


@pytest.fixture(scope='session')
def family_params():
  """Family to component to parameters."""
  return {
    family: {name: make_params(name, values) for name, values in parts.items()}
    for family, parts in FAMILIES.items()
  }


@pytest.fixture(scope='session')
def configs():
  """One config of every component."""
  return {**FAMILIES['xl'], **FAMILIES['sd'], 'scheduler': SCHEDULER}


@pytest.fixture(scope='session')
def shapes(configs):
  """The parameters' shapes of the tiny components."""
  return {
    name: component.init_shapes(component.make_config(configs[name]))
    for name, component in diffusers_maps.COMPONENTS.items()
  }


@pytest.fixture(scope='session')
def params(configs):
  """Parameters of every component."""
  return {
    name: make_params(name, configs[name]) for name in diffusers_maps.COMPONENTS
  }


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
def _made(tmp_path_factory, family_params, tokenizer_dir):
  root = tmp_path_factory.mktemp('made')
  for family, parts in FAMILIES.items():
    tokenizers = {
      'text_encoder': 'tokenizer_dir',
      'text_encoder_2': 'tokenizer_2_dir',
    }
    pipeline.create(
      root / family,
      **parts,
      scheduler=SCHEDULER,
      class_name=CLASSES[family],
      flags=FLAGS[family],
      params=family_params[family],
      **{
        argument: tokenizer_dir
        for name, argument in tokenizers.items()
        if name in parts
      },
    )
  return root


@pytest.fixture
def make_folder(_made, tmp_path):
  """Family to a tiny pipeline of the test's own, to be spoilt."""
  return lambda family: shutil.copytree(_made / family, tmp_path / 'tiny')


@pytest.fixture
def folder(make_folder):
  """A tiny StableDiffusionPipeline of the test's own."""
  return make_folder('sd')
