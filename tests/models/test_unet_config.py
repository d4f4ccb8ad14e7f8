import dataclasses

import pytest
import released

from dpo_jax.models import unet_config

TINY = dict(
  block_out_channels=(16, 32),
  down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
  up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
  layers_per_block=1,
  norm_num_groups=8,
  cross_attention_dim=24,
  attention_head_dim=4,
)
TEXT_TIME = dict(
  addition_embed_type='text_time',
  addition_time_embed_dim=8,
  projection_class_embeddings_input_dim=68,
)


@pytest.mark.parametrize('release', released.UNET)
def test_released_configs_are_read(release):
  values = released.UNET[release]
  config = unet_config.UNetConfig.from_dict(
    values | dict(_class_name='UNet2DConditionModel', _diffusers_version='0.19')
  )
  assert config.cross_attention_dim == values['cross_attention_dim']
  assert config.addition_embed_type == values.get('addition_embed_type')
  # A config that was read can be changed and is checked again.
  assert dataclasses.replace(config, in_channels=8).in_channels == 8
  with pytest.raises(ValueError, match="unknown option 'new_option'"):
    unet_config.UNetConfig.from_dict(values | dict(new_option=1))


def test_depths_are_one_per_residual_block():
  config = unet_config.UNetConfig.from_dict(released.UNET['sdxl'])
  assert config.transformer_layers_per_block == ((1, 1), (2, 2), (10, 10))
  assert config.reverse_transformer_layers_per_block == (
    (10, 10, 10),
    (2, 2, 2),
    (1, 1, 1),
  )


@pytest.mark.parametrize(
  'options, words',
  [
    (dict(act_fn='gelu'), ['act_fn', "'gelu'", "'silu'"]),
    (dict(mid_block_type='Other'), ['mid_block_type', "'Other'", 'CrossAttn']),
    (dict(mid_block_type={}), ['mid_block_type', '{}', 'CrossAttn']),
    (dict(resnet_time_scale_shift='ada'), ['resnet_time_scale_shift', "'ada'"]),
    (dict(addition_embed_type='text'), ['addition_embed_type', "'text_time'"]),
    (
      dict(addition_embed_type='text_time'),
      ['addition_time_embed_dim', 'None', 'even'],
    ),
    (
      TEXT_TIME | dict(addition_time_embed_dim=7),
      ['addition_time_embed_dim', '7', 'even'],
    ),
    (
      TEXT_TIME | dict(projection_class_embeddings_input_dim=8),
      ['projection_class_embeddings_input_dim', '8', 'above'],
    ),
    (
      dict(addition_time_embed_dim=8),
      ['addition_time_embed_dim', '8', 'None without text_time'],
    ),
    (
      dict(projection_class_embeddings_input_dim=68),
      ['projection_class_embeddings_input_dim', '68', 'None without'],
    ),
    (
      dict(transformer_layers_per_block=[[1], 1]),
      ['reverse_transformer_layers_per_block', 'None', 'has lists'],
    ),
    (
      dict(transformer_layers_per_block=[1, -1]),
      ['transformer_layers_per_block', '(1, -1)', 'a list of 2'],
    ),
    (
      dict(reverse_transformer_layers_per_block=[[1, 1, 1], 1]),
      ['reverse_transformer_layers_per_block', '(1, 1, 1)', '(2, 2)'],
    ),
    (dict(layers_per_block=0), ['layers_per_block', '(0, 0)', 'above 0']),
    (dict(only_cross_attention=True), ['only_cross_attention', 'True']),
    (dict(only_cross_attention=0), ['only_cross_attention', '0', 'False']),
    (dict(num_attention_heads=8), ['num_attention_heads', '8', 'None']),
    (dict(layer_per_block=2), ['layer_per_block', "'layers_per_block'"]),
    (dict(down_block_types=['SkipDownBlock2D'] * 2), ['down_block_types']),
    (dict(up_block_types=['UpBlock2D']), ['up_block_types', '2 (as']),
    (dict(attention_head_dim=3), ['attention_head_dim', '(3, 3)', 'divide']),
    (dict(attention_head_dim=[4, 4, 4]), ['attention_head_dim', '2 integers']),
    (dict(layers_per_block=[1, '2']), ['layers_per_block', "'2'"]),
    (dict(norm_num_groups=5), ['norm_num_groups', '5', '(16, 32)']),
    (dict(norm_eps='small'), ['norm_eps', "'small'", 'number above 0']),
    (dict(cross_attention_dim=[24]), ['cross_attention_dim', '2 integers']),
    (dict(cross_attention_dim=[24, 8]), ['cross_attention_dim', 'one width']),
    (dict(cross_attention_dim=0), ['cross_attention_dim', '(0, 0)']),
    (dict(block_out_channels=16), ['block_out_channels', '16', 'list']),
    (dict(use_linear_projection=1), ['use_linear_projection', 'true']),
  ],
)
def test_unsupported_options_are_named(options, words):
  with pytest.raises(ValueError) as error:
    unet_config.UNetConfig.from_dict(TINY | options)
  assert all(word in str(error.value) for word in words), error.value
  assert 'UNetConfig' in str(error.value)


def test_config_is_hashable_and_ignores_what_is_harmless():
  values = TINY | dict(_class_name='x', _diffusers_version='y', sample_size=64)
  config = unet_config.UNetConfig.from_dict(
    values | dict(block_out_channels=[16, 32], layers_per_block=[1, 1])
  )
  assert config == unet_config.UNetConfig(**TINY)
  assert hash(config) == hash(unet_config.UNetConfig(**TINY))
