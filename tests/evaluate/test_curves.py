import json
import math
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from dpo_jax.evaluate import charts, curves


def _write(path, *lines):
  path.write_text('\n'.join(lines), encoding='utf-8')
  return path


def _numbers(svg, kind):
  return [
    np.array([list(map(float, p.split(','))) for p in points.split()])
    for points in re.findall(rf'class="{kind} [^"]*" points="([^"]*)"', svg)
  ]


def _bars(svg):
  """(top, height) of every bar."""
  found = re.findall(r'class="bar".*? y="([\d.]+)".*?height="([\d.]+)"', svg)
  return [tuple(map(float, pair)) for pair in found]


def test_reads_rows_by_step(tmp_path):
  path = _write(
    tmp_path / 'm.jsonl',
    '{"step": 2, "loss": 0.5, "note": "text", "flag": true}',
    '',
    '{"step": 1, "loss": 0.6}',
  )
  metrics = curves.read_metrics(path)
  assert metrics.rows == [{'step': 1, 'loss': 0.6}, {'step': 2, 'loss': 0.5}]
  assert metrics.damaged == 0


@pytest.mark.parametrize(
  'line',
  [
    '{"step": 3, "lo',
    '[1, 2]',
    '{"loss": 1.0}',
    '{"step": "3"}',
    '{"step": true}',
    '{"step": NaN}',
    '\x00\x00\ufffd',
    '[' * 100_000,
  ],
)
def test_damaged_lines_are_counted(tmp_path, line):
  path = _write(tmp_path / 'm.jsonl', '{"step": 1, "loss": 2.0}', line)
  metrics = curves.read_metrics(path)
  assert metrics.damaged == 1
  assert metrics.rows == [{'step': 1, 'loss': 2.0}]


def test_bytes_that_are_no_text_are_one_damaged_line(tmp_path):
  path = tmp_path / 'm.jsonl'
  path.write_bytes(b'{"step": 1}\n\xff\xfe{"step"')
  assert curves.read_metrics(path) == ([{'step': 1}], 1)


def test_a_step_logged_again_after_a_restart_counts_once(tmp_path):
  path = _write(
    tmp_path / 'm.jsonl',
    '{"step": 5, "loss": 1.0, "eval/x": 3.0}',
    '{"step": 6, "loss": 2.0}',
    '{"step": 5, "loss": 1.5}',
  )
  assert curves.read_metrics(path).rows == [
    {'step': 5, 'loss': 1.5, 'eval/x': 3.0},
    {'step': 6, 'loss': 2.0},
  ]


def test_charts_follow_the_keys_that_exist():
  assert curves.make_charts([]) == []
  assert curves.make_charts([{'step': 0, 'other': 1.0}]) == []
  sft = curves.make_charts([{'step': i, 'loss': 1.0} for i in range(3)])
  assert [c.title for c in sft] == ['Loss']
  assert 'ln 2' not in sft[0].svg
  rows = [
    {'step': i, 'loss': 0.7, 'reward/margin': 0.1, 'err/ref_win': 0.3}
    for i in range(3)
  ]
  drawn = {c.title: c for c in curves.make_charts(rows)}
  assert 'ln 2' in drawn['Loss'].svg
  assert drawn['Error on winners'].legend == ['reference']


@pytest.mark.parametrize('key', ['lr', 'optim/lr', 'learning_rate'])
def test_the_learning_rate_by_any_of_its_names(key):
  [chart] = curves.make_charts([{'step': i, key: i * 1e-5} for i in range(9)])
  assert chart.title == 'Learning rate'
  # Drawn as it is: a straight warmup stays straight to its ends.
  [raw], [mean] = _numbers(chart.svg, 'raw'), _numbers(chart.svg, 'mean')
  np.testing.assert_array_equal(raw, mean)


def test_bins_average_the_recent_finite_values():
  rows = [{'step': i, 'reward/accuracy_t0': 0.0} for i in range(75)]
  rows += [{'step': 75 + i, 'reward/accuracy_t0': 0.8} for i in range(25)]
  rows[80]['reward/accuracy_t0'] = math.nan
  rows[90]['reward/accuracy_t9'] = 0.25
  [chart] = curves.timestep_charts(rows)
  found = re.findall(r'<title>(t\d+): ([\d.]+)</title>', chart.svg)
  assert found == [('t0', '0.8'), ('t9', '0.25')]
  assert '25 logged steps' in chart.note
  assert curves.timestep_charts([]) == []


def test_bin_charts_have_ten_slots_and_margins_may_be_negative():
  rows = [{'step': 0, 'reward/margin_t3': -2.0, 'reward/margin_t4': 1.0}]
  [chart] = curves.timestep_charts(rows)
  assert [f't{i}' in chart.svg for i in range(11)] == [True] * 10 + [False]
  (low_top, low), (high_top, high) = _bars(chart.svg)
  assert low / high == pytest.approx(2.0, rel=0.02)
  # One hangs from the zero line on which the other stands.
  assert low_top == pytest.approx(high_top + high, abs=0.2)


def test_bars_stand_on_zero():
  (_, low), (_, high) = _bars(charts.bar_chart(['a', 'b'], [5.0, 6.0]))
  assert low / high == pytest.approx(5 / 6, rel=0.01)


def test_lines_are_placed_to_scale():
  svg = charts.line_chart([charts.Series('a', [0, 10, 20], [0.0, 4.0, 2.0])])
  [raw] = _numbers(svg, 'raw')
  assert raw[0, 0] == charts.LEFT
  assert raw[-1, 0] == charts.WIDTH - charts.RIGHT
  assert raw[1, 0] == pytest.approx(raw[[0, 2], 0].mean(), abs=0.1)
  rise = raw[0, 1] - raw[:, 1]
  np.testing.assert_allclose(rise / rise[1], [0, 1, 0.5], atol=2e-3)


def test_the_average_starts_at_the_first_value_and_keeps_a_line():
  y = np.linspace(3.0, 9.0, 100)
  smooth = charts._moving_average(y, 5)
  np.testing.assert_allclose(smooth[:95], y[:95])
  noise = np.random.default_rng(0).normal(size=400)
  smooth = charts._moving_average(noise, 20)
  assert smooth[0] == noise[0]
  assert np.std(smooth[20:]) < 0.35
  assert smooth[200] == pytest.approx(noise[180:221].mean())
  assert smooth[-1] == pytest.approx(noise[-21:].mean())


def test_long_runs_are_thinned_by_means():
  x = np.arange(100_000.0)
  svg = charts.line_chart([charts.Series('a', x, x % 2)])
  [raw] = _numbers(svg, 'raw')
  assert len(raw) == charts.MAX_POINTS
  assert np.ptp(raw[:, 1]) <= 0.1  # every point is a mean of 0 and 1


@pytest.mark.parametrize(
  'values', [[1.0], [2.0] * 5, [0.0, 0.0], [1e-12, 2e-12], [1e9, -1e9]]
)
def test_any_range_draws_valid_svg_with_ticks(values):
  for svg in (
    charts.line_chart([charts.Series('a', range(len(values)), values)]),
    charts.bar_chart([str(i) for i in range(len(values))], values),
  ):
    xml.etree.ElementTree.fromstring(svg)
    assert svg.count('class="grid"') >= 2
    assert 'nan' not in svg and 'inf' not in svg


def test_values_that_are_not_finite_leave_no_mark():
  y = [1.0, math.nan, 3.0, math.inf]
  svg = charts.line_chart([charts.Series('a', range(4), y)])
  assert len(_numbers(svg, 'raw')[0]) == 2
  with pytest.raises(ValueError, match='no finite value'):
    charts.line_chart([charts.Series('a', [0], [math.nan])])
  assert charts.bar_chart(['a', 'b'], [1.0, math.nan]).count('<rect') == 1
  with pytest.raises(ValueError, match='2 labels for 1'):
    charts.bar_chart(['a', 'b'], [1.0])
  rows = [{'step': 0, 'loss': math.nan}]
  assert curves.make_charts(json.loads(json.dumps(rows))) == []


def test_labels_are_escaped():
  svg = charts.line_chart(
    [charts.Series('<b>', [0, 1], [0, 1])],
    reference=(0.5, '<script>'),
    x_label='a & b',
  )
  svg += charts.bar_chart(['</text>'], [1.0])
  assert '<b>' not in svg and '<script>' not in svg and '&amp;' in svg
  assert svg.count('</text>') == svg.count('<text')
