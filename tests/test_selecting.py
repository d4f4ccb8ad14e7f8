"""The best step by a judge, through the whole command."""

import json

import clip_folder
import jax
import numpy as np
import pytest

from configs import common
from dpo_jax import finish, main, selecting, trees
from dpo_jax.evaluate import prompts as prompts_lib
from dpo_jax.tools import arguments as arguments_lib
from dpo_jax.tools import export
from dpo_jax.train import checkpoint
from dpo_jax.weights import pipeline

# Scores of the start and of steps 2, 4 and 6, added to each of the judge's own;
# they decide, as a judge of random weights gives numbers of no meaning.
LIFTS = (0.0, 1e3, 3e3, 2e3)
RUN = {
  'train__num_steps': 6,
  'train__eval_every': 2,
  'train__checkpoint_every': 6,
  'train__keep': 1,
  'optim__ema_decay': 0.5,
  'eval__num_prompts': 4,
  'eval__retrieval': False,
}


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
  return clip_folder.write(tmp_path_factory.mktemp('clip') / 'c')


@pytest.fixture
def prompts(tmp_path):
  """Nine prompts: more than asked for, no multiple of the devices."""
  path = tmp_path / 'prompts.jsonl'
  rows = [{'prompt': f'a thing number {i}'} for i in range(9)]
  rows[1] |= {'negative_prompt': 'blurry', 'seed': 77}
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


@pytest.fixture
def drawn(monkeypatch):
  """Scores of each pass over the prompts, and the parameters it drew with."""
  real, found = selecting.Validation.score, []

  def score(self, params):
    scores = real(self, params)
    found.append((scores, jax.device_get(params['unet'])))
    return scores + np.float32(LIFTS[len(found) - 1])

  monkeypatch.setattr(selecting.Validation, 'score', score)
  return found


def _error(argv, capsys):
  capsys.readouterr()
  assert main.run(argv) == 2
  lines = capsys.readouterr().err.splitlines()
  (line,) = [line for line in lines if line.startswith('error: ')]
  return line


def _same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_best_step_is_exported_and_reported(
  arguments, tmp_path, judge, prompts, drawn, tiny_folder, capsys
):
  workdir = tmp_path / 'run'
  options = RUN | {
    'eval__scorer': f'clip={judge}',
    'eval__score_prompts': prompts,
    'eval__num_score_prompts': 7,
  }
  argv = arguments(workdir=workdir, **options)
  assert main.run(argv) == 0
  # The start first, of its own weights; each of other pictures than the last.
  (start, base), *steps = drawn
  _same(base, pipeline.load(tiny_folder).params['unet'])
  assert [scores.shape for scores, _ in drawn] == [(7,)] * 4
  assert len({scores.tobytes() for scores, _ in drawn}) == 4
  found = sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert found == [4, 6]
  record = json.loads((workdir / 'best.json').read_text())
  scores = steps[1][0] + np.float32(3e3)
  assert record['step'] == 4 and record['win_rate_over_start'] == 1.0
  assert record['median'] == float(np.median(scores))
  assert record['start_median'] == float(np.median(start))
  assert record['prompts']['n'] == 7
  assert record['scorer']['folder'] == str(judge)
  # What was drawn, saved and exported are the running mean of step 4, bitwise.
  kept, _ = checkpoint.restore_params(workdir, step=4)
  exported = pipeline.load(workdir / 'export').params
  _same(kept['unet'], steps[1][1])
  _same(kept['unet'], exported['unet'])
  report = json.loads((workdir / 'report.json').read_text())
  assert report['exported']['step'] == 4 and report['exported']['of'] == 6
  assert report['exported']['best'] == record
  page = (workdir / 'report.html').read_text()
  assert 'Exported: step 4 of 6, with the best median score' in page
  assert 'Score of what the model draws' in page
  # The tool finds it too.
  words = [f'--workdir={workdir}', f'--out={tmp_path / "out"}', '--step=best']
  assert arguments_lib.run(export.main, words) == 0
  _same(pipeline.load(tmp_path / 'out').params['unet'], exported['unet'])

  # The same command draws nothing more; with another choice the last goes out.
  del drawn[:]
  assert main.run(arguments(workdir=workdir, **options)) == 0
  assert not drawn
  assert json.loads((workdir / 'best.json').read_text()) == record
  last = arguments(workdir=workdir, **options, export__select='last')
  assert main.run(last) == 0
  kept, _ = checkpoint.restore_params(workdir, step=6)
  _same(kept['unet'], pipeline.load(workdir / 'export').params['unet'])
  page = (workdir / 'report.html').read_text()
  assert 'Exported: step 6 of 6, the last one' in page
  # Other noise, other scores: they are not comparable.
  prompts.write_text(prompts.read_text().replace('77', '78'))
  assert 'began with another scorer' in _error(argv, capsys)
  assert 'another scorer' in _error(
    [*argv, '--config.eval.num_steps=3'], capsys
  )


def test_a_stopped_run_has_the_same_scores(
  arguments, tmp_path, judge, monkeypatch
):
  """With the judge's own numbers and held-out captions."""
  options = RUN | {
    'train__num_steps': 4,
    'eval__scorer': f'clip={judge}',
    'eval__num_score_prompts': 5,
  }
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  ends = []
  monkeypatch.setattr(
    finish,
    'finish',
    lambda job, result, path: ends.append(trees.digest(result.state)),
  )
  assert main.run(arguments(workdir=whole, **options)) == 0

  class Stop(Exception):
    pass

  real, calls = selecting.measure, []

  def stop(*scores):
    calls.append(scores)
    if len(calls) == 2:
      raise Stop
    return real(*scores)

  with monkeypatch.context() as patch:
    patch.setattr(selecting, 'measure', stop)
    with pytest.raises(Stop):
      main.run(arguments(workdir=parts, **options))
  assert main.run(arguments(workdir=parts, **options)) == 0
  both = []
  for workdir in (whole, parts):
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    both.append(
      (
        [line for line in lines if 'eval/score' in line],
        json.loads((workdir / 'best.json').read_text()),
      )
    )
  assert both[0] == both[1] and len(both[0][0]) == 2
  assert len(ends) == 2 and ends[0] == ends[1]


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'eval__scorer': 'clip'}, ['eval.scorer', 'NAME=FOLDER']),
    ({'eval__scorer': 'clop=FOLDER'}, ['eval.scorer', 'names are pickscore']),
    ({'eval__scorer': 'clip=/no/clip'}, ['eval.scorer', 'no /no/clip']),
    (
      {'eval__scorer': 'clip=FOLDER,hpsv2=FOLDER'},
      ['names 2 judges', 'give one'],
    ),
    (
      {'eval__scorer': 'classifier=/no/judge:x', 'train__eval_every': 0},
      ['there is no /no/judge;', 'train.eval_every', '0 (never)'],
    ),
    (
      {'eval__scorer': 'clip=FOLDER', 'eval__score_prompts': '/no/p.txt'},
      ["eval.score_prompts='/no/p.txt'", 'not there'],
    ),
    (
      {'eval__scorer': 'clip=FOLDER', 'eval__score_prompts': 'README.md'},
      ["eval.score_prompts='README.md'", 'must end in .txt, .json'],
    ),
    (
      {'eval__scorer': 'aesthetic=FOLDER', 'eval__scorer_tokenizer': '.'},
      ["eval.scorer_tokenizer='.'", 'aesthetic takes none'],
    ),
    (
      {'eval__scorer': 'clip=FOLDER', 'task': 'autoencode'},
      ['eval.scorer', 'task=autoencode does not draw'],
    ),
    ({'eval__score_prompts': 'x.txt'}, ["score_prompts='x.txt'", 'is empty']),
    ({'eval__scorer_tokenizer': '.'}, ["scorer_tokenizer='.'", 'is empty']),
    ({'export__select': 'best'}, ["export.select='best'", 'needs eval.scorer']),
    ({'export__select': 'x'}, ['export.select', 'auto, last, best']),
    ({'eval__num_score_prompts': 0}, ['num_score_prompts=0', 'at least 1']),
  ],
)
def test_bad_settings_are_one_line(arguments, capsys, judge, changes, words):
  changes = {
    key: str(value).replace('FOLDER', str(judge))
    for key, value in changes.items()
  }
  line = _error(arguments(**changes), capsys)
  assert all(word in line for word in words), line


def test_prompts_have_seeds_of_their_own_or_their_row(tmp_path):
  path = tmp_path / 'p.jsonl'
  path.write_text('{"prompt": "a"}\n{"prompt": "b", "seed": 9}\n"c"\n"d"')
  found = selecting.read_prompts(str(path), 3, None)
  assert [(one.text, one.seed) for one in found] == [
    ('a', 0),
    ('b', 9),
    ('c', 2),
  ]
  found = selecting.read_prompts('', 2, lambda count: ['x', 'y', 'z'][:count])
  assert found == [
    prompts_lib.Prompt('000000', 'x', seed=0),
    prompts_lib.Prompt('000001', 'y', seed=1),
  ]


def test_measures_by_hand():
  start = np.array([1, 2, 3, 4], np.float32)
  found = selecting.measure(np.array([2, 1, 3, 9], np.float32), start)
  assert found == {
    'eval/score/median': 2.5,
    'eval/score/mean': 3.75,
    'eval/score/start_median': 2.5,
    'eval/score/win_rate_over_start': (1 + 0 + 0.5 + 1) / 4,
  }


def test_export_of_a_run_without_a_judge_says_so(tmp_path, capsys):
  (tmp_path / 'config.json').write_text(common.get_config().to_json())
  words = [f'--workdir={tmp_path}', f'--out={tmp_path / "o"}']
  assert arguments_lib.run(export.main, [*words, '--step=best']) == 2
  assert '--step=best' in (error := capsys.readouterr().err)
  assert 'no best.json' in error
  assert arguments_lib.run(export.main, [*words, '--step=bast']) == 2
  assert 'give an integer' in capsys.readouterr().err
