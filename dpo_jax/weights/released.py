"""The configs of the released Stable Diffusion models, by family.

A single-file checkpoint holds none, so these stand in for the folder. Facts:
the sizes and schedules that Stability's config.json files on the hub give, and
Stability's own inference configs (generative-models, stablediffusion).
"""

from typing import Any

V_PREDICTION = 'v_prediction'
PREDICTION_TYPES = ('epsilon', V_PREDICTION)
CLASS_NAMES = {
  'sd1': 'StableDiffusionPipeline',
  'sd2': 'StableDiffusionPipeline',
  'sdxl': 'StableDiffusionXLPipeline',
  'sdxl_refiner': 'StableDiffusionXLImg2ImgPipeline',
}
FLAGS = {
  'sd1': {},
  'sd2': {},
  'sdxl': {'force_zeros_for_empty_prompt': True},
  'sdxl_refiner': {
    'force_zeros_for_empty_prompt': False,
    'requires_aesthetics_score': True,
  },
}
# OpenAI's CLIP pads with the end of text, OpenCLIP with id 0, which is '!'.
PAD_TOKENS = {
  'sd1': {'tokenizer': '<|endoftext|>'},
  'sd2': {'tokenizer': '!'},
  'sdxl': {'tokenizer': '<|endoftext|>', 'tokenizer_2': '!'},
  'sdxl_refiner': {'tokenizer_2': '!'},
}
VOCABULARY = 49408

_UNET = {
  'act_fn': 'silu',
  'center_input_sample': False,
  'downsample_padding': 1,
  'flip_sin_to_cos': True,
  'freq_shift': 0,
  'in_channels': 4,
  'layers_per_block': 2,
  'mid_block_scale_factor': 1,
  'norm_eps': 1e-05,
  'norm_num_groups': 32,
  'out_channels': 4,
}
_DOWN, _DOWN_TEXT = 'DownBlock2D', 'CrossAttnDownBlock2D'
_UP, _UP_TEXT = 'UpBlock2D', 'CrossAttnUpBlock2D'
_UNETS = {
  'sd1': {
    'attention_head_dim': 8,
    'block_out_channels': [320, 640, 1280, 1280],
    'cross_attention_dim': 768,
    'down_block_types': [_DOWN_TEXT, _DOWN_TEXT, _DOWN_TEXT, _DOWN],
    'sample_size': 64,
    'up_block_types': [_UP, _UP_TEXT, _UP_TEXT, _UP_TEXT],
  },
  'sd2': {
    'attention_head_dim': [5, 10, 20, 20],
    'block_out_channels': [320, 640, 1280, 1280],
    'cross_attention_dim': 1024,
    'down_block_types': [_DOWN_TEXT, _DOWN_TEXT, _DOWN_TEXT, _DOWN],
    'sample_size': 64,
    'up_block_types': [_UP, _UP_TEXT, _UP_TEXT, _UP_TEXT],
    # In float16 the scores of 2.1 overflow without.
    'upcast_attention': True,
    'use_linear_projection': True,
  },
  'sdxl': {
    'addition_embed_type': 'text_time',
    'addition_time_embed_dim': 256,
    'attention_head_dim': [5, 10, 20],
    'block_out_channels': [320, 640, 1280],
    'cross_attention_dim': 2048,
    'down_block_types': [_DOWN, _DOWN_TEXT, _DOWN_TEXT],
    'projection_class_embeddings_input_dim': 2816,
    'sample_size': 128,
    'transformer_layers_per_block': [1, 2, 10],
    'up_block_types': [_UP_TEXT, _UP_TEXT, _UP],
    'use_linear_projection': True,
  },
  'sdxl_refiner': {
    'addition_embed_type': 'text_time',
    'addition_time_embed_dim': 256,
    'attention_head_dim': [6, 12, 24, 24],
    'block_out_channels': [384, 768, 1536, 1536],
    'cross_attention_dim': 1280,
    'down_block_types': [_DOWN, _DOWN_TEXT, _DOWN_TEXT, _DOWN],
    'projection_class_embeddings_input_dim': 2560,
    'sample_size': 128,
    'transformer_layers_per_block': 4,
    'up_block_types': [_UP, _UP_TEXT, _UP_TEXT, _UP],
    'use_linear_projection': True,
  },
}
_VAE = {
  'act_fn': 'silu',
  'block_out_channels': [128, 256, 512, 512],
  'down_block_types': ['DownEncoderBlock2D'] * 4,
  'in_channels': 3,
  'latent_channels': 4,
  'layers_per_block': 2,
  'norm_num_groups': 32,
  'out_channels': 3,
  'up_block_types': ['UpDecoderBlock2D'] * 4,
}
_VAES = {
  'sd1': {'sample_size': 512, 'scaling_factor': 0.18215},
  'sd2': {'sample_size': 512, 'scaling_factor': 0.18215},
  # Its activations are too large for float16.
  'sdxl': {
    'force_upcast': True,
    'sample_size': 1024,
    'scaling_factor': 0.13025,
  },
  'sdxl_refiner': {
    'force_upcast': True,
    'sample_size': 1024,
    'scaling_factor': 0.13025,
  },
}
_TEXT = {
  'attention_dropout': 0.0,
  'bos_token_id': 0,
  # Wrong in all releases; so the pooled state is that at the largest id.
  'eos_token_id': 2,
  'layer_norm_eps': 1e-05,
  'max_position_embeddings': 77,
  'model_type': 'clip_text_model',
  'pad_token_id': 1,
  'vocab_size': VOCABULARY,
}
_VIT_L = {
  'hidden_act': 'quick_gelu',
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_attention_heads': 12,
  'num_hidden_layers': 12,
  'projection_dim': 768,
}
# 23 of 24 layers: the last one is not used.
_VIT_H = {
  'hidden_act': 'gelu',
  'hidden_size': 1024,
  'intermediate_size': 4096,
  'num_attention_heads': 16,
  'num_hidden_layers': 23,
  'projection_dim': 512,
}
_VIT_BIGG = {
  'hidden_act': 'gelu',
  'hidden_size': 1280,
  'intermediate_size': 5120,
  'num_attention_heads': 20,
  'num_hidden_layers': 32,
  'projection_dim': 1280,
}
_TEXTS = {
  'sd1': {'text_encoder': _VIT_L},
  'sd2': {'text_encoder': _VIT_H},
  'sdxl': {'text_encoder': _VIT_L, 'text_encoder_2': _VIT_BIGG},
  'sdxl_refiner': {'text_encoder_2': _VIT_BIGG},
}
_SCHEDULER = {
  'beta_end': 0.012,
  'beta_schedule': 'scaled_linear',
  'beta_start': 0.00085,
  'num_train_timesteps': 1000,
  'steps_offset': 1,
  'trained_betas': None,
}
_EULER = {
  '_class_name': 'EulerDiscreteScheduler',
  'interpolation_type': 'linear',
  'timestep_spacing': 'leading',
  'use_karras_sigmas': False,
}
_SCHEDULERS = {
  'sd1': {
    '_class_name': 'PNDMScheduler',
    'set_alpha_to_one': False,
    'skip_prk_steps': True,
  },
  'sd2': {
    '_class_name': 'DDIMScheduler',
    'clip_sample': False,
    'set_alpha_to_one': False,
  },
  'sdxl': _EULER,
  'sdxl_refiner': _EULER,
}


def components(family: str) -> tuple[str, ...]:
  """Names of the components with weights."""
  return ('unet', 'vae', *_TEXTS[family])


def model_configs(family: str, prediction_type: str) -> dict[str, dict]:
  """The dicts of config.json by component.

  SD 2.x with v-prediction was trained at 768 pixels, all else of it at 512.
  """
  unet = {**_UNET, **_UNETS[family]}
  vae = {**_VAE, **_VAES[family]}
  if family == 'sd2' and prediction_type == V_PREDICTION:
    unet['sample_size'], vae['sample_size'] = 96, 768
  texts = {name: {**_TEXT, **own} for name, own in _TEXTS[family].items()}
  return {'unet': unet, 'vae': vae, **texts}


def scheduler_config(family: str, prediction_type: str) -> dict[str, Any]:
  """The dict of scheduler_config.json."""
  return {
    **_SCHEDULER,
    **_SCHEDULERS[family],
    'prediction_type': prediction_type,
  }


def tokenizer_config(pad_token: str) -> dict[str, Any]:
  """The dict of tokenizer_config.json."""
  return {
    'add_prefix_space': False,
    'bos_token': '<|startoftext|>',
    'do_lower_case': True,
    'eos_token': '<|endoftext|>',
    'errors': 'replace',
    'model_max_length': 77,
    'pad_token': pad_token,
    'tokenizer_class': 'CLIPTokenizer',
    'unk_token': '<|endoftext|>',
  }
