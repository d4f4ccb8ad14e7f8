"""python -m dpo_jax.tools.rank: a model's own pictures as pairs."""

import json
import pathlib

import clip_folder
import numpy as np
import pytest
from PIL import Image

from dpo_jax import scoring, sharding
from dpo_jax.data import images as images_lib
from dpo_jax.data import records
from dpo_jax.evaluate import manifest, ranking, scorers
from dpo_jax.tools import arguments, prepare, rank

PROMPTS = ['a dog', 'a cat', 'a flag']
PICTURES = 3


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  return clip_folder.write(tmp_path_factory.mktemp('clip') / 'c')


@pytest.fixture
def folder(tmp_path):
  """As tools.generate leaves it; the flag's pictures are all the same."""
  pictures = manifest.Pictures(tmp_path / 'pictures', {'settings': {}})
  entries = [
    {
      'file': f'{i:06d}_{n}.png',
      'id': f'{i:06d}',
      'image': n,
      'prompt': prompt,
      'negative_prompt': '',
      'seed': 10 * i + n,
    }
    for i, prompt in enumerate(PROMPTS)
    for n in range(PICTURES)
  ]
  coarse = np.random.default_rng(0).integers(
    0, 256, (len(entries), 4, 4, 3), np.uint8
  )
  coarse[-PICTURES:] = coarse[-1]
  pictures.add(entries, coarse.repeat(4, 1).repeat(4, 2))
  pictures.close([entry['file'] for entry in entries])
  return tmp_path / 'pictures'


def run(folder, weights, *words):
  rank.main(
    [f'--pictures={folder}', f'--scorer=clip={weights}', '--batch=8', *words]
  )


def read_lines(folder):
  lines = (folder / 'pairs.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def judged(folder, weights):
  """File to score, each picture asked for alone."""
  judge = scoring.open_scorer(
    'clip', str(weights), mesh=sharding.make_mesh(), batch_size=8
  )
  return {
    f'{i:06d}_{n}.png': judge.score(
      [images_lib.load(folder / f'{i:06d}_{n}.png')], [prompt]
    )[0]
    for i, prompt in enumerate(PROMPTS)
    for n in range(PICTURES)
  }


def test_guided_pictures_are_not_ranked(folder, weights, capsys):
  settings = folder / 'settings.json'
  settings.write_text(json.dumps({'settings': {}, 'reward': {'scale': 1.0}}))
  words = [f'--pictures={folder}', f'--scorer=clip={weights}']
  assert arguments.run(rank.main, words) == 2
  assert 'a reward guided these pictures' in capsys.readouterr().err
  assert not (folder / 'pairs.jsonl').exists()


def test_the_best_meets_the_worst(folder, weights, capsys, tmp_path):
  run(folder, weights)
  lines, scores = read_lines(folder), judged(folder, weights)
  assert [line['caption'] for line in lines] == PROMPTS[:2]
  for i, line in enumerate(lines):
    names = [f'{i:06d}_{n}.png' for n in range(PICTURES)]
    assert line['winner'] == max(names, key=scores.get)
    assert line['loser'] == min(names, key=scores.get)
  report = json.loads((folder / 'ranking.json').read_text())
  assert report['pairs'] == {'kept': 2, 'ties': 1, 'below_min_gap': 0}
  assert report['mean_score'] == pytest.approx(
    np.mean(list(scores.values())), rel=1e-5
  )
  assert '2 pairs of 3 prompts' in capsys.readouterr().out
  prepare.main(
    [
      '--format=jsonl',
      f'--source={folder / "pairs.jsonl"}',
      f'--out={tmp_path / "pairs"}',
    ]
  )
  given = records.open_folder(str(tmp_path / 'pairs'))
  # image_0 against image_1, of which the label says who won.
  for record in given:
    line = next(
      one for one in lines if one['caption'].encode() == record['caption']
    )
    winner = record['image_0' if record['label'] == 1 else 'image_1']
    np.testing.assert_array_equal(
      images_lib.decode(winner), images_lib.load(folder / line['winner'])
    )


def test_all_pairs_of_a_prompt(folder, weights):
  run(folder, weights, '--pairs=all')
  lines, scores = read_lines(folder), judged(folder, weights)
  assert len(lines) == 6
  assert len({(line['winner'], line['loser']) for line in lines}) == 6
  assert all(scores[line['winner']] > scores[line['loser']] for line in lines)


def test_a_gap_is_asked_for():
  groups = [
    ranking.Group('a', ('0', '1', '2'), ('x', 'y', 'z')),
    ranking.Group('b', ('3', '4', '5'), ('u', 'v', 'w')),
  ]
  scores = np.array([[0.0, 3.0, 1.0], [1.0, 1.0, 0.5]])
  lines, counts = ranking.make_pairs(groups, scores, min_gap=1.0)
  assert [(line['winner'], line['loser']) for line in lines] == [('1', '0')]
  assert counts == {'kept': 1, 'ties': 0, 'below_min_gap': 1}
  lines, counts = ranking.make_pairs(groups, scores, mode='all', min_gap=2.0)
  assert [(line['winner'], line['loser']) for line in lines] == [
    ('1', '2'),
    ('1', '0'),
  ]
  assert counts == {'kept': 2, 'ties': 1, 'below_min_gap': 3}


def test_nothing_is_scored_twice(folder, weights, monkeypatch):
  run(folder, weights)
  first = read_lines(folder)
  path = folder / 'scores-clip.jsonl'
  lines = path.read_text().splitlines()
  assert len(lines) == 1 + len(PROMPTS) * PICTURES
  # Killed in the middle of the second prompt's last line.
  path.write_text('\n'.join(lines[:6]) + '\n' + lines[6][:20])
  asked = []
  batches = scorers.Scorer.batches

  def count(self, questions, **options):
    questions = list(questions)
    asked.extend(text for text, _ in questions)
    return batches(self, questions, **options)

  monkeypatch.setattr(scorers.Scorer, 'batches', count)
  run(folder, weights)
  assert asked == ['a cat', 'a flag']
  assert read_lines(folder) == first
  asked.clear()
  run(folder, weights)
  assert asked == []


def test_what_is_wrong_is_said(folder, weights, tmp_path, capsys):
  run(folder, weights)
  other = clip_folder.write(tmp_path / 'other', seed=1)
  with pytest.raises(ValueError, match=r'scores-clip\.jsonl: scores of .*not'):
    run(folder, other)
  with pytest.raises(ValueError, match='one judge ranks'):
    rank.main(
      [f'--pictures={folder}', f'--scorer=clip={weights},hpsv2={weights}']
    )
  with pytest.raises(ValueError, match=r'no pair is left of 3 prompts'):
    run(folder, weights, '--min_gap=1e9')
  (folder / 'manifest.jsonl').write_text(
    ''.join(
      line + '\n'
      for line in (folder / 'manifest.jsonl').read_text().splitlines()[::3]
    )
  )
  with pytest.raises(ValueError, match=r'1 to 1 pictures a prompt.*=4'):
    run(folder, weights)
  assert arguments.run(rank.main, [f'--pictures={tmp_path}']) == 2
  assert 'scorer' in capsys.readouterr().err


def test_transparent_pictures_are_laid_on_white(tmp_path):
  path = pathlib.Path(tmp_path / 'x.png')
  Image.new('RGBA', (2, 2), (255, 0, 0, 0)).save(path)
  assert (images_lib.load(path) == 255).all()
  path.write_bytes(b'no picture')
  with pytest.raises(ValueError, match=r'x\.png: cannot decode'):
    images_lib.load(path)
