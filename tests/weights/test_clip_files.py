"""CLIP's towers from transformers' and OpenCLIP's files, against PyTorch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import clip_pair
from dpo_jax.weights import clip_files, mapping, safetensors_io

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TEXT = dict(
  vocab_size=60,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=3,
  max_position_embeddings=12,
  eos_token_id=59,
  bos_token_id=58,
  hidden_act='gelu',
)
VISION = dict(
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  image_size=28,
  patch_size=7,
  hidden_act='gelu',
)
IDS = np.array(
  [[58, 3, 9, 59, 59, 59, 59], [58, 8, 2, 7, 40, 21, 59]], np.int32
)
TOLERANCE = 1e-5


def make(seed=0, **changes):
  """transformers' CLIPModel with random weights that matter."""
  torch.manual_seed(seed)
  config = transformers.CLIPConfig(
    text_config=TEXT | changes,
    vision_config=VISION | changes,
    projection_dim=20,
  )
  model = transformers.CLIPModel(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if name != 'logit_scale':
        parameter.add_(0.2 * torch.randn_like(parameter))
  return model


def pictures(n=2):
  rng = np.random.default_rng(0)
  return rng.normal(size=(n, 28, 28, 3)).astype(np.float32)


def theirs(model):
  """(texts, pictures) of length 1, and the logits of all against all."""
  with torch.no_grad():
    out = model(
      input_ids=torch.tensor(IDS.astype(np.int64)),
      pixel_values=torch.tensor(pictures()).permute(0, 3, 1, 2),
    )
  return [
    value.numpy()
    for value in (out.text_embeds, out.image_embeds, out.logits_per_image)
  ]


def ours(config, params):
  model = clip_pair.CLIP(config)
  texts = model.embed_texts(params, jnp.asarray(IDS))
  images = model.embed_images(params, jnp.asarray(pictures()))
  return texts, images, jnp.exp(params['logit_scale']) * images @ texts.T


def assert_same(found, wanted):
  for a, b in zip(found, wanted, strict=True):
    scale = max(1.0, np.abs(b).max())
    np.testing.assert_allclose(a, b, atol=TOLERANCE * scale)


@pytest.mark.parametrize('act', ['gelu', 'quick_gelu'])
def test_a_folder_of_transformers(tmp_path, act):
  model = make(hidden_act=act)
  model.save_pretrained(tmp_path)
  config, params = clip_files.load(tmp_path)
  assert config.vision_config.hidden_act == act
  assert_same(ours(config, params), theirs(model))


def to_open_clip(model):
  """The state by OpenCLIP's names, written down from its module tree."""
  state = {name: value for name, value in model.state_dict().items()}
  found = {
    'visual.class_embedding': state['vision_model.embeddings.class_embedding'],
    'visual.positional_embedding': state[
      'vision_model.embeddings.position_embedding.weight'
    ],
    'visual.conv1.weight': state[
      'vision_model.embeddings.patch_embedding.weight'
    ],
    'visual.proj': state['visual_projection.weight'].T,
    'positional_embedding': state[
      'text_model.embeddings.position_embedding.weight'
    ],
    'token_embedding.weight': state[
      'text_model.embeddings.token_embedding.weight'
    ],
    'text_projection': state['text_projection.weight'].T,
    'logit_scale': state['logit_scale'],
    'attn_mask': torch.zeros(12, 12),
  }
  for kind in ('weight', 'bias'):
    for new, old in (
      ('visual.ln_pre', 'vision_model.pre_layrnorm'),
      ('visual.ln_post', 'vision_model.post_layernorm'),
      ('ln_final', 'text_model.final_layer_norm'),
    ):
      found[f'{new}.{kind}'] = state[f'{old}.{kind}']
    for tower, prefix, count in (
      ('vision_model', 'visual.', VISION['num_hidden_layers']),
      ('text_model', '', TEXT['num_hidden_layers']),
    ):
      for i in range(count):
        new = f'{prefix}transformer.resblocks.{i}'
        old = f'{tower}.encoder.layers.{i}'
        found[f'{new}.attn.in_proj_{kind}'] = torch.cat(
          [state[f'{old}.self_attn.{part}_proj.{kind}'] for part in 'qkv']
        )
        for a, b in (
          ('attn.out_proj', 'self_attn.out_proj'),
          ('ln_1', 'layer_norm1'),
          ('ln_2', 'layer_norm2'),
          ('mlp.c_fc', 'mlp.fc1'),
          ('mlp.c_proj', 'mlp.fc2'),
        ):
          found[f'{new}.{a}.{kind}'] = state[f'{old}.{b}.{kind}']
  return {name: value.contiguous().numpy() for name, value in found.items()}


OPEN_CLIP = {
  'model_cfg': {
    'embed_dim': 20,
    'vision_cfg': {'head_width': 8},
    'text_cfg': {'heads': 3},
  }
}


@pytest.fixture
def open_clip(tmp_path):
  model = make()
  safetensors_io.save(
    tmp_path / 'open_clip_model.safetensors', to_open_clip(model)
  )
  text = json.dumps(OPEN_CLIP)
  (tmp_path / 'open_clip_config.json').write_text(text)
  return model, tmp_path


def test_names_of_open_clip(open_clip):
  model, folder = open_clip
  for path in (folder, folder / 'open_clip_model.safetensors'):
    config, params = clip_files.load(path)
    assert config.text_config.eos_token_id == 59
    assert_same(ours(config, params), theirs(model))


def test_a_file_of_open_clip_says_what_is_wrong(open_clip, tmp_path):
  _, folder = open_clip
  path = folder / 'open_clip_model.safetensors'
  tensors = safetensors_io.load(path)
  safetensors_io.save(path, tensors | {'visual.extra': tensors['visual.proj']})
  with pytest.raises(ValueError, match=r'1 tensors that .*: visual\.extra'):
    clip_files.load(folder)
  safetensors_io.save(
    path, {name: v for name, v in tensors.items() if name != 'visual.proj'}
  )
  with pytest.raises(ValueError, match=r'no visual\.proj: not a CLIP model'):
    clip_files.load(folder)
  safetensors_io.save(path, tensors)
  (folder / 'open_clip_config.json').unlink()
  with pytest.raises(
    ValueError, match=r'widths \(32, 24\) of no known release'
  ):
    clip_files.load(folder)
  path.rename(folder / 'a.bin')
  with pytest.raises(ValueError, match=r'found none; a\.bin: it is a pickle'):
    clip_files.load(folder)
  with pytest.raises(ValueError, match='no such file or folder'):
    clip_files.load(folder / 'x')


@pytest.mark.parametrize(
  ('width', 'vision', 'text'),
  [
    pytest.param(768, (1024, 24, 16), (768, 12, 12), id='ViT-L/14'),
    pytest.param(1024, (1280, 32, 16), (1024, 24, 16), id='ViT-H/14'),
    pytest.param(1280, (1664, 48, 16), (1280, 32, 20), id='ViT-bigG/14'),
  ],
)
def test_tensors_of_the_releases(width, vision, text):
  """Names and shapes are transformers' at full size; nothing is computed."""

  def tower(sizes, feed_forward):
    names = ('hidden_size', 'num_hidden_layers', 'num_attention_heads')
    sizes = dict(zip(names, sizes, strict=True))
    return sizes | {'intermediate_size': feed_forward}

  values = {
    'projection_dim': width,
    'text_config': tower(text, 4 * text[0]),
    # bigG's is 8192, the ratio of its own.
    'vision_config': tower(vision, {1664: 8192}.get(vision[0], 4 * vision[0]))
    | {'patch_size': 14},
  }
  with torch.device('meta'):
    model = transformers.CLIPModel(transformers.CLIPConfig(**values))
  config = clip_pair.CLIPConfig.from_dict(values)
  shapes = jax.eval_shape(clip_pair.CLIP(config).init, jax.random.key(0))
  assert mapping.file_shapes(shapes, clip_files.RULES) == {
    name: tuple(value.shape) for name, value in model.named_parameters()
  }
