"""Every sampler beside its diffusers class, stepping one small denoiser."""

import importlib
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.diffusion import options, samplers

SHAPE = (2, 4, 4, 3)
# The part of every released Stable Diffusion file that is about training.
CONFIG = {
  'beta_schedule': 'scaled_linear',
  'beta_start': 0.00085,
  'beta_end': 0.012,
  'clip_sample': False,
  'set_alpha_to_one': False,
  'steps_offset': 1,
}
KARRAS = {'use_karras_sigmas': True}
TO_SIGMA_MIN = {'final_sigmas_type': 'sigma_min'}
ZERO_SNR = {'rescale_betas_zero_snr': True}
V = {'prediction_type': 'v_prediction'}
SPACINGS = options.ALLOWED['timestep_spacing']


def _arrays(num_steps):
  rng = np.random.default_rng(0)
  eps, x_0 = rng.standard_normal((2, *SHAPE), dtype=np.float32)
  noises = rng.standard_normal((num_steps, *SHAPE), dtype=np.float32)
  weights = rng.standard_normal((3, 3), dtype=np.float32) * 0.3
  return eps, x_0, noises, weights


def _make_theirs(config, num_steps, *, sampler):
  diffusers = pytest.importorskip('diffusers')
  name = options.SAMPLER_CLASSES[sampler]
  scheduler = getattr(diffusers, name).from_config(config)
  scheduler.set_timesteps(num_steps)
  _begin(scheduler, 0)
  return scheduler


def _begin(scheduler, index):
  # As the pipelines do; DDIM and DDPM go by the timestep alone.
  if hasattr(scheduler, 'set_begin_index'):
    scheduler.set_begin_index(index)


def _step_theirs(scheduler, state, timesteps, weights, noises, **options):
  torch = pytest.importorskip('torch')
  draws = iter(noises)
  module = importlib.import_module(type(scheduler).__module__)
  with pytest.MonkeyPatch.context() as patch:
    if hasattr(module, 'randn_tensor'):
      patch.setattr(
        module, 'randn_tensor', lambda *_, **__: torch.tensor(next(draws))
      )
    for t in timesteps:
      x_t = scheduler.scale_model_input(state, t)
      output = torch.tanh(x_t @ torch.tensor(weights)) + t.float() / 1000
      state = scheduler.step(output, t, state, **options).prev_sample
  return state


def _step_ours(plan, state, weights, noises):
  def denoise(x_t, t):
    return jnp.tanh(x_t @ weights) + t[:, None, None, None] / 1000

  run = jax.jit(
    lambda state: samplers.sample(
      plan, denoise, state, noise_fn=lambda i: jnp.asarray(noises)[i]
    )
  )
  return run(state)


def _difference(ours, wanted):
  wanted = wanted.numpy()
  assert np.all(np.isfinite(wanted))
  return np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max()


def _assert_timesteps(plan, timesteps):
  # Karras timesteps follow from the logarithm of edm_sigmas, the lowest of
  # which is 1e-5 off in the float32 of diffusers.
  np.testing.assert_allclose(
    plan.rows.t, timesteps.numpy(), rtol=1e-5, atol=1e-3
  )


def _compare(sampler, changes, *, num_steps=10, eta=0.0):
  """Largest difference from noise to result, relative to the result."""
  torch = pytest.importorskip('torch')
  config = CONFIG | changes
  eps, _, noises, weights = _arrays(num_steps)
  theirs = _make_theirs(config, num_steps, sampler=sampler)
  plan = samplers.make_plan(config, num_steps, sampler=sampler, eta=eta)
  _assert_timesteps(plan, theirs.timesteps)
  state = plan.from_noise(jnp.asarray(eps))
  start = torch.tensor(eps) * theirs.init_noise_sigma
  np.testing.assert_allclose(state, start.numpy(), rtol=2e-5)
  wanted = _step_theirs(
    theirs,
    start,
    theirs.timesteps,
    weights,
    noises,
    **({'eta': eta} if eta else {}),
  )
  return _difference(_step_ours(plan, state, weights, noises), wanted)


@pytest.mark.parametrize('kind', options.ALLOWED['prediction_type'])
@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_equals_diffusers(sampler, spacing, kind):
  if sampler == 'euler_ancestral' and kind == 'sample':
    pytest.skip('the diffusers class does not have it')
  changes = {'timestep_spacing': spacing, 'prediction_type': kind}
  assert _compare(sampler, changes) < 2e-5


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_zero_terminal_snr_equals_diffusers(sampler, spacing, kind):
  if sampler in ('ddim', 'ddpm') and kind == 'epsilon':
    if spacing != 'leading':
      pytest.skip('refused: diffusers returns infinities')
  changes = {'timestep_spacing': spacing, 'prediction_type': kind} | ZERO_SNR
  # The state begins at edm_sigma 4096, of which float32 has 3 decimals.
  assert _compare(sampler, changes) < 2e-5


@pytest.mark.parametrize('num_steps', [1, 3, 20])
@pytest.mark.parametrize(
  'changes',
  [
    KARRAS,
    TO_SIGMA_MIN,
    KARRAS | TO_SIGMA_MIN,
    KARRAS | {'timestep_spacing': 'leading'},
    KARRAS | {'sigma_min': 0.1, 'sigma_max': 20.0},
  ],
)
@pytest.mark.parametrize('sampler', samplers.WITH_KARRAS)
def test_sigmas_equal_diffusers(sampler, changes, num_steps):
  assert _compare(sampler, changes, num_steps=num_steps) < 2e-5


@pytest.mark.parametrize('num_steps', [2, 14, 15])
@pytest.mark.parametrize(
  'changes',
  [
    {'solver_type': 'heun'},
    {'solver_type': 'bh2'},
    {'lower_order_final': False} | TO_SIGMA_MIN,
    {'euler_at_final': True} | TO_SIGMA_MIN,
    {'solver_type': 'heun'} | TO_SIGMA_MIN,
    {'variance_type': 'fixed_small'},
  ],
)
def test_dpm_solver_options_equal_diffusers(changes, num_steps):
  assert _compare('dpmpp_2m', changes, num_steps=num_steps) < 2e-5


@pytest.mark.parametrize(
  ('sampler', 'changes'),
  [
    ('euler', {'interpolation_type': 'log_linear'}),
    ('euler', {'interpolation_type': 'log_linear'} | KARRAS),
    ('euler', KARRAS | ZERO_SNR | V),
    ('dpmpp_2m', KARRAS | ZERO_SNR | V),
    ('ddim', {'clip_sample': True, 'clip_sample_range': 0.3}),
    ('ddim', {'set_alpha_to_one': True, 'steps_offset': 0}),
    ('ddpm', {'clip_sample': True}),
    ('ddpm', {'variance_type': 'fixed_small_log'}),
    ('ddpm', {'variance_type': 'fixed_large'}),
    ('ddpm', {'variance_type': 'fixed_large', 'steps_offset': 0}),
  ],
)
def test_options_of_one_sampler_equal_diffusers(sampler, changes):
  assert _compare(sampler, changes) < 2e-5


# At zero SNR and eta 1 diffusers takes the root of a rounding error, which on
# some processors is negative.
@pytest.mark.parametrize(
  ('eta', 'snr'),
  [(0.5, {}), (1.0, {}), (0.5, ZERO_SNR | V), (0.999, ZERO_SNR | V)],
)
@pytest.mark.parametrize('spacing', SPACINGS)
def test_ddim_with_eta_equals_diffusers(eta, spacing, snr):
  changes = {'timestep_spacing': spacing} | snr
  assert _compare('ddim', changes, eta=eta) < 2e-5


@pytest.mark.parametrize('spacing', SPACINGS)
def test_ddim_with_eta_of_one_at_zero_snr_is_the_limit(spacing):
  config = CONFIG | ZERO_SNR | V | {'timestep_spacing': spacing}
  eps, _, noises, weights = _arrays(10)
  found = []
  for eta in (1.0, 1.0 - 1e-9):
    plan = samplers.make_plan(config, 10, sampler='ddim', eta=eta)
    state = plan.from_noise(jnp.asarray(eps))
    found.append(np.asarray(_step_ours(plan, state, weights, noises)))
  one, below = found
  np.testing.assert_allclose(one, below, atol=2e-4 * np.abs(one).max())


@pytest.mark.parametrize(
  'changes',
  [
    {'beta_schedule': 'linear', 'beta_start': 1e-4, 'beta_end': 0.02},
    {'beta_schedule': 'squaredcos_cap_v2'},
    {'num_train_timesteps': 500},
    {
      'num_train_timesteps': 100,
      'trained_betas': np.linspace(0.001, 0.05, 100).tolist(),
    },
  ],
)
@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_other_betas_equal_diffusers(sampler, changes):
  # The cosine schedule's first edm_sigma rests on the last bits of a float32.
  changes = {'timestep_spacing': 'leading'} | changes
  assert _compare(sampler, changes) < 2e-5


def _cut_timesteps(theirs, num_steps, strength, start, end):
  """The steps of diffusers' SDXL pipelines, and the index of the first."""
  diffusers = pytest.importorskip('diffusers')
  pipeline = diffusers.StableDiffusionXLImg2ImgPipeline
  timesteps, _ = pipeline.get_timesteps(
    python_types.SimpleNamespace(scheduler=theirs),
    num_steps,
    strength,
    'cpu',
    denoising_start=start or None,
  )
  first = num_steps - len(timesteps)
  if end < 1:
    # The pipelines do this inside __call__.
    cutoff = round(1000 - end * 1000)
    timesteps = timesteps[: int((timesteps >= cutoff).sum())]
  return timesteps, first


@pytest.mark.parametrize(
  ('strength', 'start', 'end'),
  [
    (0.6, 0.0, 1.0),
    (0.29, 0.0, 1.0),
    (1.0, 0.0, 0.8),
    (1.0, 0.8, 1.0),
    (1.0, 0.4, 0.7),
    (0.7, 0.0, 0.8),
  ],
)
@pytest.mark.parametrize('changes', [{}, KARRAS])
@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_part_of_the_range_equals_the_pipelines(
  sampler, changes, strength, start, end
):
  torch = pytest.importorskip('torch')
  if changes and sampler not in samplers.WITH_KARRAS:
    pytest.skip('no Karras sigmas')
  config, num_steps = CONFIG | changes, 11
  eps, x_0, noises, weights = _arrays(num_steps)
  theirs = _make_theirs(config, num_steps, sampler=sampler)
  timesteps, first = _cut_timesteps(theirs, num_steps, strength, start, end)
  plan = samplers.make_plan(
    config, num_steps, sampler=sampler, strength=strength, start=start, end=end
  )
  _assert_timesteps(plan, timesteps)
  begin = theirs.add_noise(torch.tensor(x_0), torch.tensor(eps), timesteps[:1])
  state = plan.from_image(jnp.asarray(x_0), jnp.asarray(eps))
  np.testing.assert_allclose(state, begin.numpy(), rtol=1e-5, atol=1e-5)
  wanted = _step_theirs(theirs, begin, timesteps, weights, noises[first:])
  assert _difference(_step_ours(plan, state, weights, noises), wanted) < 2e-5


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_hand_over_from_base_to_refiner_equals_diffusers(sampler):
  torch = pytest.importorskip('torch')
  eps, _, noises, weights = _arrays(10)
  ours, theirs = None, torch.tensor(eps)
  for part, kwargs in enumerate([{'end': 0.8}, {'start': 0.8}]):
    scheduler = _make_theirs(CONFIG, 10, sampler=sampler)
    plan = samplers.make_plan(CONFIG, 10, sampler=sampler, **kwargs)
    bounds = {'strength': 1.0, 'start': 0.0, 'end': 1.0} | kwargs
    timesteps, first = _cut_timesteps(scheduler, 10, **bounds)
    if not part:
      ours = plan.from_noise(jnp.asarray(eps))
      theirs = theirs * scheduler.init_noise_sigma
    # Another network for the other part.
    net = weights * (1 - 0.5 * part)
    ours = _step_ours(plan, ours, net, noises)
    theirs = _step_theirs(scheduler, theirs, timesteps, net, noises[first:])
    assert _difference(ours, theirs) < 2e-5
