"""What config.json of released models says, as published beside their weights.

One dict a file, keys of the file, underscored ones left out. They are facts
about the releases of runwayml and CompVis (SD 1.x), stabilityai (SD 2.x, SDXL,
refiner, Turbo) and madebyollin (sdxl-vae-fp16-fix).
"""

_SD_DOWN = ['CrossAttnDownBlock2D'] * 3 + ['DownBlock2D']
_SD_UP = ['UpBlock2D'] + ['CrossAttnUpBlock2D'] * 3

_UNET_SD1 = dict(
  act_fn='silu',
  attention_head_dim=8,
  block_out_channels=[320, 640, 1280, 1280],
  center_input_sample=False,
  cross_attention_dim=768,
  down_block_types=_SD_DOWN,
  downsample_padding=1,
  flip_sin_to_cos=True,
  freq_shift=0,
  in_channels=4,
  layers_per_block=2,
  mid_block_scale_factor=1,
  norm_eps=1e-05,
  norm_num_groups=32,
  out_channels=4,
  sample_size=64,
  up_block_types=_SD_UP,
)
_UNET_SD2 = _UNET_SD1 | dict(
  attention_head_dim=[5, 10, 20, 20],
  cross_attention_dim=1024,
  dual_cross_attention=False,
  use_linear_projection=True,
)
_UNET_SDXL = dict(
  act_fn='silu',
  addition_embed_type='text_time',
  addition_embed_type_num_heads=64,
  addition_time_embed_dim=256,
  attention_head_dim=[5, 10, 20],
  block_out_channels=[320, 640, 1280],
  center_input_sample=False,
  class_embed_type=None,
  class_embeddings_concat=False,
  conv_in_kernel=3,
  conv_out_kernel=3,
  cross_attention_dim=2048,
  cross_attention_norm=None,
  down_block_types=['DownBlock2D'] + ['CrossAttnDownBlock2D'] * 2,
  downsample_padding=1,
  dual_cross_attention=False,
  encoder_hid_dim=None,
  encoder_hid_dim_type=None,
  flip_sin_to_cos=True,
  freq_shift=0,
  in_channels=4,
  layers_per_block=2,
  mid_block_only_cross_attention=None,
  mid_block_scale_factor=1,
  mid_block_type='UNetMidBlock2DCrossAttn',
  norm_eps=1e-05,
  norm_num_groups=32,
  num_attention_heads=None,
  num_class_embeds=None,
  only_cross_attention=False,
  out_channels=4,
  projection_class_embeddings_input_dim=2816,
  resnet_out_scale_factor=1.0,
  resnet_skip_time_act=False,
  resnet_time_scale_shift='default',
  sample_size=128,
  time_cond_proj_dim=None,
  time_embedding_act_fn=None,
  time_embedding_dim=None,
  time_embedding_type='positional',
  timestep_post_act=None,
  transformer_layers_per_block=[1, 2, 10],
  up_block_types=['CrossAttnUpBlock2D'] * 2 + ['UpBlock2D'],
  upcast_attention=None,
  use_linear_projection=True,
)

UNET = {
  'sd14': _UNET_SD1,
  'sd15': _UNET_SD1,
  'sd2_base': _UNET_SD2,
  'sd21': _UNET_SD2
  | dict(
    num_class_embeds=None,
    only_cross_attention=False,
    sample_size=96,
    upcast_attention=True,
  ),
  'sdxl': _UNET_SDXL,
  'sdxl_refiner': _UNET_SDXL
  | dict(
    attention_head_dim=[6, 12, 24, 24],
    block_out_channels=[384, 768, 1536, 1536],
    cross_attention_dim=1280,
    down_block_types=[
      'DownBlock2D',
      'CrossAttnDownBlock2D',
      'CrossAttnDownBlock2D',
      'DownBlock2D',
    ],
    projection_class_embeddings_input_dim=2560,
    transformer_layers_per_block=4,
    up_block_types=[
      'UpBlock2D',
      'CrossAttnUpBlock2D',
      'CrossAttnUpBlock2D',
      'UpBlock2D',
    ],
  ),
  'sdxl_turbo': _UNET_SDXL
  | dict(
    attention_type='default',
    dropout=0.0,
    reverse_transformer_layers_per_block=None,
    sample_size=64,
  ),
}

_VAE_SD1 = dict(
  act_fn='silu',
  block_out_channels=[128, 256, 512, 512],
  down_block_types=['DownEncoderBlock2D'] * 4,
  in_channels=3,
  latent_channels=4,
  layers_per_block=2,
  norm_num_groups=32,
  out_channels=3,
  sample_size=512,
  up_block_types=['UpDecoderBlock2D'] * 4,
)
_VAE_SDXL = _VAE_SD1 | dict(
  force_upcast=True,
  sample_size=1024,
  scaling_factor=0.13025,
)
VAE = {
  'sd15': _VAE_SD1,
  'sd21': _VAE_SD1 | dict(sample_size=768),
  'sdxl': _VAE_SDXL,
  # What diffusers writes today when it saves the same VAE.
  'sdxl_saved_again': _VAE_SDXL
  | dict(
    latents_mean=None,
    latents_std=None,
    mid_block_add_attention=True,
    shift_factor=None,
    use_post_quant_conv=True,
    use_quant_conv=True,
  ),
  'sdxl_fp16_fix': _VAE_SDXL
  | dict(
    force_upcast=False,
    latents_mean=None,
    latents_std=None,
    sample_size=512,
  ),
}

_TEXT = dict(
  attention_dropout=0.0,
  bos_token_id=0,
  dropout=0.0,
  eos_token_id=2,
  initializer_factor=1.0,
  initializer_range=0.02,
  layer_norm_eps=1e-05,
  max_position_embeddings=77,
  model_type='clip_text_model',
  pad_token_id=1,
  torch_dtype='float32',
  transformers_version='4.25.0.dev0',
  vocab_size=49408,
)
_CLIP_L = _TEXT | dict(
  architectures=['CLIPTextModel'],
  hidden_act='quick_gelu',
  hidden_size=768,
  intermediate_size=3072,
  num_attention_heads=12,
  num_hidden_layers=12,
  projection_dim=768,
)
TEXT_ENCODER = {
  # The first release names no projection, which the encoder has none of.
  'sd14': {k: v for k, v in _CLIP_L.items() if k != 'projection_dim'},
  'sd15': _CLIP_L,
  'sd21': _TEXT
  | dict(
    architectures=['CLIPTextModel'],
    hidden_act='gelu',
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_hidden_layers=23,
    projection_dim=512,
  ),
  'sdxl': _CLIP_L | dict(torch_dtype='float16'),
}
TEXT_ENCODER_2 = {
  'sdxl': _TEXT
  | dict(
    architectures=['CLIPTextModelWithProjection'],
    hidden_act='gelu',
    hidden_size=1280,
    intermediate_size=5120,
    num_attention_heads=20,
    num_hidden_layers=32,
    projection_dim=1280,
    torch_dtype='float16',
  ),
}

COMPONENTS = {
  'unet': UNET,
  'vae': VAE,
  'text_encoder': TEXT_ENCODER,
  'text_encoder_2': TEXT_ENCODER_2,
}
