"""Topologies by name, bounds by hand, advice that follows from the plan."""

import dataclasses

import pytest

from configs import common
from dpo_jax.planning import chips, estimate, hlo
from dpo_jax.planning import step as step_lib

GB = 10**9


def _plan(*, peak, activations=0, fsdp=1, kind='v5e:2x2', **options):
  compiled = step_lib.Compiled(
    peak=peak,
    argument=4 * GB,
    temporary=activations,
    accessed=None,
    collectives={'all-gather': hlo.Kind(2, 4 * GB, 2 * GB, GB)},
    seconds=1.0,
  )
  topology = chips.parse_topology(kind)
  sizes = dict.fromkeys(('parameters', 'optimizer', 'ema', 'frozen'), GB)
  return estimate.Plan(
    topology=topology,
    num_devices=topology.num_chips,
    mesh={'data': topology.num_chips // fsdp, 'fsdp': fsdp},
    pairs_per_step=16,
    num_steps=1000,
    bytes_per_device=sizes | {'activations': activations, 'peak': peak},
    flops=4 * 197 * 10**12,
    hardware_flops=5 * 197 * 10**12,
    compiled=compiled,
    bounds=estimate._bounds(
      topology.chip, compiled, 5 / 4 * 197e12, accumulate=2, crosses=False
    ),
    **options,
  )


def test_topologies_by_name():
  found = chips.parse_topology('v5p:4x4x8')
  assert (found.kind, found.layout, found.num_chips) == ('v5p', (4, 4, 8), 128)
  assert chips.parse_topology('h100:8').num_chips == 8


def test_bounds_by_hand():
  plan = _plan(peak=GB)
  assert plan.bounds == {
    'arithmetic': pytest.approx(1.25),
    'memory': pytest.approx(2 * 4 / 819),
    'links': pytest.approx(2 / 200),
  }
  assert plan.step_seconds == pytest.approx(1.25)
  # One second of the model's arithmetic a chip, at 40% of the peak.
  assert plan.usual_seconds == pytest.approx(2.5)
  record = plan.to_json()
  assert record['usual_days'] == pytest.approx(2500 / 86400)
  assert record['usual_chip_hours'] == pytest.approx(4 * 2500 / 3600)
  assert record['collectives']['all-gather']['largest'] == GB


def test_a_step_takes_no_less_than_its_longest_bound():
  plan = _plan(peak=GB)
  slow = dataclasses.replace(plan, bounds=plan.bounds | {'links': 3.0})
  assert slow.usual_seconds == slow.step_seconds == 3.0


def test_slices_talk_over_the_slower_network():
  plan = _plan(peak=GB)
  slow = estimate._bounds(
    plan.topology.chip, plan.compiled, 1.0, accumulate=1, crosses=True
  )
  assert slow['links'] > 10 * plan.bounds['links']


def test_an_unknown_chip_has_no_time():
  plan = _plan(peak=GB, kind='cpu:4')
  assert plan.fits and plan.step_seconds is None
  assert plan.to_json()['usual_chip_hours'] is None
  assert 'roofline' not in estimate.describe(plan, [])


def _advise(config, **options):
  plan = _plan(**options)
  return estimate.advice(plan, config, from_cache=False)


def test_advice_only_where_it_does_not_fit():
  config = common.get_config()
  assert _advise(config, peak=15 * GB) == []
  found = '\n'.join(_advise(config, peak=18 * GB, activations=14 * GB))
  words = ('remat=full', 'accumulate=512', 'fsdp=4', 'adafactor', 'sequential')
  for word in (*words, 'dtype=bfloat16', '--cached=true'):
    assert word in found
  config.model.remat, config.optim.name = 'full', 'adafactor'
  config.train.accumulate = 512
  found = '\n'.join(_advise(config, peak=18 * GB, activations=14 * GB, fsdp=4))
  for word in ('remat', 'accumulate', 'fsdp', 'adafactor', 'ema'):
    assert word not in found
  assert 'more chips' in found
  assert _advise(config, peak=18 * GB, activations=GB // 2)[0].startswith(
    '--config.model.dtype=bfloat16'
  )
  assert 'sequential' not in '\n'.join(_advise(config, peak=18 * GB))


def test_advice_keeps_weights_within_a_slice():
  config = common.get_config()
  config.mesh.dcn_data = 2
  assert '--config.mesh.fsdp=2:' in '\n'.join(_advise(config, peak=18 * GB))


def test_the_table_says_what_the_plan_does():
  plan = _plan(peak=18 * GB, activations=14 * GB)
  text = estimate.describe(plan, ['do this'])
  assert 'It does not fit' in text and 'do this' in text
  assert '16.764 GiB of 15.750 GiB' in text
  assert '2 of 4000 MB in all, largest 1000 MB; 2000 MB sent' in text
  smaller = dataclasses.replace(
    plan, bytes_per_device=plan.bytes_per_device | {'peak': GB}
  )
  assert 'does not fit' not in estimate.describe(smaller, [])
