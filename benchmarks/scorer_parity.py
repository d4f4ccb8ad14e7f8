"""Our CLIP judges beside the programs they come from: greatest differences.

  python -m benchmarks.scorer_parity

The peers are open_clip_torch 3.3 and hpsv2 1.2.0, which need torchvision. They
are no requirement of the tests: install them (`pip install --no-deps`) in a
folder of their own on PYTHONPATH, with ftfy, timm and clint. hpsv2's wheel
lacks bpe_simple_vocab_16e6.txt.gz; copy open_clip's to hpsv2/src/open_clip.
The weights are random, tiny and the same in all programs; values that the
tests keep (tests/test_scorer_parity.py) are printed at the end.
"""

import functools
import gzip
import importlib.util
import json
import pathlib
import shutil
import tempfile

import jax
import numpy as np
from PIL import Image

from dpo_jax import scoring, sharding
from dpo_jax.data import clip_texts
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.evaluate import clip_pixels
from dpo_jax.models import clip_pair
from dpo_jax.weights import clip_files, safetensors_io

TOKENIZER = pathlib.Path('examples/emoji/architecture/tokenizer')
MODEL = {
  'embed_dim': 12,
  'vision_cfg': {
    'image_size': 16,
    'layers': 2,
    'width': 16,
    'head_width': 8,
    'patch_size': 4,
  },
  'text_cfg': {
    'context_length': 16,
    'vocab_size': 1024,
    'width': 16,
    'heads': 2,
    'layers': 2,
  },
}
SHAPES = [(16, 16), (40, 23), (20, 33), (16, 48), (64, 64), (17, 91), (9, 5)]
CAPTIONS = [
  'grinning face',
  '  a RED  apple &amp;amp; a pear\n',
  'flag of Ångström',
  '',
  "it's the cat's 1234 eyes!!! they're ... open_clip",
  'schÃ¶n, na\u00efve cafe\u0301 \u2014 \u201cquoted\u201d',
  'ΟΔΥΣΣΕΥΣ and \u0130stanbul',
]
# Beside those above; for the whole vocabulary only.
DIFFICULT = [
  'x' * 300,
  'word ' * 120,
  '<|endoftext|> a <|startoftext|>',
  'emoji \U0001f600\U0001f1eb\U0001f1f7 \u2764\ufe0f',
  '東京の夜 한국어 हिन्दी',
  'tabs\tand\u00a0spaces\u3000of all\u2003kinds',
  'zero\u200bwidth \u00ad soft\u2028line',
  "'S 'T 'RE don'T \u2019s",
  '\ufb01ne \uff26\uff55\uff4c\uff4c \u2460 \u00bd x\u00b2',
  '3.14% of $5 #tag @me http://a.b/c?d=e&f=g',
  'a\x00b\x1fc\x7f',
  '&lt;b&gt; &eacute; e&#x301;',
  '_under_ ~!@#$%^&*()',
  'K \u212a \u017fs \u1e9e',
]


def layer_shapes(prefix: str, layers: int, width: int) -> dict[str, tuple]:
  """Tensors of a stack of OpenCLIP's blocks."""
  shapes = {}
  for i in range(layers):
    block = f'{prefix}transformer.resblocks.{i}'
    for name, out, into in (
      ('attn.in_proj_', 3 * width, width),
      ('attn.out_proj.', width, width),
      ('mlp.c_fc.', 4 * width, width),
      ('mlp.c_proj.', width, 4 * width),
    ):
      shapes[f'{block}.{name}weight'] = (out, into)
      shapes[f'{block}.{name}bias'] = (out,)
    for name in ('ln_1', 'ln_2'):
      shapes[f'{block}.{name}.weight'] = (width,)
      shapes[f'{block}.{name}.bias'] = (width,)
  return shapes


def make_tensors(seed: int = 0) -> dict[str, np.ndarray]:
  """Random tensors of MODEL, by OpenCLIP's names, in the order of the names."""
  vision, text = MODEL['vision_cfg'], MODEL['text_cfg']
  embed, patch = MODEL['embed_dim'], vision['patch_size']
  wide, width = vision['width'], text['width']
  shapes = {
    'positional_embedding': (text['context_length'], width),
    'text_projection': (width, embed),
    'token_embedding.weight': (text['vocab_size'], width),
    'visual.class_embedding': (wide,),
    'visual.conv1.weight': (wide, 3, patch, patch),
    'visual.positional_embedding': (
      (vision['image_size'] // patch) ** 2 + 1,
      wide,
    ),
    'visual.proj': (wide, embed),
    'logit_scale': (),
    **layer_shapes('', text['layers'], width),
    **layer_shapes('visual.', vision['layers'], wide),
  }
  for name, size in (
    ('ln_final', width),
    ('visual.ln_pre', wide),
    ('visual.ln_post', wide),
  ):
    shapes[f'{name}.weight'] = shapes[f'{name}.bias'] = (size,)
  rng = np.random.default_rng(seed)
  return {
    name: np.asarray(0.4 * rng.normal(size=shapes[name]), np.float32)
    for name in sorted(shapes)
  }


def make_pictures(seed: int = 0) -> list[np.ndarray]:
  """Noise that begins with a white half, uint8 of SHAPES."""
  rng = np.random.default_rng(seed)
  pictures = []
  for shape in SHAPES:
    picture = rng.integers(0, 256, (*shape, 3), np.uint8)
    picture[: shape[0] // 2] = 255
    pictures.append(picture)
  return pictures


def write_folder(folder: pathlib.Path) -> pathlib.Path:
  """MODEL as a folder that our judges open, with the emoji tokenizer."""
  folder.mkdir(parents=True, exist_ok=True)
  safetensors_io.save(folder / 'open_clip_model.safetensors', make_tensors())
  (folder / clip_files.OPEN_CLIP_CONFIG).write_text(
    json.dumps({'model_cfg': MODEL})
  )
  for name in ('vocab.json', 'merges.txt', 'tokenizer_config.json'):
    shutil.copy(TOKENIZER / name, folder / name)
  return folder


def declare_torchvision_ops() -> None:
  """Lets torchvision be imported where its compiled part does not load.

  There is no build of it for every CPU build of torch. Only its transforms are
  used, which are Python; at import it wants the names of its operators.
  """
  import torch

  root = pathlib.Path(importlib.util.find_spec('torchvision').origin).parent
  try:
    for path in root.glob('_C*.so'):
      torch.ops.load_library(path)
      return
  except OSError:
    pass
  names = 'nms qnms roi_align qroi_align roi_pool ps_roi_align ps_roi_pool'
  names += ' deform_conv2d _roi_align_backward _roi_pool_backward'
  names += ' _ps_roi_align_backward _ps_roi_pool_backward'
  names += ' _deform_conv2d_backward'
  library = torch.library.Library('torchvision', 'FRAGMENT')
  for name in names.split():
    library.define(f'{name}() -> ()')
  # Else the names go with the object.
  declare_torchvision_ops.kept = library


def gap(found, wanted) -> float:
  """The greatest absolute difference; shapes must agree."""
  found, wanted = np.asarray(found), np.asarray(wanted)
  if found.shape != wanted.shape:
    raise ValueError(f'shapes {found.shape} and {wanted.shape}')
  return float(np.abs(found.astype(np.float64) - wanted).max())


def compare_pixels() -> dict[str, float]:
  """Preprocessing for towers of 16 and 224 pixels."""
  import open_clip
  from hpsv2.src.open_clip import transform as hps_transform

  found = {}
  for size in (16, 224):
    for name, theirs, ours in (
      (
        'open_clip',
        open_clip.image_transform(size, is_train=False),
        clip_pixels.Preprocess(size, rounds=True),
      ),
      (
        'hpsv2',
        hps_transform.image_transform(
          size, is_train=False, resize_longest_max=True
        ),
        clip_pixels.FitPreprocess(size),
      ),
    ):
      found[f'pixels, {name}, {size}'] = max(
        gap(
          ours(picture),
          theirs(Image.fromarray(picture)).permute(1, 2, 0).numpy(),
        )
        for picture in make_pictures()
      )
  return found


def open_clip_model():
  """OpenCLIP's own network with the tensors of MODEL."""
  import open_clip
  import torch

  model = open_clip.CLIP(
    MODEL['embed_dim'], MODEL['vision_cfg'], MODEL['text_cfg']
  )
  state = {name: torch.tensor(x) for name, x in make_tensors().items()}
  model.load_state_dict(state)
  return model.eval()


def compare_features(folder: pathlib.Path) -> dict[str, float]:
  """Embeddings of length 1 and the logit scale, from the same inputs."""
  import torch

  config, params = clip_files.load(folder)
  ours, theirs = clip_pair.CLIP(config), open_clip_model()
  rng = np.random.default_rng(1)
  pixels = rng.normal(size=(4, 16, 16, 3)).astype(np.float32)
  ids = rng.integers(1, 1022, (5, 16)).astype(np.int32)
  for row, end in enumerate((15, 9, 2, 1, 12)):
    ids[row, 0], ids[row, end], ids[row, end + 1 :] = 1022, 1023, 0
  with torch.no_grad():
    images = theirs.encode_image(
      torch.tensor(pixels).permute(0, 3, 1, 2), normalize=True
    )
    texts = theirs.encode_text(torch.tensor(ids).long(), normalize=True)
  return {
    'image features': gap(ours.embed_images(params, pixels), images),
    'text features': gap(ours.embed_texts(params, ids), texts),
    'logit scale': gap(params['logit_scale'], theirs.logit_scale.detach()),
  }


def write_vocabulary(folder: pathlib.Path) -> None:
  """OpenCLIP's whole vocabulary as transformers' two files."""
  from open_clip import tokenizer as theirs

  own = theirs.SimpleTokenizer()
  encoder = {
    {
      '<start_of_text>': '<|startoftext|>',
      '<end_of_text>': '<|endoftext|>',
    }.get(word, word): index
    for word, index in own.encoder.items()
  }
  merges = sorted(own.bpe_ranks, key=own.bpe_ranks.get)
  (folder / 'vocab.json').write_text(json.dumps(encoder), encoding='utf-8')
  (folder / 'merges.txt').write_text(
    '\n'.join(['#version: 0.2', *map(' '.join, merges)]) + '\n',
    encoding='utf-8',
  )


def compare_tokens(folder: pathlib.Path) -> list[str]:
  """The captions whose ids differ up to the end of text."""
  import open_clip

  write_vocabulary(folder)
  ours = tokenizer_lib.load(folder, max_length=77)
  different = []
  for caption in CAPTIONS + DIFFICULT:
    wanted = open_clip.tokenize([caption]).numpy()[0]
    found = ours.encode([clip_texts.clean(caption)])[0][0]
    stop = int(wanted.argmax()) + 1
    if not np.array_equal(found[:stop], wanted[:stop]):
      different.append(f'{caption!r}: {found[:stop]} {wanted[:stop]}')
  return different


def hpsv2_scores(folder: pathlib.Path) -> np.ndarray:
  """hpsv2.img_score.score of every caption with all pictures [n k].

  Its own code from files to numbers; the network and the vocabulary that it
  would fetch are put in its place.
  """
  import torch
  from hpsv2 import img_score
  from hpsv2.src.open_clip import model as hps_model
  from hpsv2.src.open_clip import tokenizer, transform

  packed = folder / 'merges.txt.gz'
  packed.write_bytes(
    gzip.compress((TOKENIZER / 'merges.txt').read_bytes().rstrip(b'\n'))
  )
  tokenizer._tokenizer = tokenizer.SimpleTokenizer(str(packed))
  img_score.get_tokenizer = lambda name: functools.partial(
    tokenizer.tokenize, context_length=16
  )
  img_score.model_dict.update(
    model=hps_model.CLIP(
      MODEL['embed_dim'],
      hps_model.CLIPVisionCfg(**MODEL['vision_cfg']),
      hps_model.CLIPTextCfg(**MODEL['text_cfg']),
      output_dict=True,
    ),
    preprocess_val=transform.image_transform(
      16, is_train=False, resize_longest_max=True
    ),
  )
  state = {name: torch.tensor(x) for name, x in make_tensors().items()}
  torch.save({'state_dict': state}, folder / 'hps.pt')
  pictures = [Image.fromarray(picture) for picture in make_pictures()]
  return np.array(
    [
      img_score.score(pictures, caption, cp=str(folder / 'hps.pt'))
      for caption in CAPTIONS
    ]
  )


def open_clip_scores(folder: pathlib.Path) -> np.ndarray:
  """100 cos [n k] of OpenCLIP's network, preprocessing and tokenizer."""
  import open_clip
  import torch
  from open_clip import tokenizer

  packed = folder / 'merges.txt.gz'
  encode = tokenizer.SimpleTokenizer(str(packed), context_length=16)
  transform = open_clip.image_transform(16, is_train=False)
  pixels = [transform(Image.fromarray(x)) for x in make_pictures()]
  model = open_clip_model()
  with torch.no_grad():
    images = model.encode_image(torch.stack(pixels), normalize=True)
    texts = model.encode_text(encode(CAPTIONS), normalize=True)
  return (100 * texts @ images.T).numpy()


def our_scores(name: str, folder: pathlib.Path) -> np.ndarray:
  """Of every caption with all pictures [n k]."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  scorer = scoring.open_scorer(name, str(folder), mesh=mesh)
  questions = [(caption, make_pictures()) for caption in CAPTIONS]
  return np.concatenate(list(scorer.batches(questions)))


def main() -> None:
  declare_torchvision_ops()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    model = write_folder(folder / 'model')
    gaps = compare_pixels() | compare_features(model)
    hps, clip = hpsv2_scores(folder), open_clip_scores(folder)
    gaps['score, hpsv2'] = gap(our_scores('hpsv2', model), hps)
    gaps['score, clip'] = gap(our_scores('clip', model), clip)
    for what, number in gaps.items():
      print(f'{what:24} {number:.2g}')
    different = compare_tokens(folder)
  count = len(CAPTIONS + DIFFICULT)
  print(f'captions of other tokens: {len(different)} of {count}')
  print('\n'.join(different))
  for what, scores in (('hpsv2', hps), ('clip', clip)):
    print(f'{what}:')
    for row in scores:
      print('  ' + ', '.join(f'{value:.5f}' for value in row))


if __name__ == '__main__':
  main()
