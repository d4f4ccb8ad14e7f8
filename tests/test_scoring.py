"""Judges from folders of weights, against transformers and PyTorch."""

import dataclasses

import clip_folder
import jax
import numpy as np
import pytest

from dpo_jax import scoring, sharding
from dpo_jax.data import clip_texts
from dpo_jax.evaluate import scorers
from dpo_jax.models import classifier
from dpo_jax.weights import classifiers, safetensors_io

CAPTIONS = ['grinning face', 'a red  apple &amp; a pear', 'flag', '', 'dog']
SIZES = [(16, 16), (40, 23), (20, 33), (16, 48), (64, 64)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  made = clip_folder.write(tmp_path_factory.mktemp('clip') / 'c', head=True)
  # transformers' file of preprocessing, so that the middles are the same.
  (made / 'preprocessor_config.json').write_text('{"size": 16}')
  return made


@pytest.fixture(scope='module')
def pictures():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def mesh(devices=1):
  return sharding.make_mesh(devices=jax.devices()[:devices])


def their_embeds(folder, pictures, captions, clean):
  """(texts, pictures) of length 1, by transformers' own processor and model."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.models.clip import image_processing_pil_clip

  model = transformers.CLIPModel.from_pretrained(folder).eval()
  size = model.config.vision_config.image_size
  processor = image_processing_pil_clip.CLIPImageProcessorPil(
    size={'shortest_edge': size}, crop_size={'height': size, 'width': size}
  )
  pixels = processor(pictures, return_tensors='pt')['pixel_values']
  tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
  if clean:
    captions = [clip_texts.clean(caption) for caption in captions]
  ids = tokenizer(
    captions,
    padding='max_length',
    truncation=True,
    max_length=16,
    return_tensors='pt',
  )['input_ids']
  with torch.no_grad():
    out = model(input_ids=ids, pixel_values=pixels)
  return (
    out.text_embeds.numpy(),
    out.image_embeds.numpy(),
    float(model.logit_scale.detach().exp()),
  )


@pytest.mark.parametrize('name', ['pickscore', 'hpsv2', 'hpsv21', 'clip'])
def test_scores_are_transformers(folder, pictures, name):
  scorer = scoring.open_scorer(name, str(folder), mesh=mesh(), batch_size=2)
  found = scorer.score(pictures, CAPTIONS)
  texts, images, scale = their_embeds(
    folder, pictures, CAPTIONS, clean=name != 'pickscore'
  )
  cos = (texts * images).sum(-1)
  factor = {'pickscore': scale, 'clip': 100.0}.get(name, 1.0)
  assert cos.std() > 0.05
  np.testing.assert_allclose(found, factor * cos, atol=1e-4 * factor, rtol=1e-4)


def test_aesthetic_is_its_five_layers(folder, pictures):
  torch = pytest.importorskip('torch')
  scorer = scoring.open_scorer('aesthetic', str(folder), mesh=mesh())
  found = scorer.score(pictures, [''] * 5)
  x = their_embeds(folder, pictures, CAPTIONS, clean=False)[1]
  tensors = safetensors_io.load(folder / 'aesthetic.safetensors')
  x = torch.tensor(x)
  for i in (0, 2, 4, 6, 7):
    x = torch.nn.functional.linear(
      x,
      torch.tensor(tensors[f'layers.{i}.weight']),
      torch.tensor(tensors[f'layers.{i}.bias']),
    )
  np.testing.assert_allclose(found, x[:, 0].numpy(), atol=1e-4, rtol=1e-4)


def test_any_mesh_and_batch_score_the_same(folder, pictures):
  one = scoring.open_scorer('pickscore', str(folder), mesh=mesh(), batch_size=3)
  many = scoring.open_scorer(
    'pickscore', str(folder), mesh=mesh(8), batch_size=8
  )
  # A score is a logit scale of 14 times a cosine, which may be near 0.
  np.testing.assert_allclose(
    many.score(pictures, CAPTIONS), one.score(pictures, CAPTIONS), atol=1e-5
  )
  assert len(one.score([], [])) == 0


def test_pairs_share_their_caption(folder, pictures):
  scorer = scoring.open_scorer('clip', str(folder), mesh=mesh(), batch_size=2)
  questions = [(text, [pictures[0], pictures[1]]) for text in CAPTIONS[:3]]
  found = np.concatenate(list(scorer.batches(questions)))
  assert found.shape == (3, 2)
  for side in range(2):
    alone = scorer.score([pictures[side]] * 3, CAPTIONS[:3])
    np.testing.assert_allclose(found[:, side], alone, rtol=1e-5)


EMOJI_JUDGE = 'examples/emoji/judge'


def test_a_classifier_gives_log_odds_of_its_class(pictures):
  # The oracle is the logits of its own module.
  config, params = classifiers.load(EMOJI_JUDGE)
  small = [picture for picture in pictures if picture.shape == (64, 64, 3)]
  big = np.repeat(np.repeat(small[0][:32, :32], 2, 0), 2, 1)
  model = classifier.ImageClassifier(config)
  for wanted in ('twemoji', 'noto'):
    judge = scoring.open_scorer(
      'classifier', f'{EMOJI_JUDGE}:{wanted}', mesh=mesh()
    )
    found = judge.score([small[0][:32, :32], big], ['', ''])
    logits = model.apply(
      {'params': params}, np.float32(small[0][None, :32, :32]) / 127.5 - 1
    )[0]
    index = config.classes.index(wanted)
    np.testing.assert_allclose(
      found[0], logits[index] - logits[1 - index], rtol=1e-5
    )
    # A picture of another size is scaled: nearly the same, not quite.
    assert found[1] != found[0]
  assert judge.source['name'] == f'{EMOJI_JUDGE}:noto'
  for place, words in (
    (EMOJI_JUDGE, 'give FOLDER:CLASS'),
    (f'{EMOJI_JUDGE}:apple', 'knows noto, twemoji'),
  ):
    with pytest.raises(ValueError, match=words):
      scoring.open_scorer('classifier', place, mesh=mesh())


def test_equal_pictures_tie(folder, pictures):
  """Whatever rounding makes of their places in the batch."""
  scorer = scoring.open_scorer('clip', str(folder), mesh=mesh(), batch_size=2)
  compute = scorer.compute
  uneven = dataclasses.replace(
    scorer,
    compute=lambda params, pixels, ids: (
      compute(params, pixels, ids) + 1e-3 * np.arange(4)
    ),
  )
  a, b = pictures[:2]
  questions = [('dog', [a, b, a.copy(), b]), ('', [b, a, a, b])] * 2
  found = np.concatenate(list(uneven.batches(questions)))
  assert (found[:, 0] == found[:, [2, 3]].T).tolist() == [
    [True, False] * 2,
    [False, True] * 2,
  ]
  np.testing.assert_array_equal(found[::2, 1], found[::2, 3])
  np.testing.assert_array_equal(found[1::2, 1], found[1::2, 2])
  assert (found[:, 0] != found[:, 1]).all()


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('pickscore', 'NAME=FOLDER'),
    ('pickscore=', 'NAME=FOLDER'),
    ('pikscore=a', 'names are pickscore'),
    ('clip=a,clip=b', 'once each'),
  ],
)
def test_words_that_name_no_scorer(text, words):
  with pytest.raises(ValueError, match=words):
    scoring.parse(text)


def test_scorers_are_parsed():
  assert scoring.parse('clip=a, hpsv21=b/c') == {'clip': 'a', 'hpsv21': 'b/c'}


def test_what_is_missing_is_named(folder, tmp_path):
  bare = clip_folder.write(tmp_path / 'bare')
  with pytest.raises(ValueError, match=r'aesthetic\.safetensors: no such file'):
    scoring.open_scorer('aesthetic', str(bare), mesh=mesh())
  (bare / 'merges.txt').unlink()
  with pytest.raises(ValueError, match=r'clip: .*merges\.txt missing'):
    scoring.open_scorer('clip', str(bare), mesh=mesh())
  scoring.open_scorer('clip', str(bare), mesh=mesh(), tokenizer=str(folder))
  with pytest.raises(ValueError, match='must be a multiple of 8'):
    scoring.open_scorer('clip', str(folder), mesh=mesh(8), batch_size=4)
  scorer = scoring.open_scorer('clip', str(folder), mesh=mesh())
  with pytest.raises(ValueError, match='1 pictures and 0 captions'):
    scorer.score([np.zeros((4, 4, 3), np.uint8)], [])
  assert scorers.NAMES


def test_captions_are_cleaned_as_open_clip_does():
  # What open_clip.tokenizer's basic_clean and whitespace_clean give.
  assert clip_texts.clean('  a &amp;amp; b\n c ') == 'a & b c'
  assert clip_texts.clean('schÃ¶n') == 'schön'
