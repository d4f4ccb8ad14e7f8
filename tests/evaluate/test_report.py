import base64
import html.parser
import io
import json
import math
import pathlib
import re
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from dpo_jax.evaluate import report, stats

HOSTILE = [
  '<script>alert(1)</script>',
  '{{7*7}} {% raw %} ${7*7}',
  'a\u202egnp.exe\u2066x',
  '"><img src=x onerror=alert(1)>',
  '</figcaption></main><iframe src="http://evil.example/">',
  "' onmouseover='alert(1)",
  '\x1b[31mred\x00',
  'lone \ud800 surrogate',
  'caf\u00e9 \u65e5\u672c \U0001f389',
]
RESULTS = {
  'win_rate': {'value': 0.8, 'low': 0.7, 'high': 0.9, 'n': 100},
  'style_share': {'base': 0.5, 'aligned': 0.9},
  'retrieval': {'base': 0.7, 'aligned': 0.65},
  'implicit_accuracy': 0.85,
}


class _Page(html.parser.HTMLParser):
  """Tags with their attributes, and the text a reader sees."""

  def __init__(self, source):
    super().__init__()
    self.tags, self.text = [], ''
    self.feed(source)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    self.text += ' '

  def handle_data(self, data):
    if self.tags[-1:] != [('style', {})]:
      self.text += data

  @property
  def words(self):
    return ' '.join(self.text.split())


def _pairs(prompts, side=32, outcomes=None):
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (2, len(prompts), side, side, 3))
  return report.ImagePairs(images[0], images[1], prompts, outcomes)


def _write(workdir, **changes):
  arguments = {
    'results': RESULTS,
    'settings': {'seed': 0},
    'seconds': 12.5,
    **changes,
  }
  json_path, html_path = report.write_report(workdir, **arguments)
  assert json_path == pathlib.Path(workdir) / 'report.json'
  source = html_path.read_text(encoding='utf-8')
  return json.loads(json_path.read_text()), _Page(source)


def test_json_holds_what_was_measured(tmp_path):
  win_rate = stats.win_rate(np.arange(30) % 3, np.ones(30))
  settings = {
    'optim': {'betas': (0.9, 0.999), 'clip': math.inf},
    'path': pathlib.Path('a/b'),
    'array': np.arange(2),
    'dtype': np.float32,
  }
  record, _ = _write(
    tmp_path / 'new' / 'run',
    results={**RESULTS, 'win_rate': win_rate, 'sft': {'x': np.float32(0.5)}},
    settings=settings,
  )
  assert record['win_rate'] == win_rate
  assert record['style_share'] == {'base': 0.5, 'aligned': 0.9}
  assert record['retrieval'] == {'base': 0.7, 'aligned': 0.65}
  assert record['implicit_accuracy'] == 0.85
  assert record['seconds'] == 12.5
  assert record['sft'] == {'x': 0.5}
  assert record['reasons'] == {}
  assert record['settings']['optim'] == {
    'betas': [0.9, 0.999],
    'clip': 'inf',
  }
  assert record['settings']['path'] == 'a/b'
  assert record['settings']['array'] == [0, 1]
  names = sorted(p.name for p in (tmp_path / 'new' / 'run').iterdir())
  assert names == ['report.html', 'report.json']


def test_the_headline_says_it_in_one_sentence(tmp_path):
  _, page = _write(tmp_path, judge='a style classifier')
  assert (
    'The aligned model wins 80.0% [70.0, 90.0] of 100 prompts against base, '
    'judged by a style classifier.' in page.words
  )


@pytest.mark.parametrize(
  'low, high, verdict',
  [
    (0.51, 0.9, 'above one half: aligned is preferred'),
    (0.1, 0.49, 'below one half: base is preferred'),
    (0.4, 0.6, 'cannot be told apart'),
    (0.5, 0.6, 'cannot be told apart'),
  ],
)
def test_the_verdict_follows_the_interval(tmp_path, low, high, verdict):
  win_rate = {'value': (low + high) / 2, 'low': low, 'high': high, 'n': 9}
  _, page = _write(tmp_path, results={**RESULTS, 'win_rate': win_rate})
  assert verdict in page.words


def test_nulls_carry_their_reasons(tmp_path):
  record, page = _write(
    tmp_path,
    results={'implicit_accuracy': None},
    reasons={'win_rate': 'no judge is configured'},
  )
  assert all(record[name] is None for name in report.MEASURES)
  assert record['reasons'] == {
    'win_rate': 'no judge is configured',
    'style_share': report.NOT_MEASURED,
    'retrieval': report.NOT_MEASURED,
    'implicit_accuracy': report.NOT_MEASURED,
  }
  assert 'No win rate: no judge is configured.' in page.words
  assert report.NOT_MEASURED in page.words


def test_hostile_text_comes_out_as_text(tmp_path):
  record, page = _write(
    tmp_path,
    pairs=_pairs(HOSTILE, outcomes=[1, 0, 0.5] * 3),
    settings={text: text for text in HOSTILE},
    results={**RESULTS, 'other': HOSTILE},
    cost={'device': HOSTILE[0], HOSTILE[3]: 1},
    data={HOSTILE[4]: {HOSTILE[5]: HOSTILE[0]}},
    judge=HOSTILE[0],
    title=HOSTILE[3],
  )
  tags = {tag for tag, _ in page.tags}
  assert not tags & {'script', 'iframe', 'link', 'object', 'form', 'a'}
  assert not any(k.startswith('on') for _, a in page.tags for k in a)
  assert sum(tag == 'img' for tag, _ in page.tags) == 2 * len(HOSTILE)
  for text in (HOSTILE[0], HOSTILE[1], HOSTILE[3], HOSTILE[4], HOSTILE[5]):
    assert text in page.text
  assert 'a\\u202egnp.exe\\u2066x' in page.text
  assert '\\x1b[31mred\\x00' in page.text
  assert 'lone \\ud800 surrogate' in page.text
  assert HOSTILE[-1] in page.text
  assert not set(page.text) & set('\u202e\u2066\x1b\x00')
  assert '49' not in page.text
  assert record['settings'][HOSTILE[7]] == HOSTILE[7]


def test_the_page_stands_alone(tmp_path):
  _, page = _write(tmp_path, pairs=_pairs(['a', 'b']))
  for _, attributes in page.tags:
    for name, value in attributes.items():
      assert name not in ('href', 'srcset', 'action', 'data')
      if name == 'src':
        assert value.startswith('data:image/')
  source = (tmp_path / 'report.html').read_text(encoding='utf-8')
  assert not re.search(r'https?:|//\w|@import|url\(', source.split('<img')[0])
  policies = [
    a['content'] for t, a in page.tags if t == 'meta' and 'http-equiv' in a
  ]
  assert policies == [
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  ]


def test_small_images_are_embedded_exactly(tmp_path):
  pairs = _pairs(['a', 'b'])
  _, page = _write(tmp_path, pairs=pairs)
  sources = [a['src'] for tag, a in page.tags if tag == 'img']
  for i, image in enumerate(
    [pairs.base[0], pairs.aligned[0], pairs.base[1], pairs.aligned[1]]
  ):
    data = base64.b64decode(sources[i].split(',')[1])
    pixels = np.asarray(Image.open(io.BytesIO(data)), float)
    assert np.abs(pixels - (image + 1) * 127.5).max() <= 0.5


def test_large_images_are_reduced_and_their_number_is_bounded(tmp_path):
  _, page = _write(tmp_path, pairs=_pairs(['p'] * 5, side=512), max_pairs=2)
  sources = [a['src'] for tag, a in page.tags if tag == 'img']
  assert len(sources) == 4
  data = base64.b64decode(sources[0].split(',')[1])
  assert Image.open(io.BytesIO(data)).size == (384, 384)
  assert 'The first 2 of 5 prompts, not selected.' in page.words


def test_outcomes_are_named(tmp_path):
  _, page = _write(tmp_path, pairs=_pairs('abcd', outcomes=[1, 1, 0, 0.5]))
  assert page.text.count('aligned wins') == 2
  assert page.text.count('base wins') == 1
  assert page.words.count('\u25ac tie') == 1


def test_curves_and_the_torn_last_line(tmp_path):
  metrics = tmp_path / 'metrics.jsonl'
  rows = [
    {'step': i, 'loss': 0.7, 'reward/margin': 0.0, 'reward/accuracy_t3': 0.5}
    for i in range(4)
  ]
  metrics.write_text('\n'.join(map(json.dumps, rows)) + '\n{"step": 4, "l')
  record, page = _write(tmp_path, metrics_path=metrics)
  assert record['metrics'] == {'steps_logged': 4, 'damaged_lines': 1}
  assert '4 logged steps, 1 damaged line of metrics.jsonl' in page.words
  assert sum(tag == 'svg' for tag, _ in page.tags) == 3
  _, page = _write(tmp_path)
  assert 'No curves: nothing was logged.' in page.words
  with pytest.raises(OSError):
    _write(tmp_path, metrics_path=tmp_path / 'absent.jsonl')


def test_cost_and_data_in_readers_units(tmp_path):
  _, page = _write(
    tmp_path,
    seconds=3725,
    cost={
      'peak_memory_bytes': 3 * 2**29,
      'pairs_per_second': 51.254,
      'versions': {'jax': '0.10.2'},
      'complete': True,
    },
    data={'pairs': 12345, 'ties_dropped': 51},
  )
  for words in (
    'seconds 1 h 02 min',
    'peak memory 1.50 GiB',
    'pairs per second 51.25',
    'jax 0.10.2',
    'complete yes',
    'pairs 12,345',
    'ties dropped 51',
  ):
    assert words in page.words


@pytest.mark.parametrize(
  'change, named',
  [
    ({'win_rate': 0.8}, "results\\['win_rate'\\]"),
    ({'win_rate': {'value': 0.8}}, "'low', 'high', 'n'"),
    ({'style_share': {'base': 0.5}}, "results\\['style_share'\\]"),
    ({'retrieval': {'base': 0.5, 'aligned': 93.0}}, 'retrieval.aligned is 93'),
    ({'retrieval': {'base': None, 'aligned': 0.9}}, 'retrieval.base is None'),
    ({'implicit_accuracy': math.nan}, 'implicit_accuracy is nan'),
    ({'implicit_accuracy': 'high'}, "implicit_accuracy is 'high'"),
  ],
)
def test_results_of_another_form_are_refused(tmp_path, change, named):
  with pytest.raises(ValueError, match=named):
    _write(tmp_path, results={**RESULTS, **change})
  assert not list(tmp_path.iterdir())


def test_other_bad_input_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"'winrate'.*allowed"):
    _write(tmp_path, reasons={'winrate': 'a typing error'})
  with pytest.raises(ValueError, match='2 image pairs for 1 prompts'):
    report.ImagePairs(np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 3)), ['a'])
  with pytest.raises(ValueError, match='outcomes'):
    _pairs(['a'], outcomes=[0.7])


def test_the_template_is_package_data():
  folder = resources.files('dpo_jax.evaluate') / 'templates'
  assert (folder / 'report.html.j2').is_file()
