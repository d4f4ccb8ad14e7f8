import json

import numpy as np
import pytest

from dpo_jax.diffusion import schedule


def _config(**changes):
  return {
    'beta_schedule': 'scaled_linear',
    'beta_start': 0.00085,
    'beta_end': 0.012,
    'num_train_timesteps': 1000,
    'clip_sample': False,
    'set_alpha_to_one': False,
    'steps_offset': 1,
  } | changes


@pytest.mark.parametrize('zero_snr', [False, True])
@pytest.mark.parametrize('name', list(schedule.BETA_SCHEDULES))
def test_tables_equal_diffusers(name, zero_snr):
  pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  config = _config(beta_schedule=name, rescale_betas_zero_snr=zero_snr)
  theirs = diffusers.DDIMScheduler.from_config(config)
  ours = schedule.from_config(config)
  # diffusers rescales in float32, we in float64.
  np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), atol=1e-5)
  np.testing.assert_allclose(
    ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), atol=2e-6
  )
  assert ours.final_alpha_cumprod == pytest.approx(
    float(theirs.final_alpha_cumprod), abs=1e-6
  )


@pytest.mark.parametrize('spacing', schedule.TIMESTEP_SPACINGS)
@pytest.mark.parametrize('steps', [1, 4, 25, 30, 999])
def test_timesteps_equal_diffusers(spacing, steps):
  pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  config = _config(timestep_spacing=spacing)
  theirs = diffusers.DDIMScheduler.from_config(config)
  theirs.set_timesteps(steps)
  ours = schedule.from_config(config).sampling_timesteps(steps)
  np.testing.assert_array_equal(ours, theirs.timesteps.numpy())


def test_alpha_and_sigma_are_on_the_unit_circle():
  made = schedule.from_config(_config())
  alpha_t, sigma_t = made.alpha_sigma(np.arange(1000))
  np.testing.assert_allclose(alpha_t**2 + sigma_t**2, 1.0, atol=1e-6)
  assert np.all(np.diff(made.alphas_cumprod) < 0)
  # Rombach et al.'s schedule ends at a signal-to-noise ratio of 0.0047.
  assert made.alphas_cumprod[-1] == pytest.approx(0.00466, abs=1e-5)


def test_zero_terminal_snr_keeps_the_first_and_ends_at_zero():
  plain = schedule.from_config(_config())
  made = schedule.from_config(_config(rescale_betas_zero_snr=True))
  assert made.alphas_cumprod[-1] == pytest.approx(0.0, abs=1e-12)
  assert made.alphas_cumprod[0] == pytest.approx(
    plain.alphas_cumprod[0], abs=1e-6
  )


def test_add_noise_broadcasts_one_timestep_a_row():
  made = schedule.from_config(_config())
  x_0, eps = np.ones((2, 3, 3, 1)), np.full((2, 3, 3, 1), 2.0)
  x_t = made.add_noise(x_0, eps, np.array([0, 999]))
  for row, t in enumerate([0, 999]):
    signal = made.alphas_cumprod[t]
    wanted = np.sqrt(signal) + 2.0 * np.sqrt(1 - signal)
    np.testing.assert_allclose(x_t[row], wanted, rtol=1e-6)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'beta_schedule': 'sigmoid'}, 'beta_schedule'),
    ({'prediction_type': 'sample'}, 'prediction_type'),
    ({'timestep_spacing': 'karras'}, 'timestep_spacing'),
    ({'trained_betas': [0.1]}, 'trained_betas'),
    ({'thresholding': True}, 'thresholding'),
  ],
)
def test_unsupported_options_are_named(change, words):
  with pytest.raises(ValueError, match=words):
    schedule.from_config(_config(**change))


@pytest.mark.parametrize('steps', [0, 1001])
def test_impossible_step_numbers_are_refused(steps):
  made = schedule.from_config(_config())
  with pytest.raises(ValueError, match=r'\[1, 1000\]'):
    made.sampling_timesteps(steps)


def test_shipped_scheduler_config_is_read(request):
  path = request.config.rootpath / (
    'examples/emoji/architecture/scheduler/scheduler_config.json'
  )
  made = schedule.from_config(json.loads(path.read_text()))
  assert made.num_steps == 1000 and made.clip_sample_range is None
