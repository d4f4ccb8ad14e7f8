"""The table of methods from made-up records: means, intervals, resuming."""

import json
import math

import pytest

from benchmarks import methods, methods_table


@pytest.fixture(autouse=True)
def at_root(request, monkeypatch):
  monkeypatch.chdir(request.config.rootpath)


def _record(method='dpo', seed=0, **changes):
  return {
    'method': method,
    'seed': seed,
    'config': methods.digest(methods.make_config(method, seed)),
    'style_share': 0.9,
    'retrieval': 0.95,
    'num_prompts': 200,
    'implicit_accuracy': 0.8,
    'num_pairs': 100,
    'drift': 0.01 * (1 + seed),
    'step_seconds': 0.3 + 0.1 * seed,
    'seconds': 100.0,
  } | changes


def test_wilson_by_hand():
  found = methods_table.pool([0.9, 0.8], [50, 50])
  # p = 0.85, n = 100, z = 1.96: centre (p + z^2/2n) / (1 + z^2/n).
  centre = (0.85 + 3.8415 / 200) / (1 + 3.8415 / 100)
  room = 1.96 * math.sqrt(0.85 * 0.15 / 100 + 3.8415 / 40000) / 1.038415
  assert found.value == 0.85 and found.each == (0.9, 0.8)
  assert found.low == pytest.approx(centre - room, abs=1e-4)
  assert found.high == pytest.approx(centre + room, abs=1e-4)


def test_student_by_hand():
  found = methods_table.student([1.0, 2.0, 3.0])
  # sd 1, and t of two degrees of freedom is 4.3027.
  room = 4.3027 / math.sqrt(3)
  assert found.value == 2.0
  assert found.low == pytest.approx(2 - room, abs=1e-4)
  assert found.high == pytest.approx(2 + room, abs=1e-4)
  alone = methods_table.student([1.0])
  assert alone.value == 1.0 and math.isnan(alone.low)


def test_the_table():
  records = [_record(seed=i, style_share=0.9 + 0.01 * i) for i in range(3)]
  records[1]['peak_bytes'] = 3 * 2**20
  base = {'method': 'base', 'seed': 0, 'config': '', 'seconds': 1.0}
  base |= {'style_share': 0.5, 'retrieval': 1.0, 'num_prompts': 200}
  rows = methods_table.summarise([*records, base], ['base', 'dpo'], [0, 1, 2])
  lines = methods_table.markdown(rows).splitlines()
  assert len(lines) == 4 and len({line.count('|') for line in lines}) == 1
  cells = [cell.strip() for cell in lines[3].split('|')[1:-1]]
  assert cells[0] == 'dpo'
  assert cells[1].startswith('91.0 [88.') and cells[2] == '90.0, 91.0, 92.0'
  assert cells[3].startswith('95.0 [93.') and cells[4].startswith('80.0 [')
  assert cells[5] == '0.0200 [0.0000, 0.0448]'
  # The fastest seed's step.
  assert cells[6:] == ['300', '3']
  cells = [cell.strip() for cell in lines[2].split('|')[1:-1]]
  assert cells[0] == 'base' and cells[3].endswith('100.0]')
  assert cells[4:] == ['', '', '', '']


def test_of_the_seeds_that_were_asked_for():
  records = [_record(seed=0), _record(seed=5, style_share=0.1)]
  (row,) = methods_table.summarise(records, ['dpo', 'ipo'], [0])
  assert row.measures['style_share'].each == (0.9,)
  assert math.isnan(row.measures['drift'].low)
  with pytest.raises(ValueError, match='no finished run'):
    methods_table.summarise(records, ['ipo'], [0])


def test_a_run_that_diverged_is_told():
  failed = {'method': 'ipo', 'seed': 1, 'config': '', 'failed': 'step 3'}
  rows = methods_table.summarise(
    [_record('ipo'), failed, {**failed, 'method': 'kto'}],
    ['ipo', 'kto'],
    [0, 1],
  )
  text = methods_table.markdown(rows)
  assert 'ipo (1 of 2 seeds diverged) | 90.0' in text
  assert 'kto (1 of 1 seeds diverged) |  |' in text
  assert 'failed: step 3' in methods_table.say(failed)


def test_records_survive_a_stop(tmp_path):
  path = tmp_path / 'sub' / 'records.jsonl'
  assert methods_table.read(path) == []
  first, second = _record(), _record('ipo')
  methods_table.append(path, first)
  methods_table.append(path, second)
  assert methods_table.read(path) == [first, second]
  assert methods_table.read(path, method='ipo') == [second]
  with path.open('a') as file:
    file.write('{"method": "kt')
  assert methods_table.read(path) == [first, second]
  methods_table.append(path, first)
  assert methods_table.read(path) == [first, second, first]
  path.write_text('{"seed": 0}\n')
  with pytest.raises(ValueError, match=r'records\.jsonl, line 1: no record'):
    methods_table.read(path)


def test_what_is_missing():
  records = [_record('dpo', 0), _record('ipo', 1)]
  found = methods.missing(records, ['dpo', 'ipo'], [0, 1])
  assert found == [('ipo', 0), ('dpo', 1)]
  records[0]['config'] = 'another'
  with pytest.raises(ValueError, match='record of dpo, seed 0, is of another'):
    methods.missing(records, ['dpo'], [0])


def test_only_what_is_missing_is_run(tmp_path, monkeypatch, capsys):
  ran = []

  def run_one(measure, method, seed, folder):
    ran.append((method, seed, folder.name))
    return _record(method, seed)

  monkeypatch.setattr(methods, 'Measure', lambda: None)
  monkeypatch.setattr(methods, 'run_one', run_one)
  monkeypatch.setattr(methods, 'peak_bytes', lambda config: 2**20)
  monkeypatch.setattr(methods.compile_cache, 'start', lambda *a, **k: None)
  words = [f'--workdir={tmp_path}', '--methods=dpo,base']
  assert methods.main([*words, '--seeds=0']) == 0
  assert methods.main([*words, '--seeds=0,1']) == 0
  names = [(m, s, f'{m}-{s}') for s in (0, 1) for m in ('dpo', 'base')]
  assert ran == names
  text = capsys.readouterr().out
  assert '1/2 dpo, seed 1: style_share 0.9' in text and 'left' in text
  records = methods_table.read(tmp_path / 'records.jsonl')
  # The plan of a step is the same for all seeds, and the base has none.
  assert ['peak_bytes' in record for record in records] == [1, 0, 0, 0]
  picture = tmp_path / 'docs' / 'methods.png'
  assert methods.main([*words, '--table', f'--plot={picture}']) == 0
  assert len(ran) == 4 and picture.stat().st_size > 5000
  assert '| dpo | 90.0 [' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--methods=dpo,dpx'], 'no such dpx; allowed are base, dpo, sft'),
    (['--seeds=a'], '--seeds=a: must be whole numbers'),
    (['--table'], 'no finished run'),
  ],
)
def test_bad_input_is_one_line(words, message, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(methods, 'run_missing', lambda *arguments: None)
  assert methods.main([f'--workdir={tmp_path}', *words]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and message in line


def test_step_time_leaves_the_first_window_out():
  rates = [0.1, 2.0, 4.0, 5.0]
  lines = [json.dumps({'time/steps_per_second': rate}) for rate in rates]
  lines.insert(2, json.dumps({'eval/pairs/loss': 1.0}))
  assert methods.step_seconds(lines) == 0.25
