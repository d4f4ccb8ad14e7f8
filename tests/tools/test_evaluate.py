"""python -m dpo_jax.tools.evaluate: two models, one page."""

import json

import clip_folder
import numpy as np
import pytest

from dpo_jax import scoring, sharding
from dpo_jax.data import images as images_lib
from dpo_jax.evaluate import comparison, manifest
from dpo_jax.tools import arguments, evaluate

PROMPTS = ['grinning face', '<script>alert(1)</script>', 'flag', 'dog', 'cat']
SETTINGS = {
  'model': {'name': 'x'},
  'settings': {'num_steps': 5, 'size': [16, 16]},
  'seed': 0,
  'compute_dtype': 'float32',
}


def entry(i, n=0, **changes):
  return {
    'file': f'{i:06d}_{n}.png',
    'id': f'{i:06d}',
    'image': n,
    'prompt': PROMPTS[i],
    'negative_prompt': '',
    'seed': 10 * i + n,
  } | changes


def write(folder, draw, *, images=2, count=5, settings=None, **changes):
  """A folder as tools.generate leaves it, of random pictures."""
  pictures = manifest.Pictures(folder, SETTINGS | (settings or {}))
  rng = np.random.default_rng(draw)
  entries = [
    entry(i, n, **changes) for i in range(count) for n in range(images)
  ]
  coarse = rng.integers(0, 256, (len(entries), 4, 4, 3), np.uint8)
  pictures.add(entries, coarse.repeat(4, 1).repeat(4, 2))
  pictures.close([one['file'] for one in entries])
  return str(folder)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  return clip_folder.write(tmp_path_factory.mktemp('clip') / 'c', head=True)


@pytest.fixture
def prompts(tmp_path):
  path = tmp_path / 'parti.tsv'
  rows = [
    f'{text}\t{"Animals" if i > 2 else "Signs"}\tBasic'
    for i, text in enumerate(PROMPTS)
  ]
  path.write_text('\n'.join(['Prompt\tCategory\tChallenge', *rows]) + '\n')
  return path


def run(*words):
  evaluate.main([*words, '--score_batch=8'])


def test_pictures_are_compared_by_every_scorer(tmp_path, weights, prompts):
  a, b = write(tmp_path / 'a', 0), write(tmp_path / 'b', 1)
  out = tmp_path / 'out'
  words = [
    f'--a={a}',
    f'--b={b}',
    f'--prompts={prompts}',
    f'--scorers=pickscore={weights},aesthetic={weights}',
    f'--out={out}',
  ]
  run(*words)
  report = json.loads((out / 'report.json').read_text())
  judge = scoring.open_scorer(
    'pickscore', str(weights), mesh=sharding.make_mesh(), batch_size=8
  )
  pairs = comparison.open_pairs(a, b)
  captions = [pair.prompt for pair in pairs]
  scores = [
    judge.score(
      [images_lib.load(getattr(pair, side)) for pair in pairs], captions
    )
    for side in 'ab'
  ]
  outcomes = (scores[1] > scores[0]).reshape(5, 2).mean(1)
  found = report['scorers']['pickscore']
  assert found['value'] == pytest.approx(outcomes.mean())
  assert (found['wins'], found['losses'], found['ties']) == (
    (outcomes > 0.5).sum(),
    (outcomes < 0.5).sum(),
    (outcomes == 0.5).sum(),
  )
  assert found['n'] == 5
  assert found['median_a'] == pytest.approx(np.median(scores[0]), abs=1e-4)
  groups = found['groups']
  assert groups['category']['Animals']['n'] == 2
  assert groups['category']['Signs']['value'] == pytest.approx(
    outcomes[:3].mean()
  )
  assert groups['challenge']['Basic']['n'] == 5
  assert set(report['scorers']) == {'pickscore', 'aesthetic'}
  page = (out / 'report.html').read_text()
  assert '&lt;script&gt;alert(1)' in page and '<script' not in page
  assert 'judged by pickscore' in page and '://' not in page
  # The page's first picture of each gallery has the largest margin.
  margins = scores[1] - scores[0]
  assert f'{margins.max():+.4g}' in page and f'{margins.min():+.4g}' in page


def test_scores_are_kept(tmp_path, weights, monkeypatch):
  a, b = write(tmp_path / 'a', 0), write(tmp_path / 'b', 1)
  words = [f'--a={a}', f'--b={b}', f'--scorers=clip={weights}']
  words.append(f'--out={tmp_path / "out"}')
  run(*words)
  first = (tmp_path / 'out' / 'report.json').read_text()

  def refuse(*args, **options):
    raise AssertionError('scored again')

  monkeypatch.setattr(evaluate.scorers.Scorer, 'batches', refuse)
  run(*words)
  assert (tmp_path / 'out' / 'report.json').read_text() == first


def test_models_draw_the_prompts(tiny_folder, tmp_path, weights, prompts):
  out = tmp_path / 'out'
  words = [
    f'--a={tiny_folder}',
    f'--b={tiny_folder}',
    f'--prompts={prompts}',
    f'--scorers=clip={weights}',
    f'--out={out}',
    '--steps=2',
    '--size=16',
    '--batch=8',
    '--limit=2',
  ]
  run(*words)
  found = json.loads((out / 'report.json').read_text())['scorers']['clip']
  # The same model on both sides: nothing but ties.
  assert (found['value'], found['n'], found['ties']) == (0.5, 2, 2)
  assert found['p_value'] == 1.0 and found['difference']['value'] == 0.0
  assert (out / 'a' / '000001_0.png').is_file()


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'settings': {'seed': 1}}, 'were made otherwise .seed: 0 and 1'),
    (
      {'settings': {'settings': {'num_steps': 9, 'size': [16, 16]}}},
      "were made otherwise .settings: {'num_steps': 5",
    ),
    ({'count': 4}, 'has 10 pictures, .* 8'),
    ({'prompt': 'other'}, "has prompt 'grinning face' and 'other'"),
    ({'seed': 7}, 'has seed 0 and 7; generate both'),
  ],
)
def test_what_was_made_otherwise_is_not_compared(tmp_path, changes, words):
  folders = write(tmp_path / 'a', 0)
  options = dict(changes)
  other = write(tmp_path / 'b', 1, **options)
  with pytest.raises(ValueError, match=words):
    comparison.open_pairs(folders, other)


def test_the_model_may_differ(tmp_path):
  a = write(tmp_path / 'a', 0)
  b = write(
    tmp_path / 'b', 1, settings={'model': {'name': 'y'}, 'unet_sha256': 'z'}
  )
  assert len(comparison.open_pairs(a, b)) == 10
  # So may what leads it.
  led = {'reward': {'scale': 1.0}, 'negative_weights': {'path': 'w'}}
  assert len(comparison.open_pairs(a, write(tmp_path / 'c', 2, settings=led)))
  (tmp_path / 'b' / '000002_1.png').unlink()
  with pytest.raises(ValueError, match='1 pictures are missing, 000002_1'):
    comparison.open_pairs(a, b)


def error_of(capsys, *words):
  assert arguments.run(evaluate.main, words) == 2
  return capsys.readouterr().err.splitlines()[-1]


def test_errors_are_one_line(tmp_path, weights, capsys):
  a = write(tmp_path / 'a', 0)
  base = [f'--a={a}', f'--b={a}', f'--out={tmp_path / "o"}']
  scorer = f'--scorers=clip={weights}'
  assert 'NAME=FOLDER' in error_of(capsys, *base, '--scorers=clip')
  assert '--steps=3: is for drawing' in error_of(
    capsys, *base, scorer, '--steps=3'
  )
  assert '--a_lora=x: is for a model' in error_of(
    capsys, *base, scorer, '--a_lora=x'
  )
  assert 'name the --prompts that it draws' in error_of(
    capsys, '--a=org/model', *base[1:], scorer
  )


def test_wins_by_hand():
  pairs = [
    comparison.Pair(None, None, 'p', name) for name in ('x', 'x', 'y', 'z')
  ]
  a, b = np.array([0.0, 0, 0, 0]), np.array([1.0, -1, 2, 0])
  found = comparison.compare(a, b, pairs, groups={'x': {'k': 'g'}})
  # x: one of two; y: won; z: a tie.
  assert found['value'] == pytest.approx((0.5 + 1 + 0.5) / 3)
  assert (found['wins'], found['losses'], found['ties']) == (1, 0, 2)
  assert found['difference']['value'] == pytest.approx(2 / 3)
  group = found['groups']['k']['g']
  assert (group['value'], group['n']) == (0.5, 1)


@pytest.mark.parametrize('name', ['../secret.png', 'sub/x.png', '/x.png', ''])
def test_a_manifest_names_files_of_its_folder(tmp_path, name):
  folder = tmp_path / 'a'
  write(folder, 0)
  (tmp_path / 'secret.png').write_bytes(b'x')
  path = folder / 'manifest.jsonl'
  first, *rest = path.read_text().splitlines()
  entry = json.loads(first) | {'file': name}
  path.write_text('\n'.join([json.dumps(entry), *rest]) + '\n')
  with pytest.raises(ValueError, match='no name of a file in this folder'):
    comparison.read_entries(folder)
