"""The planned step is the run's: its options, its FLOPs, where it lies."""

import jax
import jax.numpy as jnp
import pytest

from configs import quickstart
from dpo_jax import from_config, loading
from dpo_jax.planning import shapes, step


@pytest.fixture
def config(bare_folder):
  config = quickstart.get_config()
  with config.unlocked():
    config.model.folder = str(bare_folder)
  config.train.batch_size = 4
  config.mesh.fsdp = 2
  return config


def _problem(config):
  model = shapes.read_model(config.model.folder)
  return step.make_problem(config, model, jax.devices()[:4], from_cache=True)


def test_work_done_twice_is_not_the_models(config):
  plain = step.count_flops(_problem(config))
  assert plain[0] == plain[1] > 0
  config.model.remat = 'full'
  config.model.ref_path = 'revalued'
  again = step.count_flops(_problem(config))
  assert again[0] == plain[0]
  # A third pass of six for its value, and nearly one for the backward pass.
  assert 1.2 * plain[0] < again[1] < 1.5 * plain[0]
  config.model.remat, config.model.ref_path = 'none', 'separate'
  config.train.sequential = True
  found = step.count_flops(_problem(config))
  assert found[0] == plain[0] < found[1]


def test_a_run_and_its_plan_have_one_model(config, monkeypatch):
  given = []

  def make_model(parts, **options):
    given.append(options)
    return original(parts, **options)

  original = loading.make_model
  monkeypatch.setattr(loading, 'make_model', make_model)
  config.model.dtype, config.model.residual_dtype = 'bfloat16', 'float32'
  config.noise.zero_terminal_snr = True
  _problem(config)
  options = from_config.model_options(config)
  assert given[0] == options | {'platform': 'cpu'}
  assert given[0]['residual_dtype'] == 'float32'


def test_shapes_lie_as_a_runs_state_does(config):
  config.model.param_dtype = 'bfloat16'
  problem = _problem(config)
  state, frozen, batch, _ = problem.arguments
  assert dict(problem.mesh.shape) == {'data': 2, 'fsdp': 2}
  kernel = state.params['unet']['conv_in']['kernel']
  assert kernel.dtype == jnp.bfloat16
  large = [leaf for leaf in jax.tree.leaves(state.params) if leaf.size >= 2**14]
  assert large and all('fsdp' in leaf.sharding.spec for leaf in large)
  halved = sum(2 * leaf.size // 2 for leaf in large)
  small = sum(
    2 * leaf.size for leaf in jax.tree.leaves(state.params) if leaf.size < 2**14
  )
  assert step.bytes_per_device(state.params) == halved + small
  # Four pairs on four devices, each with its own rows.
  assert batch['moments'].sharding.shard_shape(batch['moments'].shape)[0] == 1
  assert set(frozen) == {'ref'}


def test_what_has_no_plan_is_refused(config):
  config.task = 'classify'
  with pytest.raises(ValueError, match='task=classify: plans are for'):
    _problem(config)
  config.task = 'denoise'
  with pytest.raises(ValueError, match='latents are for task=preference'):
    _problem(config)
  config.task = 'preference'
  config.data.resolution = 33
  with pytest.raises(ValueError, match="multiple of the VAE's downscale"):
    _problem(config)
