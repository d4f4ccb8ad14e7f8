import json

import pytest

from dpo_jax.weights import needed

# As stable-diffusion-v1-5 lies on the hub, and some more.
FILES = """
.gitattributes
LICENSE.md
README.md
model_index.json
v1-5-pruned-emaonly.ckpt
v1-5-pruned-emaonly.safetensors
v1-inference.yaml
preview/picture.png
feature_extractor/preprocessor_config.json
safety_checker/config.json
safety_checker/model.fp16.safetensors
safety_checker/model.safetensors
safety_checker/pytorch_model.bin
scheduler/scheduler_config.json
text_encoder/config.json
text_encoder/flax_model.msgpack
text_encoder/model.fp16.safetensors
text_encoder/model.onnx
text_encoder/model.safetensors
text_encoder/pytorch_model.bin
text_encoder/pytorch_model.fp16.bin
tokenizer/merges.txt
tokenizer/special_tokens_map.json
tokenizer/tokenizer_config.json
tokenizer/vocab.json
unet/config.json
unet/diffusion_pytorch_model.bin
unet/diffusion_pytorch_model.fp16.safetensors
unet/diffusion_pytorch_model.non_ema.safetensors
unet/diffusion_pytorch_model.safetensors
unet/sub/config.json
vae/config.json
vae/diffusion_pytorch_model.fp16.safetensors
vae/diffusion_pytorch_model.safetensors
vae_1_0/config.json
vae_1_0/diffusion_pytorch_model.safetensors
vae_decoder/model.onnx
""".split()
SMALL = """
LICENSE.md
README.md
feature_extractor/preprocessor_config.json
model_index.json
safety_checker/config.json
scheduler/scheduler_config.json
text_encoder/config.json
tokenizer/merges.txt
tokenizer/special_tokens_map.json
tokenizer/tokenizer_config.json
tokenizer/vocab.json
unet/config.json
vae/config.json
""".split()
WEIGHTS = [
  'safety_checker/model',
  'text_encoder/model',
  'unet/diffusion_pytorch_model',
  'vae/diffusion_pytorch_model',
]


@pytest.mark.parametrize('variant, dot', [('', ''), ('fp16', '.fp16')])
def test_one_set_of_weights(variant, dot):
  chosen = needed.needed_files(reversed(FILES), variant=variant)
  weights = [f'{stem}{dot}.safetensors' for stem in WEIGHTS]
  assert chosen == sorted([*SMALL, *weights])


def test_only_the_listed_components():
  index = {
    '_class_name': 'StableDiffusionPipeline',
    'requires_safety_checker': False,
    'safety_checker': [None, None],
    'image_encoder': None,
    'unet': ['diffusers', 'UNet2DConditionModel'],
    'vae': ['diffusers', 'AutoencoderKL'],
  }
  components = needed.listed_components(json.dumps(index), 'index')
  assert components == ['unet', 'vae']
  chosen = needed.needed_files(FILES, components=components)
  folders = {name.partition('/')[0] for name in chosen if '/' in name}
  assert folders == {'unet', 'vae'}


@pytest.mark.parametrize('text', ['[]', 'no', '3'])
def test_an_index_that_is_none(text):
  with pytest.raises(ValueError, match=r'^where: not a JSON object'):
    needed.listed_components(text, 'where')


def _weights(files, **options):
  names = ['model_index.json', *(f'unet/{file}' for file in files)]
  chosen = needed.needed_files(names, **options)
  return [name.removeprefix('unet/') for name in chosen[1:]]


STEM = 'diffusion_pytorch_model'


def test_half_precision_where_it_is_all_there_is():
  files = [f'{STEM}.fp16.safetensors', f'{STEM}.bin']
  assert _weights(files) == files[:1]


def test_other_variants_must_be_asked_for():
  files = [f'{STEM}.non_ema.safetensors']
  with pytest.raises(ValueError, match=r"variant=''; allowed: 'non_ema'"):
    _weights(files)
  assert _weights(files, variant='non_ema') == files


def test_a_variant_that_is_not_there():
  with pytest.raises(ValueError, match=r"^unet: .*'bf16'; allowed: ''$"):
    _weights([f'{STEM}.safetensors'], variant='bf16')


def test_the_variant_of_what_is_not_used_may_be_missing():
  names = [name for name in FILES if name != f'{WEIGHTS[0]}.fp16.safetensors']
  chosen = needed.needed_files(names, variant='fp16')
  assert f'{WEIGHTS[0]}.safetensors' in chosen


@pytest.mark.parametrize(
  'index, shard, variant',
  [
    ('{}.safetensors.index.json', '{}-{:05}-of-00002.safetensors', ''),
    (
      '{}.safetensors.index.fp16.json',
      '{}.fp16-{:05}-of-00002.safetensors',
      'fp16',
    ),
    (
      '{}.safetensors.fp16.index.json',
      '{}-{:05}-of-00002.fp16.safetensors',
      'fp16',
    ),
  ],
)
def test_shards(index, shard, variant):
  shards = [shard.format(STEM, i) for i in (1, 2)]
  files = [index.format(STEM), *shards]
  other = ['config.json', f'{STEM}.other.safetensors', f'{STEM}.bin']
  chosen = _weights([*files, *other], variant=variant)
  assert chosen == sorted([*files, 'config.json'])
  with pytest.raises(ValueError, match=r'1 of 2 shards .* is number 1$'):
    _weights([files[0], files[2]], variant=variant)
  # One file is enough, and two sets would be one too many.
  dot = f'.{variant}' if variant else ''
  whole = f'{STEM}{dot}.safetensors'
  assert _weights([*files, whole], variant=variant) == [whole]


def test_an_index_without_shards():
  with pytest.raises(ValueError, match=r'1 of 1 shards'):
    _weights([f'{STEM}.safetensors.index.json'])


def test_pickles_are_refused():
  with pytest.raises(ValueError, match=r'^unet: .*\.bin is refused: .*pickle'):
    _weights(['config.json', f'{STEM}.bin'])
  names = ['model_index.json', 'safety_checker/pytorch_model.bin']
  with pytest.raises(ValueError, match=r'"safety_checker": \[null, null\]'):
    needed.needed_files(names)


def test_a_model_without_weights():
  with pytest.raises(ValueError, match=r'^unet: no weights among config.json'):
    _weights(['config.json'])


def test_no_pipeline():
  with pytest.raises(ValueError, match=r'no model_index.json among 1 files'):
    needed.needed_files(['unet/config.json'])


def test_diffusers_opens_what_was_chosen_and_nothing_less(folder, tmp_path):
  pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  transformers = pytest.importorskip('transformers')
  from diffusers.pipelines.stable_diffusion import safety_checker

  small = dict(
    hidden_size=8,
    intermediate_size=8,
    num_attention_heads=1,
    num_hidden_layers=1,
  )
  config = transformers.CLIPConfig(
    vision_config=dict(image_size=8, patch_size=4, **small),
    text_config=small,
    projection_dim=4,
  )
  whole = diffusers.StableDiffusionPipeline.from_pretrained(
    folder,
    safety_checker=safety_checker.StableDiffusionSafetyChecker(config),
    feature_extractor=transformers.CLIPImageProcessor(size=8, crop_size=8),
  )
  for variant in (None, 'fp16'):
    whole.save_pretrained(tmp_path / 'whole', variant=variant)
  paths = [p for p in (tmp_path / 'whole').rglob('*') if p.is_file()]
  names = [path.relative_to(tmp_path / 'whole').as_posix() for path in paths]
  index = (tmp_path / 'whole' / 'model_index.json').read_bytes()
  components = needed.listed_components(index, 'index')
  chosen = needed.needed_files(names, components=components)
  assert not [name for name in chosen if 'fp16' in name]
  for name in chosen:
    target = tmp_path / 'part' / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((tmp_path / 'whole' / name).read_bytes())

  def load():
    return diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / 'part')

  assert load().safety_checker is not None
  # This is why a safety checker's weights are fetched.
  (tmp_path / 'part' / 'safety_checker' / 'model.safetensors').unlink()
  with pytest.raises(OSError, match=r'model\.safetensors'):
    load()
