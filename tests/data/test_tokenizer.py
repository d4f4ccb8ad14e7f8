"""The tokenizer against transformers' own calls, and hostile captions."""

import json
import shutil
import threading

import numpy as np
import pytest
import transformers

from dpo_jax.data import tokenizer as tokenizer_lib


def test_equals_transformers(tokenizer, tokenizer_folder):
  reference = transformers.CLIPTokenizer.from_pretrained(tokenizer_folder)
  captions = ['red apple', 'A Zebra; 12 times', '', 'word ' * 40]
  ids, truncated = tokenizer.encode(captions)
  want = reference(captions, padding='max_length', truncation=True)['input_ids']
  assert ids.dtype == np.int32
  np.testing.assert_array_equal(ids, want)
  assert truncated == 1


def test_exactly_full_is_not_truncated(tokenizer):
  words = tokenizer.encode([' '.join(['apple'] * 14)])
  assert words[0].shape == (1, 16)
  assert words[1] == 0
  assert tokenizer.encode([' '.join(['apple'] * 15)])[1] == 1


@pytest.mark.parametrize(
  'caption', ['cat<|endoftext|>dog', '<|startoftext|>', '<|endoftext|>' * 3]
)
def test_control_tokens_are_text(tokenizer, caption):
  ids = tokenizer.encode([caption])[0][0].tolist()
  start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
  assert ids[0] == start
  first_end = ids.index(end)
  assert first_end > 2
  assert start not in ids[1:]
  assert set(ids[first_end:]) == {end}


@pytest.mark.parametrize(
  'caption',
  [
    '\ud800 lone',
    '\udfff',
    'a\0b',
    '\x1b[31m',
    '\u4e16\u754c',
    '\u202e',
    ' \n',
  ],
)
def test_any_text_encodes(tokenizer, caption):
  ids, _ = tokenizer.encode([caption])
  assert ids.min() >= 0
  assert ids.max() < tokenizer.vocab_size


def test_lone_surrogate_reads_as_a_question_mark(tokenizer):
  ids, _ = tokenizer.encode(['\ud800 cat', '? cat'])
  np.testing.assert_array_equal(ids[0], ids[1])


def test_no_captions(tokenizer):
  ids, truncated = tokenizer.encode([])
  assert ids.shape == (0, 16)
  assert truncated == 0


def test_threads_agree(tokenizer):
  captions = [f'caption number {i}' for i in range(200)]
  want = tokenizer.encode(captions)[0]
  results = []
  threads = [
    threading.Thread(target=lambda: results.append(tokenizer.encode(captions)))
    for _ in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(results) == 4
  for ids, _ in results:
    np.testing.assert_array_equal(ids, want)


def test_length_can_be_given(tokenizer_folder):
  tokenizer = tokenizer_lib.load(tokenizer_folder, max_length=5)
  assert tokenizer.encode(['red apple pie with cream'])[0].shape == (1, 5)


def test_missing_files_are_named(tmp_path, tokenizer_folder):
  with pytest.raises(ValueError, match=r'vocab\.json and merges\.txt missing'):
    tokenizer_lib.load(tmp_path)
  shutil.copy(tokenizer_folder / 'vocab.json', tmp_path)
  with pytest.raises(ValueError, match=r'there, merges\.txt missing'):
    tokenizer_lib.load(tmp_path)


def test_damaged_folder_is_one_line(tmp_path, tokenizer_folder):
  shutil.copytree(tokenizer_folder, tmp_path / 'damaged')
  (tmp_path / 'damaged' / 'vocab.json').write_text('{"a": ')
  with pytest.raises(ValueError, match='not a CLIP tokenizer') as error:
    tokenizer_lib.load(tmp_path / 'damaged')
  assert '\n' not in str(error.value)


def test_folder_without_a_length(tmp_path, tokenizer_folder):
  shutil.copytree(tokenizer_folder, tmp_path / 'endless')
  path = tmp_path / 'endless' / 'tokenizer_config.json'
  config = json.loads(path.read_text())
  del config['model_max_length']
  path.write_text(json.dumps(config))
  with pytest.raises(ValueError, match='model_max_length'):
    tokenizer_lib.load(path.parent)
  assert tokenizer_lib.load(path.parent, max_length=77).max_length == 77


def test_a_padding_that_is_a_word_is_the_padding_in_texts_too(
  tokenizer_2_folder,
):
  """What transformers, and so every SDXL and SD 2.x model, makes of '!'."""
  texts = ['hi!', '!!! wow !', 'so!good', '!', 'no mark', '']
  reference = transformers.CLIPTokenizer.from_pretrained(tokenizer_2_folder)
  want = reference(texts, padding='max_length', truncation=True)['input_ids']
  ids, cut = tokenizer_lib.load(tokenizer_2_folder).encode(texts)
  np.testing.assert_array_equal(ids, want)
  assert cut == 0 and (ids[0] == 0).sum() > 1
  # Control tokens are still text.
  (row,), _ = tokenizer_lib.load(tokenizer_2_folder).encode(['a <|endoftext|>'])
  assert (row == 1023).sum() == 1
