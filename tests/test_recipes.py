"""Every variant of every recipe can be run, and is what it says."""

import importlib

import pytest

from configs import (
  censoring,
  common,
  emoji_sweep,
  methods,
  mnist,
  quickstart,
  reward,
  sd15,
  sdxl,
)
from dpo_jax import limits, reward_limits
from dpo_jax.objectives import linear, registry

VARIANTS = {
  'censoring': tuple(censoring.VARIANTS),
  'emoji_base': ('vae', 'unet'),
  'emoji_judge': ('all', 'holdout'),
  'emoji_sweep': emoji_sweep.VARIANTS,
  'emoji_rounds': ('dpo', 'sft'),
  'mnist': mnist.VARIANTS,
  'quickstart': ('dpo', 'sft'),
  'reward': reward.VARIANTS,
  'sd15': sd15.VARIANTS,
  'sd21': sd15.VARIANTS,
  'sdxl': sdxl.VARIANTS,
  'sdxl_turbo': ('official_code', 'paper'),
}
EVERY = [
  (recipe, variant) for recipe, names in VARIANTS.items() for variant in names
]


def _get(recipe, variant):
  return importlib.import_module(f'configs.{recipe}').get_config(variant)


@pytest.fixture(autouse=True)
def at_root(request, monkeypatch):
  monkeypatch.chdir(request.config.rootpath)


def test_all_recipes_are_here(request):
  files = (request.config.rootpath / 'configs').glob('*.py')
  recipes = {path.stem for path in files} - {'common', 'methods'}
  assert recipes == VARIANTS.keys()


@pytest.mark.parametrize(('recipe', 'variant'), EVERY)
def test_a_variant_is_valid(recipe, variant, tmp_path):
  c = _get(recipe, variant)
  assert c.is_locked
  with c.unlocked():
    # What the command line gives, or an earlier stage makes.
    c.model.folder = str(tmp_path)
    c.data.path = c.data.path or str(tmp_path)
  limits.validate(c)


@pytest.mark.parametrize('recipe', VARIANTS)
def test_the_default_is_a_variant(recipe):
  made = importlib.import_module(f'configs.{recipe}').get_config()
  assert any(
    made.to_dict() == _get(recipe, variant).to_dict()
    for variant in VARIANTS[recipe]
  )


@pytest.mark.parametrize('recipe', VARIANTS)
def test_a_wrong_variant_is_told_all(recipe):
  with pytest.raises(ValueError, match="variant 'fast': allowed are") as error:
    _get(recipe, 'fast')
  text = str(error.value)
  assert '\n' not in text
  assert all(variant in text for variant in VARIANTS[recipe])


def test_every_loss_has_a_recipe():
  used = {method.objective for method in methods.METHODS.values()}
  assert used == set(registry.OBJECTIVES)
  assert all(method.why for method in methods.METHODS.values())
  for module in (sd15, sdxl):
    assert all(f':{name}' in module.__doc__ for name in methods.OTHERS)
  for name in emoji_sweep.VARIANTS:
    assert f':{name}' in emoji_sweep.__doc__


def test_sdxl_has_its_own_numbers():
  assert sd15.get_config('linear').objective.numbers.beta == 100.0
  assert sdxl.get_config('linear').objective.numbers.beta == 500.0
  assert sd15.get_config('sdpo').objective.safeguard == 0.9
  assert sdxl.get_config('sdpo').objective.safeguard == 0.6
  assert sd15.get_config('lora').optim.lr == sdxl.get_config('lora').optim.lr


def _differences(one, other):
  return {
    f'{group}.{key}'
    for group, values in one.items()
    if isinstance(values, dict)
    for key in values
    if values[key] != other[group][key]
  }


def test_a_method_changes_what_it_says():
  plain = sdxl.get_config().to_dict()
  changed = {
    name: _differences(plain, sdxl.get_config(name).to_dict())
    for name in methods.OTHERS
  }
  assert changed['ipo'] == {'objective.name', 'objective.numbers'}
  assert changed['sdpo'] == {'objective.safeguard'}
  assert changed['kto'] == changed['ipo'] | {'objective.liked_share'}
  assert changed['dmpo'] == changed['ipo'] | {'objective.reward_beta'}
  assert sdxl.get_config('dmpo').objective.reward_beta == 6000.0


def test_the_sweep_is_quickstart_scaled():
  wanted = quickstart.get_config()
  found = emoji_sweep.get_config()
  assert found.objective == wanted.objective
  assert found.optim == wanted.optim and found.eval == wanted.eval
  for name in emoji_sweep.VARIANTS:
    c = emoji_sweep.get_config(name)
    assert c.train.num_steps == wanted.train.num_steps == 250
    assert c.train.batch_size == wanted.train.batch_size == 32
    assert c.data.label_noise == (0.2 if name.endswith('_noisy') else 0.0)
  by_hand = {'hinge': 450, 'kto': 180, 'ipo': 90, 'dmpo': 360}
  for name, beta in by_hand.items():
    numbers = emoji_sweep.get_config(name).objective.numbers
    assert numbers.beta == pytest.approx(beta)
  # The slope of linear's and of dpo's weight at a gap of 0.
  linear_beta = emoji_sweep.get_config('linear').objective.numbers.beta
  assert linear.STEEPNESS * linear_beta == pytest.approx(0.25 * 0.5 * 900)
  mapo = emoji_sweep.get_config('mapo').objective.numbers.to_dict()
  assert mapo == pytest.approx({'scale': 0.5, 'weight': 0.1, 'timesteps': 180})


def test_what_is_told_the_share_of_wrong_labels():
  for name in ('cdpo', 'robust'):
    clean = emoji_sweep.get_config(name).objective.numbers
    noisy = emoji_sweep.get_config(f'{name}_noisy').objective.numbers
    assert (clean.smoothing, noisy.smoothing) == (0.1, 0.2)


def test_scaling_leaves_shares_alone():
  c = common.get_config()
  c.unlock()
  methods.apply(c, 'robust', size='sd15', scale=0.5)
  assert c.objective.numbers.to_dict() == {'beta': 2500.0, 'smoothing': 0.1}
  assert c.objective.reward_beta == 2500.0


def test_what_is_for_rewards_alone_is_refused_elsewhere():
  c = common.get_config()
  assert c.reward.to_dict() == reward_limits.DEFAULTS
  c = quickstart.get_config()
  limits.validate(c)
  c.reward.networks = 3
  with pytest.raises(ValueError, match='networks=3: is for task=reward'):
    limits.validate(c)
