"""Generates pictures from a file of prompts.

  python -m dpo_jax.tools.generate --model=MODEL --prompts=prompts.txt \\
    --out=pictures [--weights=runs/sd15] [--sampler=dpmpp_2m --steps=25] \\
    [--lora=style.safetensors --lora_scale=0.8] \\
    [--reward=FOLDER --reward_scale=2 --recurrence=4 | --reject=0.1]

MODEL is a diffusers folder, a gs:// path, a hub id or a single file. Pictures
are named by the prompt's id; manifest.jsonl says how each was made and its
SHA-256. The same command continues where it stopped: pictures that are there
and verified are kept. A picture's noise follows from --seed, the prompt's id
and its number alone, so that two models can be compared picture by picture.
An unconditional model (DDPMPipeline, DDIMPipeline) ignores the prompts, whose
ids name the pictures all the same.

With --negative_weights guidance leads away from another UNet (Diffusion-NPO:
one trained on swapped labels, data.label_noise=1) instead of from the same
one's output for the negative prompt, which the other takes.

A reward (a run of task reward, exported) guides sampling away from what is
malign, or with --reject has such pictures drawn again: docs/censoring.md.
"""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from dpo_jax import distributed, loading, sharding, trees, types
from dpo_jax.diffusion import samplers
from dpo_jax.evaluate import generate, grid, manifest
from dpo_jax.evaluate import prompts as prompts_lib
from dpo_jax.models import lora
from dpo_jax.tools import arguments, censoring, generate_inputs
from dpo_jax.train import progress
from dpo_jax.weights import lora_files

# diffusers' defaults: 7.5 for Stable Diffusion, 5.0 for SDXL.
GUIDANCE_SCALES = {0: 7.5, 5: 5.0, 6: 5.0}
# Pictures on the contact sheet at most.
SHEET = 256


def _parse(argv: Sequence[str]):
  number = arguments.number
  parser = arguments.Parser('dpo_jax.tools.generate', __doc__)
  add = parser.add_argument
  add('--model', required=True)
  add('--prompts', required=True, help='.txt .json .jsonl .csv .tsv .parquet')
  add('--out', required=True, help='folder for the pictures')
  add('--weights', help="a run's workdir, a pipeline or a UNet folder")
  add('--step', type=number(int, low=0), help='of a run given as --weights')
  add('--negative_weights', help='of a UNet to be guided away from')
  add('--lora', help='adapters of the UNet: safetensors, diffusers or kohya')
  add('--lora_scale', type=number(float, low=-100), help='default: 1')
  add('--revision', default='', help='of a hub id')
  add('--variant', default='', choices=('', 'fp16'))
  add('--configs', default='', help='for a single file: see the README')
  add('--prediction_type', default='', choices=('', 'epsilon', 'v_prediction'))
  add('--sampler', default='auto', choices=('auto', *samplers.SAMPLERS))
  add('--steps', type=number(int, low=1), default=50)
  add('--guidance_scale', type=number(float, low=0), help='1 or less is off')
  add('--guidance_rescale', type=number(float, low=0, high=1), default=0.0)
  add('--eta', type=number(float, low=0, high=1), default=0.0)
  add('--karras', type=arguments.switch, help='true or false')
  add('--negative_prompt', default='')
  add('--seed', type=number(int, low=0, high=2**31 - 1), default=0)
  add('--images_per_prompt', type=number(int, low=1), default=1)
  add('--size', type=arguments.size, help="HxW; default: the model's own")
  add('--batch', type=number(int, low=1), help='pictures at once')
  add('--limit', type=number(int, low=1), help='only the first prompts')
  add('--latents', help='.npy of start noise [n h w c], n pictures or 1')
  add('--init_images', help='folder of pictures named by prompt id (SDEdit)')
  add('--strength', type=number(float, low=0, high=1), default=0.8)
  add('--refiner', help='SDXL refiner')
  add('--refiner_start', type=number(float, low=0, high=1), default=0.8)
  add('--dtype', default='auto', choices=('auto', 'float32', 'bfloat16'))
  censoring.add_flags(add)
  values = parser.parse(argv)
  censoring.check_flags(values)
  return values


def main(argv: Sequence[str]) -> None:
  """Generates; ValueError says what is wrong with the input."""
  values = _parse(distributed.join(argv, os.environ))
  distributed.check_started()
  prompts = prompts_lib.read(values.prompts)[: values.limit]
  mesh = sharding.make_mesh()
  batch_size = _batch_size(values.batch, mesh)
  opened = _open(values, values.model, mesh)
  params = dict(opened.params)
  if values.weights:
    params |= loading.load_weights(values.weights, opened, step=values.step)
  if values.lora:
    params['unet'] = _merged(values, opened, params['unet'])
  elif values.lora_scale is not None:
    raise ValueError('--lora_scale: is for adapters; give --lora too')
  if values.negative_weights:
    negative = loading.load_weights(values.negative_weights, opened)
    params['negative'] = negative['unet']
  refiner = _open(values, values.refiner, mesh) if values.refiner else None
  settings = _settings(values, opened)
  reward = None
  if values.reward:
    reward = censoring.open_reward(values, opened, settings, mesh)
    params |= reward.params
  if not opened.model.text_encoders:
    _check_unconditional(values)
  entries = generate_inputs.make_entries(prompts, values)
  inputs = generate_inputs.read(
    values, opened, refiner, prompts, entries, settings
  )
  if refiner:
    params['refiner'] = {
      name: tree for name, tree in refiner.params.items() if name != 'vae'
    }
  generate_batches = functools.partial(
    generate.generate_batches,
    generate.make_sample_fn(
      opened.model,
      settings,
      refiner=refiner and refiner.model,
      censor=reward and reward.censor,
      driver=generate.choose_driver(mesh),
    ),
    params,
    seed=values.seed,
    batch_size=batch_size,
    mesh=mesh,
  )
  record = _record(values, opened, refiner, params, settings)
  if reward:
    record['reward'] = reward.record
  _fill(values, entries, inputs, record, generate_batches, batch_size)


def _fill(values, entries, inputs, record, generate_batches, batch_size):
  """Makes what is missing in the folder."""
  # One process owns the folder and tells the others what is to be done.
  pictures, missing = None, np.ones(len(entries), bool)
  if distributed.is_primary():
    pictures = manifest.Pictures(values.out, record)
    missing[:] = [not pictures.is_done(entry) for entry in entries]
  if jax.process_count() > 1:
    missing = np.array(multihost_utils.broadcast_one_to_all(missing))
  if not missing.all():
    there = len(entries) - int(missing.sum())
    distributed.say(f'{there} pictures are there')

  def batches(rows, numbers):
    chosen = {name: array[rows] for name, array in inputs.items()}
    return generate_batches(chosen, numbers)

  rest = []
  if values.reject is None:
    _add_missing(batches, entries, missing, pictures)
  elif missing.any():
    rest = censoring.keep_accepted(
      batches, entries, missing, pictures, values=values, batch_size=batch_size
    )
  if pictures is not None:
    left_out = {entry['file'] for entry in rest}
    made = [entry for entry in entries if entry['file'] not in left_out]
    pictures.close([entry['file'] for entry in made])
    if made:
      _contact_sheet(pictures.path, made)
    distributed.say(f'{len(made)} pictures in {values.out}')
  censoring.refuse_rest(rest, values)


def _add_missing(batches, entries, missing, pictures) -> None:
  todo = np.flatnonzero(missing)
  seeds = np.array([entries[i]['seed'] for i in todo], np.uint32)
  with progress.Progress(0, len(todo), label='pictures') as bar:
    for rows, made in batches(todo, seeds):
      if pictures is not None:
        censoring.add_images(pictures, [entries[i] for i in todo[rows]], made)
      bar.update(rows.stop, {})


def _open(values, name: str, mesh) -> loading.Opened:
  dtype = values.dtype
  if dtype == 'auto':
    on_cpu = mesh.devices.flat[0].platform == 'cpu'
    dtype = 'float32' if on_cpu else 'bfloat16'
  return loading.open_model(
    name,
    mesh=mesh,
    revision=values.revision,
    variant=values.variant,
    configs=values.configs,
    prediction_type=values.prediction_type,
    dtype=dtype,
  )


def _merged(values, opened: loading.Opened, params: types.Params):
  """The UNet's parameters with the adapters in them, placed as they are."""
  adapters, settings = lora_files.load(values.lora, opened.model.unet.config)
  scale = 1.0 if values.lora_scale is None else values.lora_scale
  merged = lora.merge(params, adapters, settings, scale=scale)
  return jax.tree.map(
    lambda new, old: jax.device_put(new, old.sharding), merged, params
  )


def _check_unconditional(values) -> None:
  """Says what is ignored; raises ValueError for what cannot be meant."""
  for name in ('negative_prompt', 'refiner'):
    if getattr(values, name):
      raise ValueError(
        f'--{name}: {values.model} is unconditional, it takes no text'
      )
  distributed.say(
    f'{values.model} is unconditional: the prompts only name the pictures',
  )


def _batch_size(given: int | None, mesh) -> int:
  devices = mesh.devices.size
  if given is None:
    return 4 * devices
  if given % devices:
    raise ValueError(
      f'--batch={given}: must be a multiple of the {devices} devices'
    )
  return given


def _settings(values, opened: loading.Opened) -> generate.Settings:
  model = opened.model
  sampler = values.sampler
  if sampler == 'auto':
    own = str(model.scheduler_config.get('_class_name'))
    sampler = samplers.from_scheduler_class(own)
    if sampler is None:
      sampler = 'ddim'
      distributed.say(f'the model names {own}; --sampler=ddim is used')
  size = values.size or loading.own_size(opened)
  if size is None:
    raise ValueError(f'--size is needed: {opened.base} names no sample_size')
  model.latent_shape(size)
  scale = values.guidance_scale
  if scale is None:
    scale = (
      GUIDANCE_SCALES[model.micro_cond_dim] if model.text_encoders else 1.0
    )
  _check_guidance(values, model, scale)
  return generate.Settings(
    size=size,
    sampler=sampler,
    num_steps=values.steps,
    guidance_scale=scale,
    guidance_rescale=values.guidance_rescale,
    eta=values.eta,
    karras=values.karras,
    strength=values.strength if values.init_images else 1.0,
    refiner_start=values.refiner_start,
  )


def _check_guidance(values, model, scale: float) -> None:
  if not values.negative_weights:
    model.check_guidance(scale)
  elif scale <= 1.0:
    raise ValueError(
      f'--negative_weights={values.negative_weights}: says nothing with a '
      f'guidance scale of {scale:g}; give --guidance_scale above 1'
    )


def _record(values, opened, refiner, params, settings) -> dict[str, Any]:
  """What the folder's pictures have in common."""
  record = {
    'model': opened.source,
    'unet_sha256': trees.digest(params['unet']),
    'settings': dataclasses.asdict(settings) | {'size': list(settings.size)},
    'seed': values.seed,
    'compute_dtype': str(opened.model.unet.dtype),
  }
  if refiner:
    record['refiner'] = refiner.source
  if values.weights:
    record['weights'] = {'path': values.weights, 'step': values.step}
  if values.lora:
    scale = 1.0 if values.lora_scale is None else values.lora_scale
    record['lora'] = {'path': values.lora, 'scale': scale}
  if 'negative' in params:
    record['negative_weights'] = {
      'path': values.negative_weights,
      'unet_sha256': trees.digest(params['negative']),
    }
  for name in ('latents', 'init_images'):
    if getattr(values, name):
      record[name] = getattr(values, name)
  return record


def _contact_sheet(folder: pathlib.Path, entries: list[dict]) -> None:
  shown = entries[:SHEET]
  pictures = []
  for entry in shown:
    with Image.open(folder / entry['file']) as image:
      image.thumbnail((320, 320))
      pictures.append(np.asarray(image.convert('RGB')))
  more = f', {len(entries) - SHEET} more' if len(entries) > SHEET else ''
  grid.save_contact_sheet(
    folder / 'contact_sheet.png',
    np.stack(pictures),
    [entry['prompt'] for entry in shown],
    title=f'{len(shown)} pictures{more}',
  )


if __name__ == '__main__':
  sys.exit(arguments.run(main, sys.argv[1:]))
