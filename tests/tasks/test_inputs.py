"""Conditioning, dropout and timesteps of what a denoiser is trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import loading, sharding
from dpo_jax.tasks import inputs as inputs_lib
from dpo_jax.weights import pipeline


def _open(folder, **options):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return loading.open_model(str(folder), mesh=mesh, dtype='float32', **options)


@pytest.fixture(scope='module')
def xl(tiny_xl_folder):
  return _open(tiny_xl_folder)


@pytest.fixture(scope='module')
def refiner(tiny_refiner_folder):
  return _open(tiny_refiner_folder)


def _make(opened, *, size=8, **options):
  rng = np.random.default_rng(0)
  encode = opened.tokenizers.encode
  batch = {
    'images': rng.integers(0, 256, (size, 2, 16, 16, 3), np.uint8),
    'sizes': np.arange(size * 8, dtype=np.int32).reshape(size, 2, 4),
    'input_ids': encode([f'cat {i}' for i in range(size)])[0],
    'id': np.arange(size, dtype=np.uint32),
    'epoch': np.zeros(size, np.uint32),
  }
  maker = inputs_lib.Inputs(
    model=opened.model,
    resolution=16,
    empty_ids=encode([''])[0][0],
    **options,
  )
  return batch, jax.jit(maker.make)(opened.params, batch, jax.random.key(0))


def test_constant_sizes_are_those_of_the_resolution(xl):
  _, made = _make(xl)
  assert made['cond']['micro_cond'].shape == (8, 2, 6)
  np.testing.assert_array_equal(
    made['cond']['micro_cond'],
    np.broadcast_to([16, 16, 0, 0, 16, 16], (8, 2, 6)),
  )


def test_true_sizes_belong_to_each_image(xl):
  batch, made = _make(xl, micro_cond='true_size')
  micro = np.asarray(made['cond']['micro_cond'])
  np.testing.assert_array_equal(micro[..., :4], batch['sizes'])
  assert (micro[..., 4:] == 16).all()


def test_the_refiner_gets_five_numbers_with_the_score(refiner):
  batch, made = _make(refiner, micro_cond='true_size')
  micro = np.asarray(made['cond']['micro_cond'])
  np.testing.assert_array_equal(micro[..., :4], batch['sizes'])
  assert (micro[..., 4] == 6.0).all() and micro.shape[-1] == 5
  assert batch['input_ids'].shape[1] == 1


def test_text_states_of_both_encoders_stand_side_by_side(xl):
  batch, made = _make(xl)
  parts = {
    name: encoder.apply({'params': xl.params[name]}, batch['input_ids'][:, i])
    for i, (name, encoder) in enumerate(xl.model.text_encoders.items())
  }
  first, second = parts['text_encoder'], parts['text_encoder_2']
  wanted = np.concatenate([first.penultimate, second.penultimate], -1)
  np.testing.assert_allclose(made['cond']['prompt_embeds'], wanted, atol=1e-5)
  np.testing.assert_allclose(
    made['cond']['pooled_embeds'], second.pooled, atol=1e-5
  )
  # The paddings differ, the tokens do not.
  ids = batch['input_ids']
  assert (ids[:, 0, -1] == 1023).all() and (ids[:, 1, -1] == 0).all()
  np.testing.assert_array_equal(ids[:, 0, :3], ids[:, 1, :3])


@pytest.mark.parametrize('kind', inputs_lib.DROPPED_PROMPTS)
def test_dropped_prompts_become_empty_or_zeros(xl, kind):
  _, kept = _make(xl)
  _, made = _make(xl, prompt_dropout=0.5, dropped_prompt=kind)
  same = np.isclose(
    made['cond']['prompt_embeds'], kept['cond']['prompt_embeds'], atol=1e-6
  ).all((1, 2))
  assert 0 < same.sum() < 8
  wanted = {'prompt_embeds': 0.0, 'pooled_embeds': 0.0}
  if kind == 'empty':
    wanted = xl.model.encode_text(xl.params, xl.tokenizers.encode([''])[0])
  for name, value in wanted.items():
    dropped = np.asarray(made['cond'][name])[~same]
    np.testing.assert_allclose(
      dropped, np.broadcast_to(value, dropped.shape), atol=1e-5
    )


def test_choose_timesteps():
  choose = inputs_lib.choose_timesteps
  assert choose(1000) is None
  np.testing.assert_array_equal(choose(1000, high=200), np.arange(200))
  np.testing.assert_array_equal(choose(10, low=8), [8, 9])
  np.testing.assert_array_equal(choose(1000, only=(249, 999)), [249, 999])
  for options in (
    {'low': 5, 'high': 5},
    {'high': 1001},
    {'only': (1000,)},
    {'only': (-1,)},
  ):
    with pytest.raises(ValueError, match='at least one timestep in'):
      choose(1000, **options)
  with pytest.raises(ValueError, match='not both'):
    choose(1000, low=1, only=(3,))


def test_only_the_chosen_timesteps_are_drawn(xl):
  chosen = inputs_lib.choose_timesteps(1000, only=(249, 499, 749, 999))
  _, made = _make(xl, size=64, timesteps=chosen)
  found, counts = np.unique(made['t'], return_counts=True)
  np.testing.assert_array_equal(found, chosen)
  # Binomial(64, 1/4): below 5 or above 30 with probability 1e-4.
  assert counts.min() >= 5 and counts.max() <= 30
  _, low = _make(
    xl, size=64, timesteps=inputs_lib.choose_timesteps(1000, high=200)
  )
  assert low['t'].max() < 200 and len(np.unique(low['t'])) > 30


def test_the_last_timestep_of_a_rescaled_schedule_is_noise(tiny_xl_folder):
  parts = pipeline.load(tiny_xl_folder)
  plain = loading.make_model(parts, dtype='float32')
  made = loading.make_model(parts, dtype='float32', zero_terminal_snr=True)
  last = jnp.array([999])
  assert float(plain.schedule.alpha_sigma(last)[0][0]) > 0.05
  alpha, sigma = made.schedule.alpha_sigma(last)
  assert float(alpha[0]) < 1e-3 and float(sigma[0]) == pytest.approx(1.0)


def test_only_the_vae_of_sdxl_is_upcast(tiny_folder, tiny_xl_folder):
  for folder, wanted in (
    (tiny_folder, 'bfloat16'),
    (tiny_xl_folder, 'float32'),
  ):
    model = loading.make_model(pipeline.load(folder), dtype='bfloat16')
    assert str(model.vae.dtype) == wanted
    assert str(model.unet.dtype) == 'bfloat16'
