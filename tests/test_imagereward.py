"""ImageReward from a folder, against its own program and transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import imagereward_parity, scorer_parity
from dpo_jax import scoring, sharding
from dpo_jax.data import tokenizer
from dpo_jax.models import blip, blip_text, blip_vision
from dpo_jax.weights import blip_files, mapping, safetensors_io

# Of the captions and pictures of benchmarks.imagereward_parity, printed by it
# with image-reward 1.5, transformers 4.36.2, torchvision 0.28, torch 2.13.
SCORES = [
  [2.01635, 1.82417, 1.95570, 1.83831, 2.09495, 1.96673, 2.12263],
  [2.48384, 2.28737, 2.46094, 2.34388, 2.56442, 2.43188, 2.61646],
  [2.82519, 2.64612, 2.76526, 2.65937, 2.86631, 2.75963, 2.93030],
  [2.48181, 2.30987, 2.47418, 2.34538, 2.58134, 2.45900, 2.68343],
  [2.22609, 2.04265, 2.20989, 2.08901, 2.32360, 2.19629, 2.39036],
  [2.57488, 2.38644, 2.55414, 2.43112, 2.65468, 2.52356, 2.74402],
  [2.47648, 2.28648, 2.44596, 2.32964, 2.56681, 2.43069, 2.62621],
]
TOKENS = [
  '2 22 23 24 3',
  '2 5 8 9 13 27 37 38 39 3',
  '2 3',
  '2 7 11 20 33 34 21 19 45 3 1 1 1 12 15 3',
  '2 42 43 44 1 1 28 36 33 34 14 1 3',
  '2 5 8 11 40 7 38 39 41 7 12 5 8 11 40 7 38 39 41 7 12'
  ' 5 8 11 40 7 38 39 41 7 12 5 8 11 3',
  '2 1 17 1 1 8 1 16 7 12 14 3',
]
IDS = np.array([[2, 7, 8, 9, 3, 0, 0], [2, 0, 5, 0, 7, 11, 3]], np.int32)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return imagereward_parity.write_folder(tmp_path_factory.mktemp('reward'))


@pytest.fixture(scope='module')
def loaded(folder):
  return blip_files.load(folder)


def mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_scores_are_what_the_original_printed(folder):
  scorer = scoring.open_scorer(
    'imagereward', str(folder), mesh=mesh(), batch_size=4
  )
  pictures = scorer_parity.make_pictures()
  questions = [(text, pictures) for text in imagereward_parity.CAPTIONS]
  found = np.concatenate(list(scorer.batches(questions)))
  np.testing.assert_allclose(found, SCORES, atol=2e-5)


def test_tokens_are_what_the_original_printed(folder):
  words = tokenizer.load_bert(folder)
  found, cut = words.encode(imagereward_parity.CAPTIONS)
  assert found.shape == (len(TOKENS), 35) and cut == 1
  for row, text in zip(found, TOKENS, strict=True):
    wanted = [int(number) for number in text.split()]
    if '[PAD]' in imagereward_parity.CAPTIONS[TOKENS.index(text)]:
      # What was printed leaves the id 0 out, and the caption spells it.
      wanted.insert(-3, 0)
    assert row[: len(wanted)].tolist() == wanted
    assert not row[len(wanted) :].any()
  assert words.encode([])[0].shape == (0, 35)
  assert words.encode(['\ud800'])[0].shape == (1, 35)


def test_padding_is_what_stands_behind_the_last_token():
  found = blip_text.real_tokens(jnp.asarray(IDS), 0)
  assert found.tolist() == [[True] * 5 + [False] * 2, [True] * 7]


def test_image_encoder_is_transformers(loaded):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config, params = loaded
  vision = config.vision
  theirs = transformers.BlipVisionModel(
    transformers.BlipVisionConfig(
      hidden_size=vision.hidden_size,
      intermediate_size=vision.intermediate_size,
      num_hidden_layers=vision.num_hidden_layers,
      num_attention_heads=vision.num_attention_heads,
      image_size=vision.image_size,
      patch_size=vision.patch_size,
      layer_norm_eps=1e-6,
      hidden_act='gelu',
    )
  ).eval()
  renames = (
    ('cls_token', 'embeddings.class_embedding'),
    ('pos_embed', 'embeddings.position_embedding'),
    ('patch_embed.proj', 'embeddings.patch_embedding'),
    ('blocks.', 'encoder.layers.'),
    ('.attn.proj.', '.self_attn.projection.'),
    ('.attn.', '.self_attn.'),
    ('.norm1.', '.layer_norm1.'),
    ('.norm2.', '.layer_norm2.'),
  )
  state = {}
  tree = {'blip': {'visual_encoder': params['blip']['visual_encoder']}}
  for name, value in mapping.from_flax(tree, blip_files.RULES).items():
    name = name.removeprefix('blip.visual_encoder.')
    for old, new in renames:
      name = name.replace(old, new)
    if name.startswith('norm.'):
      name = f'post_layernorm.{name.removeprefix("norm.")}'
    state[name] = torch.tensor(value)
  theirs.load_state_dict(state)
  pixels = noise(3, 32, 32, 3)
  with torch.no_grad():
    wanted = theirs(torch.tensor(pixels).permute(0, 3, 1, 2)).last_hidden_state
  found = jax.jit(blip_vision.VisionTransformer(vision).apply)(
    {'params': tree['blip']['visual_encoder']}, pixels
  )
  np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
  with pytest.raises(ValueError, match='16 x 32 pixels for an encoder of'):
    jax.eval_shape(
      blip_vision.VisionTransformer(vision).init,
      jax.random.key(0),
      pixels[:, :16],
    )


def test_text_encoder_is_transformers(loaded):
  torch = pytest.importorskip('torch')
  module = pytest.importorskip('transformers.models.blip.modeling_blip_text')
  import transformers

  config, params = loaded
  text = config.text
  theirs = module.BlipTextModel(
    transformers.BlipTextConfig(
      vocab_size=text.vocab_size,
      hidden_size=text.hidden_size,
      encoder_hidden_size=config.vision.hidden_size,
      intermediate_size=text.intermediate_size,
      num_hidden_layers=text.num_hidden_layers,
      num_attention_heads=text.num_attention_heads,
      max_position_embeddings=text.max_position_embeddings,
      layer_norm_eps=1e-12,
      hidden_act='gelu',
      is_decoder=True,
    ),
    add_pooling_layer=False,
  ).eval()
  tree = {'blip': {'text_encoder': params['blip']['text_encoder']}}
  state = {
    name.removeprefix('blip.text_encoder.'): torch.tensor(value)
    for name, value in mapping.from_flax(tree, blip_files.RULES).items()
  }
  left = theirs.load_state_dict(state, strict=False)
  assert not left.unexpected_keys
  assert set(left.missing_keys) <= {'embeddings.position_ids'}
  images, mask = noise(2, 9, 128), np.arange(7) < [[5], [7]]
  with torch.no_grad():
    wanted = theirs(
      input_ids=torch.tensor(IDS).long(),
      attention_mask=torch.tensor(mask).long(),
      encoder_hidden_states=torch.tensor(images),
      is_decoder=False,
    ).last_hidden_state.numpy()
  found = jax.jit(blip_text.TextEncoder(text).apply)(
    {'params': tree['blip']['text_encoder']}, IDS, images
  )
  np.testing.assert_allclose(found[mask], wanted[mask], atol=1e-4)
  with pytest.raises(ValueError, match='41 tokens for a text encoder'):
    jax.eval_shape(
      blip_text.TextEncoder(text).init,
      jax.random.key(0),
      np.zeros((1, 41), np.int32),
      images[:1],
    )


def test_head_is_five_layers(loaded):
  torch = pytest.importorskip('torch')
  config, params = loaded
  pixels, ids = noise(2, 32, 32, 3), IDS
  states = jax.jit(blip.BLIP(config).apply)(
    {'params': params['blip']}, pixels, ids
  )
  tensors = mapping.from_flax({'mlp': params['mlp']}, blip_files.RULES)
  x = torch.tensor(np.asarray(states[:, 0]))
  for i in (0, 2, 4, 6, 7):
    x = torch.nn.functional.linear(
      x,
      torch.tensor(tensors[f'mlp.layers.{i}.weight']),
      torch.tensor(tensors[f'mlp.layers.{i}.bias']),
    )
  wanted = (x[:, 0].numpy() - 0.16717362830052426) / 1.0333394966054072
  found = jax.jit(blip.ImageReward(config).apply)(
    {'params': params}, pixels, ids
  )
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def released_shapes():
  """The state of ImageReward-v1.0's module, less what ours does not read."""
  d, wide, found = 768, 1024, {}

  def dense(name, out, into):
    found[f'{name}.weight'], found[f'{name}.bias'] = (out, into), (out,)

  def norm(name, width):
    found[f'{name}.weight'] = found[f'{name}.bias'] = (width,)

  image, text = 'blip.visual_encoder', 'blip.text_encoder'
  found[f'{image}.cls_token'] = (1, 1, wide)
  found[f'{image}.pos_embed'] = (1, 197, wide)
  found[f'{image}.patch_embed.proj.weight'] = (wide, 3, 16, 16)
  found[f'{image}.patch_embed.proj.bias'] = (wide,)
  for i in range(24):
    block = f'{image}.blocks.{i}'
    norm(f'{block}.norm1', wide)
    norm(f'{block}.norm2', wide)
    dense(f'{block}.attn.qkv', 3 * wide, wide)
    dense(f'{block}.attn.proj', wide, wide)
    dense(f'{block}.mlp.fc1', 4 * wide, wide)
    dense(f'{block}.mlp.fc2', wide, 4 * wide)
  norm(f'{image}.norm', wide)
  found[f'{text}.embeddings.word_embeddings.weight'] = (30524, d)
  found[f'{text}.embeddings.position_embeddings.weight'] = (512, d)
  norm(f'{text}.embeddings.LayerNorm', d)
  for i in range(12):
    layer = f'{text}.encoder.layer.{i}'
    for name, into in (('attention', d), ('crossattention', wide)):
      dense(f'{layer}.{name}.self.query', d, d)
      dense(f'{layer}.{name}.self.key', d, into)
      dense(f'{layer}.{name}.self.value', d, into)
      dense(f'{layer}.{name}.output.dense', d, d)
      norm(f'{layer}.{name}.output.LayerNorm', d)
    dense(f'{layer}.intermediate.dense', 4 * d, d)
    dense(f'{layer}.output.dense', d, 4 * d)
    norm(f'{layer}.output.LayerNorm', d)
  for i, (into, out) in {
    0: (d, 1024),
    2: (1024, 128),
    4: (128, 64),
    6: (64, 16),
    7: (16, 1),
  }.items():
    dense(f'mlp.layers.{i}', out, into)
  return found


def test_tensors_of_the_release():
  shapes = blip_files.shapes(imagereward_parity.make_config(full=True))
  assert mapping.file_shapes(shapes, blip_files.RULES) == released_shapes()


def test_what_is_read_and_what_is_not(tmp_path):
  imagereward_parity.write_folder(tmp_path)
  path = tmp_path / 'model.safetensors'
  tensors = safetensors_io.load(path)
  unread = {
    'blip.text_encoder.embeddings.position_ids': np.arange(40)[None],
    'blip.vision_proj.weight': noise(256, 128),
    'blip.vision_proj.bias': noise(256),
    'blip.text_proj.weight': noise(256, 24),
    'blip.text_proj.bias': noise(256),
  }
  safetensors_io.save(path, tensors | unread)
  blip_files.load(tmp_path)
  for change, words in (
    ({'blip.itm_head.weight': noise(2, 24)}, r'1 extra: blip\.itm_head'),
    (
      {'mlp.layers.7.weight': noise(2, 16)},
      r'mlp\.layers\.7\.weight is \(2, 16\), should be \(1, 16\)',
    ),
    (
      {'blip.visual_encoder.pos_embed': noise(1, 12, 128)},
      r'pos_embed is \(1, 12, 128\), should be \(1, 10, 128\)',
    ),
  ):
    safetensors_io.save(path, tensors | change)
    with pytest.raises(ValueError, match=words):
      blip_files.load(tmp_path)
  for name, words in (
    ('mlp.layers.6.bias', r'1 missing: mlp\.layers\.6\.bias'),
    ('blip.visual_encoder.pos_embed', 'pos_embed: not ImageReward'),
  ):
    rest = {key: value for key, value in tensors.items() if key != name}
    safetensors_io.save(path, rest)
    with pytest.raises(ValueError, match=words):
      blip_files.load(tmp_path)
  path.rename(tmp_path / 'ImageReward.pt')
  with pytest.raises(ValueError, match=r'no model\.safetensors.*same names'):
    blip_files.load(tmp_path)


def test_files_that_do_not_fit(tmp_path):
  imagereward_parity.write_folder(tmp_path)
  words, config = tmp_path / 'vocab.txt', tmp_path / 'med_config.json'

  def opened():
    scoring.open_scorer('imagereward', str(tmp_path), mesh=mesh())

  words.write_text(words.read_text() + 'more\n')
  with pytest.raises(ValueError, match=r'48 tokens .*vocab_size=47'):
    opened()
  words.write_text('a\nb\n')
  with pytest.raises(ValueError, match=r'vocab\.txt: .*no \[PAD\] in it'):
    opened()
  words.unlink()
  with pytest.raises(ValueError, match=r'vocab\.txt: no such file'):
    opened()
  values = json.loads(config.read_text())
  config.write_text(json.dumps(values | {'add_cross_attention': False}))
  with pytest.raises(ValueError, match=r'med_config\.json: .*cross_attention'):
    opened()
  config.unlink()
  with pytest.raises(ValueError, match=r'med_config\.json: no such file'):
    opened()
