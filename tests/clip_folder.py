"""A tiny CLIP in transformers' layout, with the emoji tokenizer."""

import json
import pathlib
import shutil

import numpy as np

from dpo_jax.weights import safetensors_io

TOKENIZER = (
  pathlib.Path(__file__).parents[1]
  / 'examples'
  / 'emoji'
  / 'architecture'
  / 'tokenizer'
)
CONFIG = {
  'model_type': 'clip',
  'projection_dim': 12,
  'text_config': {
    'vocab_size': 1024,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'max_position_embeddings': 16,
    'hidden_act': 'gelu',
    'bos_token_id': 1022,
    'eos_token_id': 1023,
    'pad_token_id': 1023,
  },
  'vision_config': {
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'image_size': 16,
    'patch_size': 4,
    'hidden_act': 'gelu',
  },
}


def write(folder, *, seed=0, head=False):
  """Writes random weights that matter; returns the folder.

  head: with the five layers of the aesthetic predictor on top.
  """
  import jax

  from dpo_jax.models import clip_pair
  from dpo_jax.weights import clip_files, mapping

  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(CONFIG))
  config = clip_pair.CLIPConfig.from_dict(CONFIG)
  params = clip_pair.CLIP(config).init(jax.random.key(seed))
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda leaf: np.asarray(
      leaf + 0.2 * rng.normal(size=leaf.shape), np.float32
    ),
    params,
  )
  safetensors_io.save(
    folder / 'model.safetensors', mapping.from_flax(params, clip_files.RULES)
  )
  for name in ('vocab.json', 'merges.txt', 'tokenizer_config.json'):
    if (TOKENIZER / name).is_file():
      shutil.copy(TOKENIZER / name, folder / name)
  if head:
    widths, tensors = (12, 1024, 128, 64, 16, 1), {}
    for index, i in enumerate((0, 2, 4, 6, 7)):
      out, into = widths[index + 1], widths[index]
      weight = rng.normal(size=(out, into)) / into**0.5
      tensors[f'layers.{i}.weight'] = weight.astype(np.float32)
      tensors[f'layers.{i}.bias'] = rng.normal(size=out).astype(np.float32)
    safetensors_io.save(folder / 'aesthetic.safetensors', tensors)
  return folder
