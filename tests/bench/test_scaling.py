"""Scaling by hand, from plans of a small model made here, and its errors."""

import json
import os

import jax
import pytest

from benchmarks import scaling
from dpo_jax.tools import plan


def _record(*, data=1, fsdp=8, **changes):
  return {
    'model': 'sd15',
    'topology': f'v5e:{data}x{fsdp}',
    'n_devices': data * fsdp,
    'mesh': {'data': data, 'fsdp': fsdp},
    'pairs_per_step': data * fsdp,
    'flops_per_step': data * fsdp * 197 * 10**10,
    'bound_seconds': {'arithmetic': 0.012, 'memory': 0.005, 'links': 0.0},
    'collectives': {
      'all-gather': {'num_bytes': 800, 'wire_bytes': 700},
      'reduce-scatter': {'num_bytes': 1600, 'wire_bytes': 1400},
      'all-reduce': {'num_bytes': 80, 'wire_bytes': 140},
    },
  } | changes


def test_bytes_by_hand():
  base = _record()
  # 700, 7/8 of 1600, twice 7/8 of 80: as compiled.
  assert scaling.sent(base, 1) == 700 + 1400 + 140
  # Twice half of an eighth of 1600 more, and twice 15/16 of 80.
  assert scaling.sent(base, 2) == 700 + 1400 + 200 + 150
  within, beyond = scaling.scale(base, 256), scaling.scale(base, 1024)
  assert within.network_bytes == 0
  assert beyond.network_bytes == pytest.approx(1680 * 2 * 3 / 4 / 256)
  assert beyond.link_bytes == within.link_bytes
  assert (beyond.data, beyond.fsdp, beyond.pairs_per_step) == (128, 8, 1024)


def test_times_by_hand():
  base = _record(
    collectives={'all-gather': {'num_bytes': 0, 'wire_bytes': 4 * 10**9}}
  )
  row = scaling.scale(base, 64)
  # 4 GB at 200 GB/s; 1.97 TFLOP at 40% of 197 TFLOP/s.
  assert row.bounds['links'] == pytest.approx(0.02)
  assert row.usual_seconds == pytest.approx(0.025)
  assert row.pairs_per_second == pytest.approx(64 / 0.025)
  assert row.efficiency == pytest.approx(25 / 45)


def _write(path, record):
  path.write_text('a table\n' + json.dumps(record))
  return str(path)


@pytest.mark.parametrize(
  ('records', 'message'),
  [
    ([_record(data=2)], 'no plan with mesh.data=1'),
    ([_record(), _record(data=2, fsdp=4)], 'mesh.fsdp is 4, of v5e:1x8 it'),
    ([_record(), _record(data=2, pairs_per_step=8)], 'pairs a chip is 0.5'),
    ([_record(collectives=None)], 'a plan that fits'),
  ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path, records, message, capsys):
  paths = [
    _write(tmp_path / f'{i}.json', record) for i, record in enumerate(records)
  ]
  assert scaling.main(paths) == 2
  assert message in capsys.readouterr().err


def test_a_file_that_is_no_plan(tmp_path, capsys):
  assert scaling.main([_write(tmp_path / 'a.json', 3)]) == 2
  assert scaling.main([str(tmp_path / 'none.json')]) == 2
  assert 'not the output of tools.plan' in capsys.readouterr().err


def test_from_plans_compiled_here(bare_folder, tmp_path, capsys, monkeypatch):
  """The compiler's bytes on twice the devices are what the formula says."""
  # The tool sets the number of devices of a process that has none yet.
  assert len(jax.devices()) == 8
  monkeypatch.setenv('XLA_FLAGS', os.environ.get('XLA_FLAGS', ''))
  paths = []
  for count in (2, 4):
    words = [
      '--config=configs/quickstart.py',
      f'--topology=cpu:{count}',
      '--json',
      '--cached=true',
      f'--config.model.folder={bare_folder}',
      f'--config.train.batch_size={count}',
      '--config.mesh.fsdp=2',
    ]
    assert plan.run(words) == 0
    paths.append(tmp_path / f'{count}.json')
    paths[-1].write_text(capsys.readouterr().out)
  picture = tmp_path / 'docs' / 'scaling.png'
  status = scaling.main(
    [*map(str, paths), f'--json={tmp_path / "all"}', f'--plot={picture}']
  )
  assert status == 0
  assert '| 1024 | 512 x 2 | 1024 |' in capsys.readouterr().out
  (found,) = json.loads((tmp_path / 'all').read_text())
  assert [row['chips'] for row in found['rows']][-1] == 1024
  same, double = found['compared']
  assert same['ratio'] == pytest.approx(1, rel=1e-3)
  assert double['ratio'] == pytest.approx(1, rel=0.1)
  assert picture.stat().st_size > 5000
