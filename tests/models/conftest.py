import jax
import numpy as np
import pytest

from dpo_jax.weights import diffusers_maps


@pytest.fixture(scope='session')
def random_params():
  """(component name, config) -> parameters, all leaves random, none zero.

  The models' own init has zeros at the output, which hides errors.
  """

  def make(name, config):
    rng = np.random.default_rng(0)
    shapes = diffusers_maps.COMPONENTS[name].init_shapes(config)

    def draw(leaf):
      values = rng.standard_normal(leaf.shape, dtype=np.float32)
      fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1.0
      offset = 1.0 if len(leaf.shape) == 1 else 0.0
      return offset + 0.5 * values / np.float32(np.sqrt(fan_in))

    return jax.tree.map(draw, shapes)

  return make


@pytest.fixture
def from_torch(tmp_path):
  """(component name, PyTorch module) -> (config, parameters), through disk."""

  def convert(name, module):
    torch = pytest.importorskip('torch')
    with torch.no_grad():
      for parameter in module.parameters():
        if parameter.ndim == 1:  # Norms begin at 1 and 0, which hides a swap.
          parameter.add_(0.2 * torch.randn_like(parameter))
    module.save_pretrained(tmp_path / name)
    config, params = diffusers_maps.load_component(name, tmp_path / name)
    return config, params

  return convert
