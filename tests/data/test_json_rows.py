"""Rows of JSON files: found in any chunks, with limits."""

import json
import random

import pytest

from dpo_jax.data.formats import json_rows


@pytest.mark.parametrize('indent', [None, 1])
@pytest.mark.parametrize('chunk', [1, 7, 64, 1 << 20])
def test_rows_of_an_array_are_found_in_any_chunks(
  tmp_path, monkeypatch, indent, chunk
):
  monkeypatch.setattr(json_rows, '_CHUNK', chunk)
  values = random.Random(0)
  given = [
    {
      'a': ']}[,"\\' * (i % 3),
      'b': [i, -1.5e3, None, {'c': 'x\u20ac\U0001f600\0'}],
      'd': ''.join(chr(values.randrange(1, 0x2FFF)) for _ in range(9)),
    }
    for i in range(30)
  ]
  for ascii_only in (True, False):
    text = json.dumps(given, indent=indent, ensure_ascii=ascii_only)
    for mark in (b'', b'\xef\xbb\xbf', b' \n\t'):
      path = tmp_path / 'a.json'
      path.write_bytes(mark + text.encode() + b' \n')
      index = json_rows.find_rows(path)
      assert [row for _, row in index.read(0, 30)] == given
      assert list(index.read(28, 30)) == [(28, given[28]), (29, given[29])]


@pytest.mark.parametrize(
  'text',
  [
    '[{"a": 1}, {"a": 2}',
    '[{"a": 1} {"a": 2}]',
    '[{"a": 1},]',
    '[{"a": 1}] x',
    '[] x',
    '[',
    '[{"a": ',
    '[' * 100_000,
    '[{"a": tru}]',
  ],
)
def test_broken_arrays_are_refused(tmp_path, text):
  path = tmp_path / 'a.json'
  path.write_text(text)
  with pytest.raises(ValueError, match=r'a\.json: cannot be read as JSON'):
    json_rows.find_rows(path)


def test_rows_of_lines_and_their_limits(tmp_path, monkeypatch):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xff"}\n{"a": 3}')
  index = json_rows.find_rows(path)
  assert len(index) == 3
  assert list(index.read(2, 3)) == [(2, {'a': 3})]
  assert list(index.read(0, 1)) == [(0, {'a': 1})]
  with pytest.raises(ValueError, match=r'a\.jsonl, row 1: .*utf-8'):
    list(index.read(0, 3))
  monkeypatch.setattr(json_rows, 'MAX_ROW_BYTES', 20)
  path.write_text('{"a": "' + 'x' * 50 + '"}\n')
  with pytest.raises(ValueError, match='a line of more than 20 bytes at 0'):
    json_rows.find_rows(path)
  path.write_text('[{"a": "' + 'x' * 50 + '"')
  with pytest.raises(ValueError, match='cannot be read'):
    json_rows.find_rows(path)
  path.write_text('')
  assert len(json_rows.find_rows(path)) == 0
