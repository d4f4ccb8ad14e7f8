import json

import numpy as np
import pytest

from dpo_jax.diffusion import options, schedule


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
  theirs = diffusers.DDPMScheduler.from_config(config)
  ours = schedule.from_config(config)
  # diffusers rescales in float32, we in float64.
  np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), atol=1e-5)
  np.testing.assert_allclose(
    ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), atol=2e-6
  )


def test_beta_schedules_are_those_the_options_allow():
  allowed = options.ALLOWED['beta_schedule']
  assert tuple(schedule.BETA_SCHEDULES) == allowed


def test_trained_betas_are_taken_as_they_are():
  betas = [0.1, 0.2, 0.5]
  made = schedule.from_config(
    _config(trained_betas=betas, num_train_timesteps=3)
  )
  np.testing.assert_allclose(made.betas, betas, rtol=1e-7)
  np.testing.assert_allclose(made.alphas_cumprod, [0.9, 0.72, 0.36], rtol=1e-6)


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
  assert made.alphas_cumprod[-1] == 0.0
  assert made.alphas_cumprod[0] == pytest.approx(
    plain.alphas_cumprod[0], abs=1e-6
  )


@pytest.mark.parametrize('sampler', list(options.SAMPLER_CLASSES))
def test_the_last_entry_of_a_sampler_is_its_class_s(sampler):
  pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  config = _config(rescale_betas_zero_snr=True)
  theirs = getattr(diffusers, options.SAMPLER_CLASSES[sampler])
  wanted = theirs.from_config(config).alphas_cumprod[-1]
  made = schedule.from_config(config, sampler=sampler)
  assert made.alphas_cumprod[-1] == float(wanted)


def test_add_noise_broadcasts_one_timestep_a_row():
  made = schedule.from_config(_config())
  x_0, eps = np.ones((2, 3, 3, 1)), np.full((2, 3, 3, 1), 2.0)
  x_t = made.add_noise(x_0, eps, np.array([0, 999]))
  for row, t in enumerate([0, 999]):
    signal = made.alphas_cumprod[t]
    wanted = np.sqrt(signal) + 2.0 * np.sqrt(1 - signal)
    np.testing.assert_allclose(x_t[row], wanted, rtol=1e-6)


def test_shipped_scheduler_config_is_read(request):
  path = request.config.rootpath / (
    'examples/emoji/architecture/scheduler/scheduler_config.json'
  )
  made = schedule.from_config(json.loads(path.read_text()))
  assert made.num_steps == 1000 and made.prediction_type == 'epsilon'
