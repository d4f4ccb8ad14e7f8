import json
import re

import pytest

from dpo_jax.weights import model_index, pipeline


def _edit(path, **changes):
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
  'family, changes, words',
  [
    ('sd', {'_class_name': 'StableDiffusionXLPipeline'}, 'text_encoder_2=None'),
    ('xl', {'_class_name': 'StableDiffusionPipeline'}, 'is not supported'),
    ('xl', {'text_encoder': [None, None]}, 'text_encoder=[None, None]'),
    ('xl', {'tokenizer_2': [None, None]}, 'tokenizer_2=[None, None]'),
    ('xl', {'scheduler': None}, 'scheduler=None'),
    ('xl', {'requires_aesthetics_score': True}, 'requires_aesthetics_score'),
    ('sd', {'force_zeros_for_empty_prompt': True}, 'force_zeros'),
    ('sd', {'controlnet': ['diffusers', 'ControlNetModel']}, 'controlnet=['),
    ('xl', {'force_zeros_for_empty_prompt': 1}, '=1; allowed: true or false'),
    (
      'xl',
      {'text_encoder_2': ['transformers', 'CLIPTextModel']},
      "allowed: ['transformers', 'CLIPTextModelWithProjection']",
    ),
  ],
)
def test_spoilt_indices_are_named(family, changes, words, make_folder):
  path = make_folder(family) / 'model_index.json'
  _edit(path, **changes)
  with pytest.raises(ValueError, match=re.escape(words)) as error:
    pipeline.load(path.parent)
  assert str(error.value).startswith(f'{path}: ')
  assert '\n' not in str(error.value)


def test_an_image_to_image_pipeline_may_have_both_encoders(make_folder):
  folder = make_folder('xl')
  name = 'StableDiffusionXLImg2ImgPipeline'
  _edit(folder / 'model_index.json', _class_name=name)
  loaded = pipeline.load(folder)
  assert loaded.class_name == name
  assert list(loaded.params)[2:] == ['text_encoder', 'text_encoder_2']
  assert len(loaded.tokenizer_folders) == 2


@pytest.mark.parametrize(
  'family, part, changes, words',
  [
    ('sd', 'unet', dict(cross_attention_dim=32), 'dim=32 .*hidden_size=16$'),
    ('xl', 'unet', dict(cross_attention_dim=32), r'=32 .*hidden_size=16 \+ 24'),
    ('refiner', 'unet', dict(cross_attention_dim=40), 'text_encoder_2 .*=24$'),
    ('sd', 'unet', dict(in_channels=9), r'in_channels=9 .*latent_channels=4'),
    ('sd', 'unet', dict(out_channels=8), r'out_channels=8 .*channels=4'),
    (
      'xl',
      'text_encoder_2',
      dict(projection_dim=16),
      r'input_dim=36, should be 40: projection_dim=16 .*6 \*.*dim=4$',
    ),
    (
      'refiner',
      'unet',
      dict(projection_class_embeddings_input_dim=36),
      r'input_dim=36, should be 32: projection_dim=12 .*5 \*.*dim=4$',
    ),
    (
      'xl',
      'unet',
      dict(
        addition_embed_type=None,
        addition_time_embed_dim=None,
        projection_class_embeddings_input_dim=None,
      ),
      "addition_embed_type=None .*needs 'text_time'",
    ),
    (
      'sd',
      'unet',
      dict(
        addition_embed_type='text_time',
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=36,
      ),
      "addition_embed_type='text_time' .*needs None",
    ),
  ],
)
def test_parts_that_do_not_fit(family, part, changes, words, make_folder):
  folder = make_folder(family)
  _edit(folder / part / 'config.json', **changes)
  for path in folder.rglob('*.safetensors'):
    path.unlink()  # All of this is found before weights are looked for.
  with pytest.raises(ValueError, match=words) as error:
    pipeline.load(folder)
  assert str(error.value).startswith(f'{folder}: ')


def test_a_refiner_without_the_score_has_six_numbers(make_folder):
  folder = make_folder('refiner')
  _edit(folder / 'model_index.json', requires_aesthetics_score=False)
  with pytest.raises(ValueError, match=r'should be 36: .* 6 \*'):
    pipeline.load(folder)


@pytest.mark.parametrize('name', ['tokenizer', 'tokenizer_2'])
def test_tokenizers_must_be_there(name, make_folder):
  folder = make_folder('xl')
  (folder / name / 'merges.txt').unlink()
  words = re.escape(f'{folder / name}: no tokenizer: ')
  with pytest.raises(ValueError, match=words):
    pipeline.load(folder)
  # transformers 5 writes this one file.
  (folder / name / 'tokenizer.json').touch()
  pipeline.load(folder)


def test_a_new_index_says_what_the_class_has():
  index = model_index.make(
    'StableDiffusionXLImg2ImgPipeline',
    components=('text_encoder_2', 'vae', 'unet'),
    flags={'requires_aesthetics_score': True},
  )
  assert index.components == ('unet', 'vae', 'text_encoder_2')
  assert index.flags == {
    'force_zeros_for_empty_prompt': True,
    'requires_aesthetics_score': True,
  }
  values = model_index.to_json(
    index,
    scheduler_class='EulerDiscreteScheduler',
    tokenizer_classes={'tokenizer_2': 'CLIPTokenizer'},
  )
  assert values == {
    '_class_name': 'StableDiffusionXLImg2ImgPipeline',
    'feature_extractor': [None, None],
    'force_zeros_for_empty_prompt': True,
    'image_encoder': [None, None],
    'requires_aesthetics_score': True,
    'scheduler': ['diffusers', 'EulerDiscreteScheduler'],
    'text_encoder': [None, None],
    'text_encoder_2': ['transformers', 'CLIPTextModelWithProjection'],
    'tokenizer': [None, None],
    'tokenizer_2': ['transformers', 'CLIPTokenizer'],
    'unet': ['diffusers', 'UNet2DConditionModel'],
    'vae': ['diffusers', 'AutoencoderKL'],
  }
