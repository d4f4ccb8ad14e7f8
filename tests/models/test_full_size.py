"""The released models at their full size, by shapes alone, without memory."""

import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import released

from dpo_jax import trees
from dpo_jax.models import unet
from dpo_jax.weights import diffusers_maps, mapping

# Parameters.
COUNTS = {
  # DESIGN.md and the published models.
  ('unet', 'sd14'): 859_520_964,
  ('unet', 'sd15'): 859_520_964,
  ('unet', 'sdxl'): 2_567_463_684,
  ('unet', 'sdxl_turbo'): 2_567_463_684,
  ('vae', 'sd15'): 83_653_863,
  ('vae', 'sdxl_fp16_fix'): 83_653_863,
  ('text_encoder', 'sd15'): 123_060_480,
  ('text_encoder_2', 'sdxl'): 694_659_840,
  # Counted by PyTorch diffusers 0.42.1 and transformers 5.23.
  ('unet', 'sd2_base'): 865_910_724,
  ('unet', 'sd21'): 865_910_724,
  ('unet', 'sdxl_refiner'): 2_259_526_660,
  ('text_encoder', 'sd21'): 340_387_840,
}
# Tensors in the published files (issue 3).
TENSORS = {('unet', 'sd15'): 686, ('unet', 'sdxl'): 1680}
ALL = [
  (component, release)
  for component, releases in released.COMPONENTS.items()
  for release in releases
]


def _init_shapes(component, release):
  entry = diffusers_maps.COMPONENTS[component]
  config = entry.make_config(released.COMPONENTS[component][release])
  return entry.init_shapes(config)


def _torch_model(component, values):
  """The reference model on the device it is made for."""
  if component.startswith('text'):
    transformers = pytest.importorskip('transformers')
    config = transformers.CLIPTextConfig(**values)
    return getattr(
      transformers, diffusers_maps.COMPONENTS[component].class_name
    )(config)
  diffusers = pytest.importorskip('diffusers')
  cls = getattr(diffusers, diffusers_maps.COMPONENTS[component].class_name)
  return cls.from_config(values)


@pytest.mark.parametrize('component, release', ALL)
def test_every_tensor_has_the_name_and_shape_of_pytorch(component, release):
  torch = pytest.importorskip('torch')
  values = released.COMPONENTS[component][release]
  with torch.device('meta'):
    reference = _torch_model(component, values).state_dict()
  rules = diffusers_maps.COMPONENTS[component].rules
  expected = {}
  for name, tensor in reference.items():
    for pattern, replacement in rules.renames:
      name = re.sub(pattern, replacement, name)
    expected[name] = tuple(tensor.shape)
  shapes = _init_shapes(component, release)
  found = mapping.file_shapes(shapes, rules)
  assert found == expected
  number = TENSORS.get((component, release), len(jax.tree.leaves(shapes)))
  assert len(found) == number == len(reference)


@pytest.mark.parametrize('component, release', COUNTS)
def test_number_of_parameters(component, release):
  shapes = _init_shapes(component, release)
  assert trees.count(shapes) == COUNTS[component, release]
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {
    jnp.dtype('float32')
  }


def _write_torch_unet(folder, inputs):
  """Writes a random SD 1.5 UNet and returns its output; no model is left."""
  torch = pytest.importorskip('torch')
  torch.manual_seed(0)
  reference = _torch_model('unet', released.UNET['sd15']).eval()
  with torch.no_grad():
    for parameter in reference.parameters():
      if parameter.ndim == 1:  # Norms begin at 1 and 0, which hides a swap.
        parameter.add_(0.2 * torch.randn_like(parameter))
    reference.save_pretrained(folder)
    x_t, t, embeds = map(torch.from_numpy, inputs)
    return reference(x_t.permute(0, 3, 1, 2), t, embeds).sample


# 64 x 64 latents are images of 512 x 512. 9.5 GB and 2 minutes on 2 cores.
@pytest.mark.slow
def test_full_size_sd15_unet_forward_equals_pytorch(tmp_path):
  rng = np.random.default_rng(0)
  inputs = (
    rng.standard_normal((1, 64, 64, 4), dtype=np.float32),
    np.array([501], np.int32),
    rng.standard_normal((1, 77, 768), dtype=np.float32),
  )
  expected = _write_torch_unet(tmp_path / 'unet', inputs)
  gc.collect()
  config, params = diffusers_maps.load_component('unet', tmp_path / 'unet')
  output = jax.jit(unet.UNet2DConditionModel(config).apply)(
    {'params': params}, *inputs
  )
  assert expected.abs().max() > 0.1
  difference = parity.error(output, expected)
  print(f'scale {expected.abs().max():.3g}, difference {difference:.2g} of it')
  parity.assert_equal(output, expected)
