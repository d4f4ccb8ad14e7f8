"""Whole pictures beside PyTorch diffusers, from the same start noise.

Every image agrees to 1/255 at 99.9% of the pixels, which is what rounding of
float32 networks leaves after ten steps.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import keys as keys_lib
from dpo_jax import loading, sharding
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.evaluate import generate
from dpo_jax.weights import pipeline

PROMPTS = ['red apple', 'a cat with a very long caption that says more']
SIZE = (32, 48)
CLASSES = {
  'ddim': 'DDIMScheduler',
  'ddpm': 'DDPMScheduler',
  'euler': 'EulerDiscreteScheduler',
  'euler_ancestral': 'EulerAncestralDiscreteScheduler',
  'dpmpp_2m': 'DPMSolverMultistepScheduler',
}


def _open(folder):
  return loading.open_model(
    str(folder),
    mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    dtype='float32',
  )


def _with_scheduler(folder, target, **changes):
  """A copy of the pipeline whose scheduler_config.json is changed."""
  copy = shutil.copytree(folder, target)
  path = copy / 'scheduler' / 'scheduler_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  return copy


@dataclasses.dataclass
class Ours:
  """Our pictures, and the noise that they came from."""

  opened: loading.Opened
  settings: generate.Settings
  refiner: loading.Opened | None = None

  def __post_init__(self):
    self.keys = jax.random.split(jax.random.key(5), len(PROMPTS))
    self.shape = self.opened.model.latent_shape(self.settings.size)
    self.noise = np.asarray(keys_lib.normal(self.keys, self.shape))

  def step_noise(self, i):
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return np.asarray(keys_lib.normal(fold(self.keys, i + 1), self.shape))

  def draw(self, *, negative=None, **extra):
    batch = {'keys': self.keys, **extra}
    params = dict(self.opened.params)
    for prefix, part in (('', self.opened), ('refiner_', self.refiner)):
      if part is not None:
        made = generate.prompt_batch(
          part.model, part.tokenizers.encode, PROMPTS, negative
        )
        batch |= {f'{prefix}{name}': array for name, array in made.items()}
    if self.refiner is not None:
      params['refiner'] = self.refiner.params
    sample_fn = generate.make_sample_fn(
      self.opened.model,
      self.settings,
      refiner=self.refiner and self.refiner.model,
    )
    return np.asarray(sample_fn(params, batch)).astype(int)


def _theirs(cls, folder, sampler, monkeypatch, ours, **changes):
  """A diffusers pipeline whose schedulers draw our noise."""
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  made = getattr(diffusers, cls).from_pretrained(folder)
  made.set_progress_bar_config(disable=True)
  made.scheduler = getattr(diffusers, CLASSES[sampler]).from_config(
    made.scheduler.config, **changes
  )
  calls = []

  def draw(shape, **unused):
    noise = ours.step_noise(len(calls))
    calls.append(shape)
    return torch.tensor(noise.transpose(0, 3, 1, 2))

  module = type(made.scheduler).__module__
  monkeypatch.setattr(f'{module}.randn_tensor', draw, raising=False)
  return made


def _latents(ours):
  torch = pytest.importorskip('torch')
  return torch.tensor(ours.noise.transpose(0, 3, 1, 2))


def _assert_same_pictures(ours, theirs):
  wanted = np.round(np.asarray(theirs) * 255).astype(int)
  assert ours.shape == wanted.shape
  assert ours.std() > 5, 'a flat picture would prove nothing'
  difference = np.abs(ours - wanted)
  assert (difference <= 1).mean() >= 0.999, np.bincount(difference.ravel())


def _settings(sampler, **changes):
  options = {'size': SIZE, 'num_steps': 10, 'guidance_scale': 3.0}
  return generate.Settings(**(options | changes), sampler=sampler)


@pytest.mark.parametrize('sampler', CLASSES)
@pytest.mark.parametrize('family', ['eps', 'v'])
def test_stable_diffusion_by_every_sampler(
  tiny_folder, tmp_path, monkeypatch, family, sampler
):
  """Stable Diffusion 1.x, and 2.x with v and a schedule ending in noise."""
  folder = tiny_folder
  if family == 'v':
    changes = {
      'prediction_type': 'v_prediction',
      'timestep_spacing': 'trailing',
    }
    if sampler != 'dpmpp_2m':
      changes['rescale_betas_zero_snr'] = True
    folder = _with_scheduler(tiny_folder, tmp_path / 'v', **changes)
  ours = Ours(_open(folder), _settings(sampler))
  theirs = _theirs(
    'StableDiffusionPipeline', folder, sampler, monkeypatch, ours
  )
  images = theirs(
    PROMPTS,
    latents=_latents(ours),
    num_inference_steps=10,
    guidance_scale=3.0,
    height=SIZE[0],
    width=SIZE[1],
    output_type='np',
  ).images
  _assert_same_pictures(ours.draw(), images)


@pytest.mark.parametrize('sampler', ['euler', 'dpmpp_2m'])
def test_karras_sigmas_and_guidance_rescale(tiny_folder, monkeypatch, sampler):
  settings = _settings(sampler, karras=True, guidance_rescale=0.7)
  ours = Ours(_open(tiny_folder), settings)
  theirs = _theirs(
    'StableDiffusionPipeline',
    tiny_folder,
    sampler,
    monkeypatch,
    ours,
    use_karras_sigmas=True,
  )
  images = theirs(
    PROMPTS,
    latents=_latents(ours),
    num_inference_steps=10,
    guidance_scale=3.0,
    guidance_rescale=0.7,
    height=SIZE[0],
    width=SIZE[1],
    output_type='np',
  ).images
  _assert_same_pictures(ours.draw(), images)


@pytest.mark.parametrize('negative', [None, ['a dog', 'blurry']])
def test_sdxl(tiny_xl_folder, monkeypatch, negative):
  """Zeros are the unconditional branch unless a negative prompt is given."""
  ours = Ours(_open(tiny_xl_folder), _settings('euler'))
  theirs = _theirs(
    'StableDiffusionXLPipeline', tiny_xl_folder, 'euler', monkeypatch, ours
  )
  images = theirs(
    PROMPTS,
    negative_prompt=negative,
    latents=_latents(ours),
    num_inference_steps=10,
    guidance_scale=3.0,
    height=SIZE[0],
    width=SIZE[1],
    output_type='np',
  ).images
  _assert_same_pictures(ours.draw(negative=negative), images)


@pytest.mark.parametrize('sampler', ['euler', 'ddim', 'dpmpp_2m'])
def test_sdxl_hands_over_to_the_refiner(
  tiny_xl_folder, tiny_refiner_folder, monkeypatch, sampler
):
  settings = _settings(sampler, refiner_start=0.6)
  ours = Ours(
    _open(tiny_xl_folder), settings, refiner=_open(tiny_refiner_folder)
  )
  base = _theirs(
    'StableDiffusionXLPipeline', tiny_xl_folder, sampler, monkeypatch, ours
  )
  refiner = _theirs(
    'StableDiffusionXLImg2ImgPipeline',
    tiny_refiner_folder,
    sampler,
    monkeypatch,
    ours,
  )
  # Ours decodes with the base's VAE; the released two share theirs.
  refiner.vae = base.vae
  shared = {'num_inference_steps': 10, 'guidance_scale': 3.0}
  latents = base(
    PROMPTS,
    latents=_latents(ours),
    denoising_end=0.6,
    height=SIZE[0],
    width=SIZE[1],
    output_type='latent',
    **shared,
  ).images
  images = refiner(
    PROMPTS, image=latents, denoising_start=0.6, output_type='np', **shared
  ).images
  _assert_same_pictures(ours.draw(), images)


def test_sdxl_turbo_in_four_steps(tiny_xl_folder, tmp_path, monkeypatch):
  folder = _with_scheduler(
    tiny_xl_folder,
    tmp_path / 'turbo',
    _class_name='EulerAncestralDiscreteScheduler',
    timestep_spacing='trailing',
  )
  settings = _settings('euler_ancestral', num_steps=4, guidance_scale=0.0)
  ours = Ours(_open(folder), settings)
  theirs = _theirs(
    'StableDiffusionXLPipeline', folder, 'euler_ancestral', monkeypatch, ours
  )
  images = theirs(
    PROMPTS,
    latents=_latents(ours),
    num_inference_steps=4,
    guidance_scale=0.0,
    height=SIZE[0],
    width=SIZE[1],
    output_type='np',
  ).images
  _assert_same_pictures(ours.draw(), images)


@pytest.mark.parametrize('sampler', ['ddim', 'euler'])
def test_editing_from_an_image(tiny_folder, monkeypatch, sampler):
  """SDEdit; the posterior's and the start's noise are given to diffusers."""
  torch = pytest.importorskip('torch')
  ours = Ours(_open(tiny_folder), _settings(sampler, strength=0.6))
  pixels = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
  theirs = _theirs(
    'StableDiffusionImg2ImgPipeline', tiny_folder, sampler, monkeypatch, ours
  )
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  noise = keys_lib.normal(fold(ours.keys, generate.POSTERIOR_FOLD), ours.shape)
  model = ours.opened.model
  x_0 = model.encode_images(
    ours.opened.params['vae'], sd_lib.to_float(jnp.asarray(pixels)), noise
  )
  # Four channels are taken for latents, already times the scaling factor.
  monkeypatch.setattr(
    'diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img'
    '.randn_tensor',
    lambda shape, **unused: _latents(ours),
  )
  images = theirs(
    PROMPTS,
    image=torch.tensor(np.asarray(x_0).transpose(0, 3, 1, 2)),
    strength=0.6,
    num_inference_steps=10,
    guidance_scale=3.0,
    output_type='np',
  ).images
  _assert_same_pictures(ours.draw(images=pixels), images)


def test_an_export_draws_the_same_picture_in_diffusers(
  tiny_xl_folder, tmp_path, monkeypatch
):
  opened = _open(tiny_xl_folder)
  changed = jax.tree.map(lambda leaf: leaf * 1.01, opened.params['unet'])
  out = tmp_path / 'export'
  pipeline.save(out, base=tiny_xl_folder, params={'unet': changed})
  opened.params['unet'] = changed
  ours = Ours(opened, _settings('ddim', num_steps=3))
  theirs = _theirs('StableDiffusionXLPipeline', out, 'ddim', monkeypatch, ours)
  images = theirs(
    PROMPTS,
    latents=_latents(ours),
    num_inference_steps=3,
    guidance_scale=3.0,
    height=SIZE[0],
    width=SIZE[1],
    output_type='np',
  ).images
  _assert_same_pictures(ours.draw(), images)


def test_bfloat16_compute_stays_near_float32(tiny_folder):
  parts = pipeline.load(tiny_folder)
  outputs = []
  for dtype in ('float32', 'bfloat16'):
    model = loading.make_model(parts, dtype=dtype)
    rng = np.random.default_rng(0)
    outputs.append(
      np.asarray(
        model.apply_unet(
          parts.params['unet'],
          rng.standard_normal((2, 4, 4, 4), np.float32),
          np.array([10, 900]),
          {'prompt_embeds': rng.standard_normal((2, 16, 16), np.float32)},
        ),
        np.float32,
      )
    )
  scale = outputs[0].std()
  assert np.abs(outputs[0] - outputs[1]).max() < 0.1 * scale
