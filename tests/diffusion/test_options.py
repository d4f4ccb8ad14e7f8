"""scheduler_config.json: released files, defaults of classes, bad values."""

import inspect
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.diffusion import options, samplers, schedule

_SD = {
  'beta_end': 0.012,
  'beta_schedule': 'scaled_linear',
  'beta_start': 0.00085,
  'clip_sample': False,
  'num_train_timesteps': 1000,
  'set_alpha_to_one': False,
  'skip_prk_steps': True,
  'steps_offset': 1,
  'trained_betas': None,
}
_SDXL = _SD | {
  'interpolation_type': 'linear',
  'prediction_type': 'epsilon',
  'sample_max_value': 1.0,
}
# scheduler/scheduler_config.json of the released models, as published.
RELEASED = {
  'sd14': _SD
  | {'_class_name': 'PNDMScheduler', '_diffusers_version': '0.7.0.dev0'},
  'sd15': _SD | {'_class_name': 'PNDMScheduler', '_diffusers_version': '0.6.0'},
  'sd2_base': _SD
  | {
    '_class_name': 'PNDMScheduler',
    '_diffusers_version': '0.10.0.dev0',
    'prediction_type': 'epsilon',
  },
  'sd21': _SD
  | {
    '_class_name': 'DDIMScheduler',
    '_diffusers_version': '0.8.0',
    'prediction_type': 'v_prediction',
  },
  'sdxl_base': _SDXL
  | {
    '_class_name': 'EulerDiscreteScheduler',
    '_diffusers_version': '0.19.0.dev0',
    'timestep_spacing': 'leading',
    'use_karras_sigmas': False,
  },
  'sdxl_refiner': _SDXL
  | {
    '_class_name': 'EulerDiscreteScheduler',
    '_diffusers_version': '0.19.0.dev0',
    'timestep_spacing': 'leading',
    'use_karras_sigmas': False,
  },
  'sdxl_turbo': _SDXL
  | {
    '_class_name': 'EulerAncestralDiscreteScheduler',
    '_diffusers_version': '0.24.0.dev0',
    'timestep_spacing': 'trailing',
  },
}
OWN_SAMPLERS = {
  'sd14': None,
  'sd15': None,
  'sd2_base': None,
  'sd21': 'ddim',
  'sdxl_base': 'euler',
  'sdxl_refiner': 'euler',
  'sdxl_turbo': 'euler_ancestral',
}


@pytest.mark.parametrize('name', RELEASED)
def test_released_files_load_for_every_sampler(name):
  config = RELEASED[name]
  training = schedule.from_config(config)
  assert training.num_steps == 1000
  # Rombach et al.'s schedule ends at a signal-to-noise ratio of 0.0047.
  assert training.alphas_cumprod[-1] == pytest.approx(0.00466, abs=1e-5)
  own = samplers.from_scheduler_class(config['_class_name'])
  assert own == OWN_SAMPLERS[name]
  for sampler in samplers.SAMPLERS:
    plan = samplers.make_plan(config, 4, sampler=sampler)
    assert plan.num_steps == 4
    assert plan.clip_range is None
    assert plan.prediction_type == training.prediction_type


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
@pytest.mark.parametrize('name', RELEASED)
def test_released_files_are_read_as_diffusers_reads_them(name, sampler):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  class_name = options.SAMPLER_CLASSES[sampler]
  theirs = getattr(diffusers, class_name).from_config(RELEASED[name])
  read = options.read(RELEASED[name], sampler=sampler)
  for key in options.FOLLOWED[sampler]:
    if key in theirs.config:
      assert getattr(read, key) == theirs.config[key], key
  theirs.set_timesteps(4)
  plan = samplers.make_plan(RELEASED[name], 4, sampler=sampler)
  np.testing.assert_allclose(plan.rows.t, theirs.timesteps.numpy(), rtol=1e-6)
  start = plan.from_noise(jnp.ones((1, 1, 1, 1)))
  wanted = torch.ones(()) * theirs.init_noise_sigma
  assert float(start[0, 0, 0, 0]) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_defaults_are_those_of_the_class(sampler):
  pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  theirs = getattr(diffusers, options.SAMPLER_CLASSES[sampler])
  defaults = {
    name: parameter.default
    for name, parameter in inspect.signature(theirs).parameters.items()
  }
  read = options.read({}, sampler=sampler)
  for key in options.FOLLOWED[sampler]:
    # Without them in the file the classes take the ends of the schedule.
    assert getattr(read, key) == defaults.get(key), key
  for key, allowed in options.FIXED[sampler].items():
    assert defaults[key] in allowed, key
  # Nothing that changes the class's result is left out.
  rest = set(defaults) - set(options.FOLLOWED[sampler])
  rest -= set(options.FIXED[sampler]) | set(options.FIXED[None])
  assert rest <= set(options.HARMLESS)


def test_options_of_every_readable_class_are_known():
  pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  for name in (*options.SAMPLER_CLASSES.values(), *options.OTHER_CLASSES):
    theirs = getattr(diffusers, name)
    config = json.loads(theirs().to_json_string())
    # What is fixed is another test's.
    for key in {key for fixed in options.FIXED.values() for key in fixed}:
      config.pop(key, None)
    assert schedule.from_config(config).num_steps == 1000


def test_scheduler_classes_map_to_samplers():
  for sampler, name in options.SAMPLER_CLASSES.items():
    assert samplers.from_scheduler_class(name) == sampler
  for name in options.OTHER_CLASSES:
    assert samplers.from_scheduler_class(name) is None


def test_options_of_other_classes_are_dropped_as_diffusers_does():
  config = RELEASED['sdxl_base'] | {
    'clip_sample': True,
    'use_karras_sigmas': True,
    'timestep_spacing': 'leading',
  }
  euler = samplers.make_plan(config, 5, sampler='euler')
  assert euler.clip_range is None
  assert not np.allclose(euler.rows.t, np.round(euler.rows.t))
  ddim = samplers.make_plan(config, 5, sampler='ddim')
  assert ddim.clip_range == 1.0
  np.testing.assert_array_equal(ddim.rows.t, [801, 601, 401, 201, 1])


@pytest.mark.parametrize(
  ('change', 'sampler', 'words'),
  [
    ({'beta_schedule': 'sigmoid'}, None, "beta_schedule='sigmoid'"),
    ({'beta_end': 2.0}, None, 'beta_end=2.0'),
    ({'beta_start': '0.1'}, None, "beta_start='0.1'"),
    ({'num_train_timesteps': 0}, None, 'num_train_timesteps=0'),
    ({'prediction_type': 'flow_prediction'}, None, 'prediction_type='),
    ({'prediction_type': 'sample'}, 'euler_ancestral', 'prediction_type='),
    ({'trained_betas': [0.1]}, None, "trained_betas='<1 entries>'"),
    ({'trained_betas': 0.1}, None, 'trained_betas=0.1'),
    ({'rescale_betas_zero_snr': 'yes'}, None, 'rescale_betas_zero_snr='),
    ({'timestep_type': 'continuous'}, None, "timestep_type='continuous'"),
    ({'timestep_type': 'continuous'}, 'euler', "timestep_type='continuous'"),
    ({'timestep_spacing': 'karras'}, 'ddim', "timestep_spacing='karras'"),
    ({'steps_offset': -1}, 'ddim', 'steps_offset=-1'),
    ({'clip_sample_range': 0}, 'ddim', 'clip_sample_range=0'),
    ({'thresholding': True}, 'ddim', 'thresholding=True'),
    ({'thresholding': True}, 'ddpm', 'thresholding=True'),
    ({'thresholding': True}, 'dpmpp_2m', 'thresholding=True'),
    ({'variance_type': 'learned'}, 'ddpm', "variance_type='learned'"),
    ({'variance_type': 'learned'}, 'dpmpp_2m', "variance_type='learned'"),
    ({'interpolation_type': 'cubic'}, 'euler', "interpolation_type='cubic'"),
    ({'final_sigmas_type': 'one'}, 'euler', "final_sigmas_type='one'"),
    ({'use_beta_sigmas': True}, 'euler', 'use_beta_sigmas=True'),
    ({'use_exponential_sigmas': True}, 'euler', 'use_exponential_sigmas'),
    ({'sigma_max': -1.0}, 'euler', 'sigma_max=-1.0'),
    ({'solver_order': 3}, 'dpmpp_2m', 'solver_order=3'),
    ({'solver_type': 'rk4'}, 'dpmpp_2m', "solver_type='rk4'"),
    ({'use_lu_lambdas': True}, 'dpmpp_2m', 'use_lu_lambdas=True'),
    ({'use_flow_sigmas': True}, 'dpmpp_2m', 'use_flow_sigmas=True'),
    ({'lambda_min_clipped': -5.1}, 'dpmpp_2m', 'lambda_min_clipped=-5.1'),
    (
      {'algorithm_type': 'sde-dpmsolver++'},
      'dpmpp_2m',
      "algorithm_type='sde-dpmsolver",
    ),
    ({'timestep_spacng': 'leading'}, 'ddim', "mean 'timestep_spacing'"),
    ({'shift': 3.0}, None, "unknown option 'shift'"),
    ({'_class_name': 'FlowMatchEulerDiscreteScheduler'}, None, '_class_name'),
    ({'_class_name': 'LCMScheduler'}, 'ddim', '_class_name'),
  ],
)
def test_unsupported_options_are_named(change, sampler, words):
  with pytest.raises(ValueError) as error:
    options.read(_SD | change, sampler=sampler)
  assert words in str(error.value)
  assert '\n' not in str(error.value)


def test_options_that_change_nothing_pass():
  config = _SD | {
    'lambda_min_clipped': -math.inf,
    'thresholding': True,
    'solver_order': 3,
    'variance_type': 'learned',
    '_use_default_values': ['timestep_spacing'],
  }
  # None of these is an option of the Euler class.
  options.read(config, sampler='euler')
  options.read(config, sampler=None)


def test_unknown_sampler_is_named():
  with pytest.raises(ValueError, match=r"'heun'.*ddim, ddpm, euler"):
    samplers.make_plan(_SD, 4, sampler='heun')
