import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import trees
from dpo_jax.models import clip
from dpo_jax.weights import diffusers_maps

TINY = dict(
  vocab_size=60,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=12,
  eos_token_id=58,
)
# Rows: one end, the end repeated as padding, a larger id after the end.
IDS = np.array(
  [
    [57, 3, 9, 58, 0, 0, 0, 0, 0],
    [57, 8, 2, 7, 40, 58, 58, 58, 58],
    [57, 58, 59, 1, 1, 1, 1, 1, 1],
  ],
  np.int32,
)


@pytest.mark.parametrize('eos_token_id', [58, 2])
@pytest.mark.parametrize('hidden_act', ['quick_gelu', 'gelu'])
def test_values_equal_transformers(hidden_act, eos_token_id, from_torch):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  options = TINY | dict(hidden_act=hidden_act, eos_token_id=eos_token_id)
  options |= dict(bos_token_id=57, pad_token_id=0, layer_norm_eps=1e-3)
  reference = transformers.CLIPTextModel(
    transformers.CLIPTextConfig(**options)
  ).eval()
  config, params = from_torch('text_encoder', reference)
  # Near zero input the activations are all linear.
  params['text_model']['embeddings']['token_embedding']['embedding'] *= 50
  with torch.no_grad():
    reference.get_input_embeddings().weight.mul_(50)
    expected = reference(torch.from_numpy(IDS).long())
  states, pooled = jax.jit(clip.CLIPTextModel(config).apply)(
    {'params': params}, IDS
  )
  np.testing.assert_allclose(
    states, expected.last_hidden_state.numpy(), atol=1e-4, rtol=0
  )
  np.testing.assert_allclose(
    pooled, expected.pooler_output.numpy(), atol=1e-4, rtol=0
  )


@pytest.mark.parametrize(
  'eos_token_id, positions', [(58, [3, 5, 1]), (2, [3, 5, 2])]
)
def test_pooled_state_is_at_the_end_of_text(
  eos_token_id, positions, random_params
):
  config = clip.CLIPTextConfig(**(TINY | dict(eos_token_id=eos_token_id)))
  params = random_params('text_encoder', config)
  states, pooled = clip.CLIPTextModel(config).apply({'params': params}, IDS)
  np.testing.assert_array_equal(pooled, states[np.arange(3), positions])


def test_no_token_sees_a_later_one(random_params):
  config = clip.CLIPTextConfig(**TINY)
  apply = jax.jit(clip.CLIPTextModel(config).apply)
  variables = {'params': random_params('text_encoder', config)}
  before, _ = apply(variables, IDS)
  changed = IDS.copy()
  changed[:, 5] = 33
  after, _ = apply(variables, changed)
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert np.all(np.any(before[:, 5:] != after[:, 5:], axis=-1))


def test_full_size_parameter_count():
  config = clip.CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12
  )
  shapes = diffusers_maps.COMPONENTS['text_encoder'].init_shapes(config)
  assert trees.count(shapes) == 123_060_480


def test_bfloat16_compute_gives_float32_near_the_same(random_params):
  config = clip.CLIPTextConfig(**TINY)
  variables = {'params': random_params('text_encoder', config)}
  exact, _ = clip.CLIPTextModel(config).apply(variables, IDS)
  rough, pooled = clip.CLIPTextModel(config, jnp.bfloat16).apply(variables, IDS)
  assert rough.dtype == pooled.dtype == jnp.float32
  assert not np.array_equal(exact, rough)
  np.testing.assert_allclose(exact, rough, atol=0.05 * np.abs(exact).max())


def test_embeddings_begin_small():
  config = clip.CLIPTextConfig(**(TINY | dict(vocab_size=500)))
  params = clip.CLIPTextModel(config).init(jax.random.key(0), IDS)['params']
  table = params['text_model']['embeddings']['token_embedding']['embedding']
  assert np.std(table) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
  'options, words',
  [
    (dict(hidden_act='relu'), ['hidden_act', "'relu'", 'quick_gelu']),
    (dict(attention_dropout=0.1), ['attention_dropout', '0.1', '0.0']),
    (dict(num_attention_heads=5), ['num_attention_heads', '5', '32']),
    (dict(eos_token_id=[58]), ['eos_token_id', '(58,)', 'integer']),
    (dict(hidden_sise=32), ['hidden_sise', "'hidden_size'"]),
  ],
)
def test_unsupported_options_are_named(options, words):
  with pytest.raises(ValueError) as error:
    clip.CLIPTextConfig.from_dict(TINY | options)
  assert all(word in str(error.value) for word in ['CLIPTextConfig', *words])


def test_too_many_tokens_are_named(random_params):
  config = clip.CLIPTextConfig(**TINY)
  with pytest.raises(ValueError, match=r'13 .*max_position_embeddings=12'):
    clip.CLIPTextModel(config).init(
      jax.random.key(0), np.zeros((1, 13), np.int32)
    )
