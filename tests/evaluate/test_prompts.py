"""Every format of prompt file, and what is refused in each."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from dpo_jax.evaluate import prompts


def _texts(path):
  return [(p.id, p.text) for p in prompts.read(path)]


WANTED = [('000000', 'a cat'), ('000001', 'ein Hund')]


@pytest.mark.parametrize(
  'name, content',
  [
    ('p.txt', '\ufeffa cat\n\n  ein Hund \n'),
    ('p.json', '["a cat", {"caption": "ein Hund"}]'),
    ('p.json', '{"anime": ["a cat"], "photo": ["ein Hund"]}'),
    ('p.jsonl', '{"prompt": "a cat"}\n\n{"text": "ein Hund"}\n'),
    ('p.csv', 'n,prompt\n1,a cat\n2,"ein Hund"\n'),
    # PartiPrompts' layout.
    ('p.tsv', 'Prompt\tCategory\na cat\tAnimals\nein Hund\tAnimals\n'),
  ],
)
def test_formats(tmp_path, name, content):
  (tmp_path / name).write_text(content, encoding='utf-8')
  assert _texts(tmp_path / name) == WANTED


def test_parquet_with_other_columns_beside(tmp_path):
  table = pa.table(
    {'caption': ['a cat', 'ein Hund'], 'jpg_0': [b'no image', b'']}
  )
  parquet.write_table(table, tmp_path / 'p.parquet')
  assert _texts(tmp_path / 'p.parquet') == WANTED


def test_ids_seeds_and_negative_prompts(tmp_path):
  rows = [
    {'id': 'cat-1', 'prompt': 'a cat', 'seed': 7, 'negative_prompt': 'dog'},
    {'id': 12, 'prompt': 'b', 'seed': '3', 'negative_prompt': ''},
    {'prompt': 'c'},
  ]
  path = tmp_path / 'p.json'
  path.write_text(json.dumps(rows))
  assert prompts.read(path) == [
    prompts.Prompt('cat-1', 'a cat', 'dog', 7),
    prompts.Prompt('12', 'b', None, 3),
    prompts.Prompt('000002', 'c', None, None),
  ]


@pytest.mark.parametrize(
  'name, content, words',
  [
    ('p.yaml', 'a', 'are read from .txt'),
    ('p.json', '3', 'neither a list'),
    ('p.json', '{"a": 1}', 'lists of prompts'),
    ('p.json', '{', 'cannot be read'),
    ('p.json', '[3]', 'row 0 is neither'),
    ('p.json', '[{"tekst": "a"}]', 'row 0 has no prompt'),
    ('p.json', '[{"prompt": 3}]', 'row 0 has no prompt'),
    ('p.json', '[{"prompt": "a", "id": "../x"}]', "id '../x'"),
    ('p.json', '[{"prompt": "a", "id": ".x"}]', "id '.x'"),
    ('p.json', '[{"prompt": "a", "seed": 1.5}]', 'seed=1.5'),
    ('p.json', '[{"prompt": "a", "seed": -1}]', 'seed=-1'),
    ('p.json', '[{"prompt": "a", "negative_prompt": 1}]', 'negative_prompt'),
    (
      'p.json',
      '[{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "X"}]',
      'rows 0 and 1 have the same id',
    ),
    ('p.txt', '\n\n', 'holds no prompts'),
    ('p.parquet', 'nonsense', 'cannot be read'),
  ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
  path = tmp_path / name
  path.write_text(content)
  with pytest.raises(ValueError) as error:
    prompts.read(path)
  assert words in str(error.value) and str(path) in str(error.value)
  assert '\n' not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match='no such file'):
    prompts.read(tmp_path / 'p.txt')
