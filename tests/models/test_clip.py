import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import released

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


SMALL = dict(
  vocab_size=60,
  hidden_size=32,
  intermediate_size=48,
  num_attention_heads=4,
  max_position_embeddings=12,
)
CASES = {
  # (component, options): the releases at a fraction of their size ...
  'sd15': (
    'text_encoder',
    released.TEXT_ENCODER['sd15'] | SMALL | dict(num_hidden_layers=2),
  ),
  'sd21': (
    'text_encoder',
    released.TEXT_ENCODER['sd21'] | SMALL | dict(num_hidden_layers=3),
  ),
  'sdxl_2': (
    'text_encoder_2',
    released.TEXT_ENCODER_2['sdxl']
    | SMALL
    # PyTorch would compute in the dtype of the release, float16.
    | dict(num_hidden_layers=2, projection_dim=20, torch_dtype='float32'),
  ),
  # ... and each option.
  'gelu': ('text_encoder', TINY | dict(hidden_act='gelu')),
  'gelu_legacy_end': (
    'text_encoder',
    TINY | dict(hidden_act='gelu', eos_token_id=2),
  ),
  'quick_gelu': ('text_encoder', TINY | dict(layer_norm_eps=1e-3)),
  'quick_gelu_legacy_end': ('text_encoder', TINY | dict(eos_token_id=2)),
  'projection_one_layer': (
    'text_encoder_2',
    TINY | dict(num_hidden_layers=1, projection_dim=40),
  ),
}


@pytest.mark.parametrize('case', CASES)
def test_every_module_equals_transformers(case, from_torch):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  component, options = CASES[case]
  name = diffusers_maps.COMPONENTS[component].class_name
  reference = getattr(transformers, name)(
    transformers.CLIPTextConfig(**options)
  ).eval()
  config, params = from_torch(component, reference)
  # Near zero input the activations are all linear.
  params['text_model']['embeddings']['token_embedding']['embedding'] *= 50
  recorded = parity.record(reference)
  with torch.no_grad():
    reference.get_input_embeddings().weight.mul_(50)
    expected = reference(
      torch.from_numpy(IDS).long(), output_hidden_states=True
    )
  apply = functools.partial(
    getattr(clip, name)(config).apply, capture_intermediates=True
  )
  output, state = jax.jit(apply)({'params': params}, IDS)
  is_projected = component == 'text_encoder_2'
  pooled = expected.text_embeds if is_projected else expected.pooler_output
  for ours, theirs in (
    (output.last_hidden_state, expected.last_hidden_state),
    (output.penultimate, expected.hidden_states[-2]),
    (output.pooled, pooled),
  ):
    assert ours.dtype == jnp.float32
    parity.assert_equal(ours, theirs)
  errors = parity.compare_modules(
    component,
    state['intermediates'],
    recorded,
    without={'text_model'},  # Its outputs are in another order.
  )
  owners = {name.rpartition('.')[0] for name, _ in reference.named_parameters()}
  assert owners <= errors.keys()


@pytest.mark.parametrize(
  'eos_token_id, positions', [(58, [3, 5, 1]), (2, [3, 5, 2])]
)
def test_pooled_state_is_at_the_end_of_text(
  eos_token_id, positions, random_params
):
  config = clip.CLIPTextConfig(**(TINY | dict(eos_token_id=eos_token_id)))
  params = random_params('text_encoder', config)
  output = clip.CLIPTextModel(config).apply({'params': params}, IDS)
  states = output.last_hidden_state
  np.testing.assert_array_equal(output.pooled, states[np.arange(3), positions])


def test_no_token_sees_a_later_one(random_params):
  config = clip.CLIPTextConfig(**TINY)
  apply = jax.jit(clip.CLIPTextModel(config).apply)
  variables = {'params': random_params('text_encoder', config)}
  before = apply(variables, IDS).last_hidden_state
  changed = IDS.copy()
  changed[:, 5] = 33
  after = apply(variables, changed).last_hidden_state
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert np.all(np.any(before[:, 5:] != after[:, 5:], axis=-1))


@pytest.mark.parametrize('component', ['text_encoder', 'text_encoder_2'])
def test_bfloat16_compute_gives_float32_near_the_same(component, random_params):
  config = clip.CLIPTextConfig(**(TINY | dict(projection_dim=20)))
  variables = {'params': random_params(component, config)}
  model = getattr(clip, diffusers_maps.COMPONENTS[component].class_name)
  exact = model(config).apply(variables, IDS)
  rough = model(config, jnp.bfloat16).apply(variables, IDS)
  for a, b in zip(exact, rough, strict=True):
    assert b.dtype == jnp.float32
    assert not np.array_equal(a, b)
    np.testing.assert_allclose(a, b, atol=0.05 * np.abs(a).max())


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
    (dict(num_hidden_layers=0), ['num_hidden_layers', '0', '1 or more']),
    (dict(projection_dim=None), ['projection_dim', 'None', 'integer']),
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
