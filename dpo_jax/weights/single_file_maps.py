"""Names in Stability's single-file checkpoints and in diffusers' folders.

Each function tells the modules of one network: the name in the file to the name
in diffusers or transformers. The numbers of the blocks follow from the config.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from dpo_jax.models import clip, clip_pair, unet_config, vae

RESNET = {
  'in_layers.0': 'norm1',
  'in_layers.2': 'conv1',
  'emb_layers.1': 'time_emb_proj',
  'out_layers.0': 'norm2',
  'out_layers.3': 'conv2',
  'skip_connection': 'conv_shortcut',
}
VAE_RESNET = {
  'norm1': 'norm1',
  'conv1': 'conv1',
  'norm2': 'norm2',
  'conv2': 'conv2',
  'nin_shortcut': 'conv_shortcut',
}
# 1x1 convolutions in the file, dense layers here.
VAE_ATTENTION = {
  'q': 'to_q',
  'k': 'to_k',
  'v': 'to_v',
  'proj_out': 'to_out.0',
}
OPEN_CLIP_LAYER = {
  'ln_1': 'layer_norm1',
  'ln_2': 'layer_norm2',
  'attn': 'self_attn',
  'mlp.c_fc': 'mlp.fc1',
  'mlp.c_proj': 'mlp.fc2',
}
# OpenCLIP keeps the three projections of attention in one tensor.
FUSED = {'in_proj_weight': 'weight', 'in_proj_bias': 'bias'}
QKV = ('q_proj', 'k_proj', 'v_proj')
PROJECTION, VISUAL_PROJECTION = 'text_projection', 'visual.proj'


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where in a file the values of a tensor are.

  Attributes:
    name: the tensor's name in the file.
    third: which third of its rows, or None for all.
    is_transposed: its two axes are the other way round.
    is_pointwise: a 1x1 convolution may stand for the matrix.
  """

  name: str
  third: int | None = None
  is_transposed: bool = False
  is_pointwise: bool = False


def unet_modules(config: unet_config.UNetConfig) -> dict[str, str]:
  """Modules under `model.diffusion_model.`.

  Input, residual block after residual block with its downsampler, and output
  blocks are numbered through, whatever the level.
  """
  modules = {
    'time_embed.0': 'time_embedding.linear_1',
    'time_embed.2': 'time_embedding.linear_2',
    'input_blocks.0.0': 'conv_in',
    'out.0': 'conv_norm_out',
    'out.2': 'conv_out',
  }
  if config.addition_embed_type is not None:
    modules['label_emb.0.0'] = 'add_embedding.linear_1'
    modules['label_emb.0.2'] = 'add_embedding.linear_2'
  modules |= _resnet('middle_block.0', 'mid_block.resnets.0')
  if unet_config.MID_TYPES[config.mid_block_type]:
    modules['middle_block.1'] = 'mid_block.attentions.0'
    modules |= _resnet('middle_block.2', 'mid_block.resnets.1')
  return modules | _input_blocks(config) | _output_blocks(config)


def vae_modules(config: vae.VAEConfig) -> dict[str, str]:
  """Modules under `first_stage_model.`; the decoder counts from the end."""
  levels = len(config.block_out_channels)
  modules = {'quant_conv': 'quant_conv', 'post_quant_conv': 'post_quant_conv'}
  for half in ('encoder', 'decoder'):
    modules |= {
      f'{half}.conv_in': f'{half}.conv_in',
      f'{half}.norm_out': f'{half}.conv_norm_out',
      f'{half}.conv_out': f'{half}.conv_out',
    }
    for i in range(2):
      old, new = f'{half}.mid.block_{i + 1}', f'{half}.mid_block.resnets.{i}'
      modules |= _join(old, new, VAE_RESNET)
    old, new = f'{half}.mid.attn_1', f'{half}.mid_block.attentions.0'
    modules |= _join(old, new, {'norm': 'group_norm', **VAE_ATTENTION})
  for i in range(levels):
    old, new = f'encoder.down.{i}', f'encoder.down_blocks.{i}'
    for j in range(config.layers_per_block):
      modules |= _join(f'{old}.block.{j}', f'{new}.resnets.{j}', VAE_RESNET)
    if i < levels - 1:
      modules[f'{old}.downsample.conv'] = f'{new}.downsamplers.0.conv'
    old, new = f'decoder.up.{levels - 1 - i}', f'decoder.up_blocks.{i}'
    for j in range(config.layers_per_block + 1):
      modules |= _join(f'{old}.block.{j}', f'{new}.resnets.{j}', VAE_RESNET)
    if i < levels - 1:
      modules[f'{old}.upsample.conv'] = f'{new}.upsamplers.0.conv'
  return modules


def clip_modules(config: clip.CLIPTextConfig) -> dict[str, str]:
  """Modules of a text encoder that is transformers' own."""
  del config  # The names are the same; what is too many is found later.
  parts = ('embeddings', 'encoder', 'final_layer_norm')
  # Files made with early releases have no prefix.
  return {'text_model': 'text_model'} | {
    part: f'text_model.{part}' for part in parts
  }


def open_clip_modules(config: clip.CLIPTextConfig) -> dict[str, str]:
  """Modules of an OpenCLIP text encoder, its projection not among them."""
  body = 'text_model'
  modules = {
    'positional_embedding': f'{body}.embeddings.position_embedding.weight',
    'token_embedding': f'{body}.embeddings.token_embedding',
    'ln_final': f'{body}.final_layer_norm',
  }
  for i in range(config.num_hidden_layers):
    old, new = f'transformer.resblocks.{i}', f'{body}.encoder.layers.{i}'
    modules |= _join(old, new, OPEN_CLIP_LAYER)
  return modules


def open_clip_projected_modules(config: clip.CLIPTextConfig) -> dict[str, str]:
  """Modules of an OpenCLIP text encoder with its projection."""
  return {
    **open_clip_modules(config),
    PROJECTION: f'{PROJECTION}.weight',
  }


def open_clip_pair_modules(config: clip_pair.CLIPConfig) -> dict[str, str]:
  """Modules of both towers of OpenCLIP, their projections and temperature."""
  body = 'vision_model'
  modules = open_clip_projected_modules(config.text_config) | {
    'logit_scale': 'logit_scale',
    'visual.class_embedding': f'{body}.embeddings.class_embedding',
    'visual.positional_embedding': (
      f'{body}.embeddings.position_embedding.weight'
    ),
    'visual.conv1': f'{body}.embeddings.patch_embedding',
    'visual.ln_pre': f'{body}.pre_layrnorm',
    'visual.ln_post': f'{body}.post_layernorm',
    VISUAL_PROJECTION: 'visual_projection.weight',
  }
  for i in range(config.vision_config.num_hidden_layers):
    old, new = f'visual.transformer.resblocks.{i}', f'{body}.encoder.layers.{i}'
    modules |= _join(old, new, OPEN_CLIP_LAYER)
  return modules


def find_origins(
  names: Iterable[str], modules: Mapping[str, str]
) -> tuple[dict[str, Origin], list[str]]:
  """(where the tensors come from by their new names, names of no module).

  `names` are those in the file, without the network's prefix.
  """
  origins: dict[str, Origin] = {}
  unknown = []
  for name in names:
    new = rename(name, modules)
    if new is None or new in origins:
      unknown.append(name)
      continue
    module, _, leaf = new.rpartition('.')
    if leaf in FUSED:
      for i, part in enumerate(QKV):
        origins[f'{module}.{part}.{FUSED[leaf]}'] = Origin(name, third=i)
    else:
      origins[new] = Origin(
        name,
        is_transposed=name in (PROJECTION, VISUAL_PROJECTION),
        is_pointwise=name.rpartition('.')[0].endswith(
          tuple(f'.mid.attn_1.{part}' for part in VAE_ATTENTION)
        )
        and leaf == 'weight',
      )
  return origins, unknown


def rename(name: str, modules: Mapping[str, str]) -> str | None:
  """`name` with the longest module that begins it exchanged; None if none."""
  head = name
  while head:
    if head in modules:
      return modules[head] + name[len(head) :]
    head, _, _ = head.rpartition('.')
  return None


def _join(old: str, new: str, parts: Mapping[str, str]) -> dict[str, str]:
  return {f'{old}.{a}': f'{new}.{b}' for a, b in parts.items()}


def _resnet(old: str, new: str) -> dict[str, str]:
  return _join(old, new, RESNET)


def _input_blocks(config: unet_config.UNetConfig) -> dict[str, str]:
  modules, number = {}, 1
  for i, kind in enumerate(config.down_block_types):
    new = f'down_blocks.{i}'
    for j in range(config.layers_per_block[i]):
      modules |= _resnet(f'input_blocks.{number}.0', f'{new}.resnets.{j}')
      if unet_config.DOWN_TYPES[kind]:
        modules[f'input_blocks.{number}.1'] = f'{new}.attentions.{j}'
      number += 1
    if i < len(config.down_block_types) - 1:
      modules[f'input_blocks.{number}.0.op'] = f'{new}.downsamplers.0.conv'
      number += 1
  return modules


def _output_blocks(config: unet_config.UNetConfig) -> dict[str, str]:
  modules, number = {}, 0
  counts = [count + 1 for count in config.layers_per_block[::-1]]
  for i, kind in enumerate(config.up_block_types):
    new, has_attention = f'up_blocks.{i}', unet_config.UP_TYPES[kind]
    for j in range(counts[i]):
      old = f'output_blocks.{number}'
      modules |= _resnet(f'{old}.0', f'{new}.resnets.{j}')
      if has_attention:
        modules[f'{old}.1'] = f'{new}.attentions.{j}'
      if j == counts[i] - 1 and i < len(counts) - 1:
        place = 2 if has_attention else 1
        modules[f'{old}.{place}.conv'] = f'{new}.upsamplers.0.conv'
      number += 1
  return modules
