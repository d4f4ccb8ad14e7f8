"""What a run leaves behind: export, pictures, measures and the report."""

import json
import os
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import dpo_jax
from dpo_jax import (
  build,
  distributed,
  drawing,
  folders,
  loading,
  reward_results,
  selecting,
  sharding,
  trees,
  types,
)
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.data import images as images_lib
from dpo_jax.evaluate import (
  grid,
  implicit,
  report,
  retrieval,
  stats,
)
from dpo_jax.train import evaluators, loop, progress
from dpo_jax.weights import classifiers, lora_files, lora_names


def finish(job: build.Job, result: loop.Result, path: epath.Path) -> None:
  """Exports and evaluates the finished run in its workdir `path`.

  With several processes all compute and process 0 writes. What goes into a
  bucket is made on the disk first: the size of the export must be free there.
  """
  finishers = {
    'preference': _finish_preference,
    'denoise': _finish_denoise,
    'autoencode': _finish_autoencode,
    'classify': _finish_classify,
    'reward': reward_results.finish,
  }
  digest = {
    'step': int(result.state.step),
    'state_sha256': trees.digest(result.state),
    'data_position': result.position,
  }
  _write_json(path / 'final.json', digest)
  chosen = _choose(job, result, path)
  with folders.on_disk(path, take=('metrics.jsonl',)) as local:
    finishers[job.record['task']](job, chosen, result, local)
  distributed.say(f'done: {path}')


def _write_json(path: os.PathLike, record: dict[str, Any]) -> None:
  if distributed.is_primary():
    folders.write_json(folders.to_path(path), record)


def _choose(job, result, path) -> selecting.Chosen:
  """What is exported, by export.select."""
  by = job.record['export']['select']
  if by == 'auto':
    by = 'best' if job.record['eval']['scorer'] else 'last'
  return selecting.choose(result.state, result.best, by=by, workdir=path)


def _complete(job: build.Job, params: types.Params) -> types.Params:
  """The trained components, whole."""
  return job.loop_arguments['task'].complete(params, job.opened.params)


def _pictures(encoded: list[bytes], resolution: int) -> np.ndarray:
  """Decoded, resized and centre-cropped, uint8 [n H W 3]."""
  plain = images_lib.Augmentation()
  return np.stack(
    [
      images_lib.crop_flip(
        images_lib.resize_shorter(images_lib.decode(data), resolution),
        resolution,
        plain,
      )
      for data in encoded
    ]
  )


def _as_float(images: np.ndarray) -> np.ndarray:
  return np.asarray(sd_lib.to_float(jnp.asarray(images)))


def _finish_classify(job, chosen, result, path):
  del result
  params = chosen.params['classifier']
  if not distributed.is_primary():
    return
  classifiers.save(
    path / 'export',
    config={
      'classes': list(job.data.all_images.style_names),
      'widths': list(job.record['classifier']['widths']),
      'palette': list(job.record['classifier']['palette']),
      'image_size': job.record['data']['resolution'],
    },
    params=params,
  )


def _save_model(job, path, trained):
  if distributed.is_primary():
    loading.save_model(
      path / 'export',
      job.opened,
      trained,
      dtype=job.record['export']['dtype'],
    )


def _save_adapters(job, path, params):
  """The adapters alone, where they were trained, in both layouts."""
  settings = job.adapters
  if settings is None or not distributed.is_primary():
    return
  folder = path / 'lora'
  folder.mkdir(exist_ok=True)
  for names in lora_names.LAYOUTS:
    lora_files.save(
      folder / f'{names}.safetensors',
      params['unet'],
      settings,
      config=job.opened.model.unet.config,
      names=names,
      dtype=job.record['export']['dtype'],
    )


def _finish_autoencode(job, chosen, result, path):
  """Exports the VAE with the scaling factor its latents ask for."""
  del result
  params = chosen.params['vae']
  if not distributed.is_primary():
    return
  resolution = job.record['data']['resolution']
  pictures = _as_float(_pictures(job.data.held_images.images, resolution))
  encode = jax.jit(
    lambda images: job.opened.model.vae.apply(
      {'params': params}, images, method='encode'
    )
  )
  decode = jax.jit(
    lambda mean: job.opened.model.vae.apply(
      {'params': params}, mean, method='decode'
    )
  )
  size = job.record['eval']['batch_size']
  rows = len(pictures) // size * size or len(pictures)
  moments = [encode(part) for part in np.split(pictures[:rows], rows // size)]
  mean = np.concatenate([np.asarray(m) for m, _ in moments])
  variance = np.concatenate([np.exp(np.asarray(v)) for _, v in moments])
  factor = float(1 / np.sqrt(np.mean(np.square(mean) + variance)))
  loading.save_model(
    path / 'export',
    job.opened,
    {'vae': params},
    dtype=job.record['export']['dtype'],
  )
  config_path = path / 'export' / 'vae' / 'config.json'
  config = json.loads(config_path.read_text()) | {'scaling_factor': factor}
  _write_json(config_path, config)
  shown = np.clip(np.asarray(decode(mean[:size])), -1, 1)
  grid.save_pair_grid(
    path / 'samples' / 'reconstructions.png',
    pictures[:size],
    shown,
    job.data.held_images.captions[:size],
    labels=('real', 'decoded'),
  )


def _prompts(job: build.Job) -> tuple[list[str], np.ndarray]:
  """Held-out captions in order of their hash, and a seed a picture."""
  settings = job.record['eval']
  repeats = settings['images_per_prompt']
  order = job.data.find_prompts(settings['num_prompts'])
  captions = [caption for caption in order for _ in range(repeats)]
  return captions, np.arange(len(captions), dtype=np.uint32)


def _make_sampler(job: build.Job, captions, seeds):
  """params -> uint8 images of these captions and seeds; compiled once."""
  draw = drawing.make_draw(
    job.opened,
    captions,
    seeds,
    settings=job.record['eval'],
    side=job.record['data']['resolution'],
    seed=job.record['seed'],
    mesh=job.mesh,
  )
  return lambda params: np.concatenate([images for _, images in draw(params)])


def _quality(job: build.Job, images, captions) -> dict[str, float]:
  """Style share and retrieval of one set of pictures, where configured."""
  found = {}
  if job.judge is not None:
    found['style_share'] = float(np.mean(job.judge.score(images) > 0))
  if job.record['eval']['retrieval']:
    gallery = _pictures(
      job.data.all_images.images, job.record['data']['resolution']
    )
    found['retrieval'] = retrieval.retrieval_accuracy(
      _as_float(images),
      captions,
      _as_float(gallery),
      job.data.all_images.captions,
    )
  return found


def _finish_denoise(job, chosen, result, path):
  del result
  trained = chosen.params
  _save_model(job, path, trained)
  captions, seeds = _prompts(job)
  images = _make_sampler(job, captions, seeds)(job.opened.params | trained)
  if not distributed.is_primary():
    return
  quality = _quality(job, images, captions) | {
    'n': len(captions),
    'settings': job.record['eval'],
    'exported': chosen.record,
  }
  _write_json(path / 'quality.json', quality)
  first = {
    caption: data
    for caption, data in reversed(
      list(
        zip(
          job.data.all_images.captions, job.data.all_images.images, strict=True
        )
      )
    )
  }
  shown = slice(0, 96)
  real = _pictures(
    [first[caption] for caption in captions[shown]],
    job.record['data']['resolution'],
  )
  grid.save_pair_grid(
    path / 'samples' / 'samples.png',
    _as_float(real),
    _as_float(images[shown]),
    captions[shown],
    labels=('real', 'generated'),
  )


def _finish_preference(job, chosen, result, path):
  started = time.monotonic()
  params = chosen.params
  trained = _complete(job, params)
  _save_model(job, path, trained)
  _save_adapters(job, path, params)
  captions, seeds = _prompts(job)
  sample = _make_sampler(job, captions, seeds)
  with progress.Progress(0, 3, label='evaluate') as bar:
    base = sample(job.opened.params)
    bar.update(1, {})
    aligned = sample(job.opened.params | trained)
    bar.update(2, {})
    accuracy = None
    if _holds_pairs(job):
      accuracy = _implicit_accuracy(job, params)
    bar.update(3, {})
  if not distributed.is_primary():
    return
  results, outcomes = _compare(job, base, aligned, captions)
  if accuracy is not None:
    results['implicit_accuracy'] = accuracy['value']
    results['implicit_accuracy_interval'] = accuracy
  pairs = report.ImagePairs(
    _as_float(base), _as_float(aligned), captions, outcomes
  )
  grid.save_pair_grid(
    path / 'samples' / f'step_{chosen.record["step"]:06d}.png',
    pairs.base[:48],
    pairs.aligned[:48],
    captions[:48],
    outcomes=None if outcomes is None else list(outcomes[:48]),
  )
  report.write_report(
    path,
    results=results,
    settings=job.record,
    seconds=result.seconds + time.monotonic() - started,
    metrics_path=path / 'metrics.jsonl',
    pairs=pairs,
    reasons=_reasons(job),
    judge=_judge_words(job),
    cost=_cost(job, result, time.monotonic() - started),
    data=job.counts | {'held_out_prompts': len(set(captions))},
    exported=chosen.record,
  )


def _holds_pairs(job: build.Job) -> bool:
  """Whether the held-out data are pairs, and not single likes."""
  held = job.data.held
  return not isinstance(held, tuple) or held[0].kind == 'pairs'


def _implicit_accuracy(job: build.Job, params) -> dict[str, Any]:
  """Share of held-out pairs whose winner has the larger implicit reward.

  The reward compares with the model at the start, whatever the run did.
  """
  task = job.loop_arguments['task']
  eval_step = evaluators.make_per_example(task.evaluators['pairs'], job.mesh)
  frozen, params = (
    jax.device_put(tree, sharding.state_shardings(tree, job.mesh))
    for tree in (
      {**task.frozen, **task.baseline(job.opened.params)},
      params,
    )
  )
  key = jax.random.key(job.record['seed'])

  def margins(batch):
    return eval_step(params, frozen, batch, key)['reward/margin']

  return implicit.accuracy(
    margins, job.held_batches, draws=job.record['eval']['num_draws']
  )


def _compare(job, base, aligned, captions):
  """Results of the report and the outcome of each picture."""
  ours, theirs = _quality(job, aligned, captions), _quality(job, base, captions)
  results = {
    name: {'base': theirs[name], 'aligned': ours[name]} for name in ours
  }
  if job.judge is None:
    return results, None
  scores = job.judge.score(aligned), job.judge.score(base)
  repeats = job.record['eval']['images_per_prompt']
  means = [part.reshape(-1, repeats).mean(1) for part in scores]
  results['win_rate'] = stats.win_rate(*means)
  return results, stats.wins(*scores)


def _reasons(job: build.Job) -> dict[str, str]:
  reasons = {}
  if job.judge is None:
    why = 'no judge was configured (eval.judge)'
    reasons |= {'win_rate': why, 'style_share': why}
  if not job.record['eval']['retrieval']:
    reasons['retrieval'] = 'switched off (eval.retrieval)'
  if not _holds_pairs(job):
    reasons['implicit_accuracy'] = 'the held-out data are single likes'
  return reasons


def _judge_words(job: build.Job) -> str:
  if job.judge is None:
    return ''
  return (
    'a style classifier trained on real pictures only '
    f'({job.record["eval"]["judge"]}); the preferred style is '
    f'{job.judge.preferred}'
  )


def _cost(job, result, evaluation_seconds) -> dict[str, Any]:
  trained = max(1e-9, result.seconds - result.compile_seconds)
  batch = job.record['train']['batch_size']
  devices = list(job.mesh.devices.flat)
  stats_of = jax.local_devices()[0].memory_stats() or {}
  host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {
    'train_seconds': round(result.seconds, 1),
    'compile_seconds': round(result.compile_seconds, 1),
    'evaluation_seconds': round(evaluation_seconds, 1),
    'steps_this_process': result.steps,
    'pairs_per_second': round(result.steps * batch / trained, 2),
    'peak_memory_bytes': stats_of.get('peak_bytes_in_use', host),
    'device': f'{len(devices)} x {devices[0].device_kind}',
    'versions': {'dpo_jax': dpo_jax.__version__, 'jax': jax.__version__},
  }
