"""Names and shapes of Stability's single-file checkpoints, for the tests.

Written after the constructors of the original code (openaimodel.UNetModel,
model.Encoder and Decoder, open_clip.CLIP), independently of the package.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np
import safetensors.numpy

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Size:
  """One model: channels, multipliers, transformer depths, widths."""

  channels: int
  mult: tuple[int, ...]
  depths: tuple[int, ...]
  mid_depth: int
  context: int
  is_linear: bool
  adm: int | None
  vae: int
  vae_mult: tuple[int, ...] = (1, 2, 4, 4)
  res: int = 2
  vit: tuple[int, int] = (768, 12)
  open_clip: tuple[int, int] = (0, 0)
  vocab: int = 49408
  positions: int = 77


FULL = {
  'sd1': Size(320, (1, 2, 4, 4), (1, 1, 1, 0), 1, 768, False, None, 128),
  'sd2': Size(
    320,
    (1, 2, 4, 4),
    (1, 1, 1, 0),
    1,
    1024,
    True,
    None,
    128,
    open_clip=(1024, 24),
  ),
  'sdxl': Size(
    320, (1, 2, 4), (0, 2, 10), 10, 2048, True, 2816, 128, open_clip=(1280, 32)
  ),
  'sdxl_refiner': Size(
    384,
    (1, 2, 4, 4),
    (0, 4, 4, 0),
    4,
    1280,
    True,
    2560,
    128,
    open_clip=(1280, 32),
  ),
}
_TINY = dict(vae=4, vae_mult=(1, 2), res=1, vocab=20, positions=8)
TINY = {
  'sd1': Size(
    8, (1, 2), (1, 0), 1, 12, False, None, **_TINY | {'res': 2}, vit=(12, 2)
  ),
  'sd2': Size(8, (1, 2), (1, 0), 1, 12, True, None, **_TINY, open_clip=(12, 3)),
  'sdxl': Size(
    8,
    (1, 2, 2),
    (0, 1, 2),
    2,
    20,
    True,
    24,
    **_TINY,
    vit=(8, 2),
    open_clip=(12, 2),
  ),
  'sdxl_refiner': Size(
    8, (1, 2), (0, 2), 2, 12, True, 22, **_TINY, open_clip=(12, 2)
  ),
}


DOWN, DOWN_TEXT = 'DownBlock2D', 'CrossAttnDownBlock2D'
UP, UP_TEXT = 'UpBlock2D', 'CrossAttnUpBlock2D'
TOWERS = {
  'sd1': ['text_encoder'],
  'sd2': ['text_encoder'],
  'sdxl': ['text_encoder', 'text_encoder_2'],
  'sdxl_refiner': ['text_encoder_2'],
}


def tiny_configs(family: str) -> dict[str, dict]:
  """config.json of each component of TINY[family]."""
  size = TINY[family]
  channels = [size.channels * m for m in size.mult]
  unet = dict(
    block_out_channels=channels,
    down_block_types=[DOWN_TEXT if d else DOWN for d in size.depths],
    up_block_types=[UP_TEXT if d else UP for d in size.depths[::-1]],
    transformer_layers_per_block=[max(d, 1) for d in size.depths[:-1]]
    + [size.mid_depth],
    layers_per_block=size.res,
    cross_attention_dim=size.context,
    attention_head_dim=2,
    norm_num_groups=4,
    use_linear_projection=size.is_linear,
    sample_size=4,
  )
  if size.adm:
    numbers = 5 if family == 'sdxl_refiner' else 6
    unet |= dict(
      addition_embed_type='text_time',
      addition_time_embed_dim=2,
      projection_class_embeddings_input_dim=12 + 2 * numbers,
    )
  count = len(size.vae_mult)
  vae = dict(
    block_out_channels=[size.vae * m for m in size.vae_mult],
    down_block_types=['DownEncoderBlock2D'] * count,
    up_block_types=['UpDecoderBlock2D'] * count,
    layers_per_block=size.res,
    norm_num_groups=4,
    sample_size=8,
  )
  configs = {'unet': unet, 'vae': vae}
  towers = {'text_encoder': size.vit, 'text_encoder_2': size.open_clip}
  if family == 'sd2':
    # The last of the file's layers is not used.
    towers['text_encoder'] = size.open_clip[0], size.open_clip[1] - 1
  for name in TOWERS[family]:
    width, layers = towers[name]
    configs[name] = dict(
      vocab_size=size.vocab,
      hidden_size=width,
      intermediate_size=4 * width,
      num_hidden_layers=layers,
      num_attention_heads=2,
      max_position_embeddings=size.positions,
      projection_dim=width,
      eos_token_id=19,
      bos_token_id=18,
      pad_token_id=19,
    )
  return configs


def write_header(path: pathlib.Path, shapes: Shapes) -> pathlib.Path:
  """A float16 checkpoint of zeros that takes no room on the disk."""
  header, begin = {}, 0
  for name, shape in shapes.items():
    end = begin + 2 * math.prod(shape)
    header[name] = dict(dtype='F16', shape=shape, data_offsets=[begin, end])
    begin = end
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    file.truncate(8 + len(text) + begin)
  return path


def make_arrays(family: str) -> dict[str, np.ndarray]:
  """Random values of TINY[family]."""
  rng = np.random.default_rng(list(FULL).index(family))
  shapes = checkpoint(family, TINY[family])
  return {
    name: np.arange(math.prod(shape)).reshape(shape)
    if name.endswith('position_ids')
    else rng.standard_normal(shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def write(
  folder: pathlib.Path, family: str, changes: dict | None = None
) -> pathlib.Path:
  """A checkpoint of TINY[family], some tensors exchanged, or None: left out."""
  arrays = make_arrays(family) | (changes or {})
  kept = {name: array for name, array in arrays.items() if array is not None}
  path = folder / (f'{family}-spoilt' if changes else family)
  path = path.with_suffix('.safetensors')
  safetensors.numpy.save_file(kept, path)
  return path


def checkpoint(family: str, size: Size) -> Shapes:
  """All tensors of a checkpoint as it was released."""
  shapes = _under('model.diffusion_model.', unet(size))
  shapes |= _under('first_stage_model.', vae(size))
  if family == 'sd1':
    shapes |= _under('cond_stage_model.transformer.', clip(size))
    ema = [name for name in shapes if name.startswith('model.')]
    flat = {name: name[6:].replace('.', '') for name in ema}
    shapes |= {f'model_ema.{flat[name]}': shapes[name] for name in ema}
    shapes |= {'model_ema.decay': (), 'model_ema.num_updates': ()}
  elif family == 'sd2':
    shapes |= _under('cond_stage_model.model.', open_clip(size))
  elif family == 'sdxl':
    shapes |= _under('conditioner.embedders.0.transformer.', clip(size))
    shapes |= _under('conditioner.embedders.1.model.', open_clip(size))
    shapes['denoiser.sigmas'] = (1000,)
  else:
    shapes |= _under('conditioner.embedders.0.model.', open_clip(size))
  if family in ('sd1', 'sd2'):
    for name in (
      'betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod'
      ' sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod'
      ' sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod'
      ' posterior_variance posterior_log_variance_clipped'
      ' posterior_mean_coef1 posterior_mean_coef2'
    ).split():
      shapes[name] = (1000,)
  return shapes


def unet(size: Size) -> Shapes:
  """openaimodel.UNetModel."""
  ch, emb = size.channels, 4 * size.channels
  shapes = _dense('time_embed.0', emb, ch) | _dense('time_embed.2', emb, emb)
  if size.adm:
    shapes |= _dense('label_emb.0.0', emb, size.adm)
    shapes |= _dense('label_emb.0.2', emb, emb)
  shapes |= _conv('input_blocks.0.0', ch, 4)
  widths, width, block = [ch], ch, 1
  for level, mult in enumerate(size.mult):
    for _ in range(size.res):
      at = f'input_blocks.{block}'
      shapes |= _res(f'{at}.0', width, ch * mult, emb)
      width = ch * mult
      shapes |= _transformer(f'{at}.1', width, size.depths[level], size)
      widths.append(width)
      block += 1
    if level < len(size.mult) - 1:
      shapes |= _conv(f'input_blocks.{block}.0.op', width, width)
      widths.append(width)
      block += 1
  shapes |= _res('middle_block.0', width, width, emb)
  shapes |= _transformer('middle_block.1', width, size.mid_depth, size)
  shapes |= _res('middle_block.2', width, width, emb)
  block = 0
  for level, mult in reversed(list(enumerate(size.mult))):
    for i in range(size.res + 1):
      at = f'output_blocks.{block}'
      shapes |= _res(f'{at}.0', width + widths.pop(), ch * mult, emb)
      width = ch * mult
      shapes |= _transformer(f'{at}.1', width, size.depths[level], size)
      if level and i == size.res:
        last = 2 if size.depths[level] else 1
        shapes |= _conv(f'{at}.{last}.conv', width, width)
      block += 1
  return shapes | _norm('out.0', width) | _conv('out.2', 4, width)


def vae(size: Size) -> Shapes:
  """model.Encoder and model.Decoder of AutoencoderKL."""
  ch, mult = size.vae, size.vae_mult
  shapes = _conv('encoder.conv_in', ch, 3)
  width = ch
  for level, m in enumerate(mult):
    for i in range(size.res):
      at = f'encoder.down.{level}.block.{i}'
      shapes |= _vae_res(at, width, ch * m)
      width = ch * m
    if level < len(mult) - 1:
      at = f'encoder.down.{level}.downsample.conv'
      shapes |= _conv(at, width, width)
  shapes |= _vae_mid('encoder.mid', width)
  shapes |= _norm('encoder.norm_out', width)
  shapes |= _conv('encoder.conv_out', 8, width)
  shapes |= _conv('decoder.conv_in', width, 4) | _vae_mid('decoder.mid', width)
  for level, m in reversed(list(enumerate(mult))):
    for i in range(size.res + 1):
      at = f'decoder.up.{level}.block.{i}'
      shapes |= _vae_res(at, width, ch * m)
      width = ch * m
    if level:
      shapes |= _conv(f'decoder.up.{level}.upsample.conv', width, width)
  shapes |= _norm('decoder.norm_out', width) | _conv('decoder.conv_out', 3, ch)
  shapes |= _conv('quant_conv', 8, 8, 1)
  return shapes | _conv('post_quant_conv', 4, 4, 1)


def clip(size: Size) -> Shapes:
  """transformers.CLIPTextModel, as of 2022."""
  width, layers = size.vit
  at = 'text_model.embeddings'
  shapes = {
    f'{at}.position_ids': (1, size.positions),
    f'{at}.position_embedding.weight': (size.positions, width),
    f'{at}.token_embedding.weight': (size.vocab, width),
  }
  for i in range(layers):
    at = f'text_model.encoder.layers.{i}'
    for part in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
      shapes |= _dense(f'{at}.self_attn.{part}', width, width)
    shapes |= _dense(f'{at}.mlp.fc1', 4 * width, width)
    shapes |= _dense(f'{at}.mlp.fc2', width, 4 * width)
    shapes |= _norm(f'{at}.layer_norm1', width)
    shapes |= _norm(f'{at}.layer_norm2', width)
  return shapes | _norm('text_model.final_layer_norm', width)


def open_clip(size: Size) -> Shapes:
  """The text half of open_clip.CLIP."""
  width, layers = size.open_clip
  shapes = {
    'logit_scale': (),
    'positional_embedding': (size.positions, width),
    'text_projection': (width, width),
    'token_embedding.weight': (size.vocab, width),
  }
  for i in range(layers):
    at = f'transformer.resblocks.{i}'
    shapes[f'{at}.attn.in_proj_weight'] = (3 * width, width)
    shapes[f'{at}.attn.in_proj_bias'] = (3 * width,)
    shapes |= _dense(f'{at}.attn.out_proj', width, width)
    shapes |= _dense(f'{at}.mlp.c_fc', 4 * width, width)
    shapes |= _dense(f'{at}.mlp.c_proj', width, 4 * width)
    shapes |= _norm(f'{at}.ln_1', width) | _norm(f'{at}.ln_2', width)
  return shapes | _norm('ln_final', width)


def _under(prefix: str, shapes: Shapes) -> Shapes:
  return {prefix + name: shape for name, shape in shapes.items()}


def _norm(name: str, width: int) -> Shapes:
  return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


def _dense(name: str, out: int, inputs: int) -> Shapes:
  return {f'{name}.weight': (out, inputs), f'{name}.bias': (out,)}


def _conv(name: str, out: int, inputs: int, side: int = 3) -> Shapes:
  return {f'{name}.weight': (out, inputs, side, side), f'{name}.bias': (out,)}


def _res(name: str, inputs: int, out: int, emb: int) -> Shapes:
  shapes = _norm(f'{name}.in_layers.0', inputs)
  shapes |= _conv(f'{name}.in_layers.2', out, inputs)
  shapes |= _dense(f'{name}.emb_layers.1', out, emb)
  shapes |= _norm(f'{name}.out_layers.0', out)
  shapes |= _conv(f'{name}.out_layers.3', out, out)
  if inputs != out:
    shapes |= _conv(f'{name}.skip_connection', out, inputs, 1)
  return shapes


def _transformer(name: str, width: int, depth: int, size: Size) -> Shapes:
  if not depth:
    return {}
  shapes = _norm(f'{name}.norm', width)
  for part in ('proj_in', 'proj_out'):
    if size.is_linear:
      shapes |= _dense(f'{name}.{part}', width, width)
    else:
      shapes |= _conv(f'{name}.{part}', width, width, 1)
  for i in range(depth):
    at = f'{name}.transformer_blocks.{i}'
    for attention, context in (('attn1', width), ('attn2', size.context)):
      shapes[f'{at}.{attention}.to_q.weight'] = (width, width)
      shapes[f'{at}.{attention}.to_k.weight'] = (width, context)
      shapes[f'{at}.{attention}.to_v.weight'] = (width, context)
      shapes |= _dense(f'{at}.{attention}.to_out.0', width, width)
    shapes |= _dense(f'{at}.ff.net.0.proj', 8 * width, width)
    shapes |= _dense(f'{at}.ff.net.2', width, 4 * width)
    for part in ('norm1', 'norm2', 'norm3'):
      shapes |= _norm(f'{at}.{part}', width)
  return shapes


def _vae_res(name: str, inputs: int, out: int) -> Shapes:
  shapes = _norm(f'{name}.norm1', inputs) | _conv(f'{name}.conv1', out, inputs)
  shapes |= _norm(f'{name}.norm2', out) | _conv(f'{name}.conv2', out, out)
  if inputs != out:
    shapes |= _conv(f'{name}.nin_shortcut', out, inputs, 1)
  return shapes


def _vae_mid(name: str, width: int) -> Shapes:
  shapes = _vae_res(f'{name}.block_1', width, width)
  shapes |= _norm(f'{name}.attn_1.norm', width)
  for part in ('q', 'k', 'v', 'proj_out'):
    shapes |= _conv(f'{name}.attn_1.{part}', width, width, 1)
  return shapes | _vae_res(f'{name}.block_2', width, width)
