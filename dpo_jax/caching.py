"""Latents and text states of a prepared folder, computed once.

The shards are written anew, with the VAE's posterior of their pictures, into
FOLDER/cache.incomplete; a shard that is there is not computed again. Once all
are there they take the place of the old ones, cache.json last: a folder that
was left in between is refused by whoever reads it, and completed by the next
call.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dpo_jax
from dpo_jax import encoding, loading, trees
from dpo_jax.data import (
  cached,
  record_fields,
  record_metadata,
  records,
  side_files,
)

WORK = 'cache.incomplete'
# Captions in a shard of text states.
CAPTIONS_A_SHARD = 1024
_SETTINGS, _CHECKSUMS = 'settings.json', 'checksums.json'
Progress = Callable[[str, int, int], None]


def digest_weights(opened: loading.Opened) -> dict[str, str]:
  """SHA-256 of the parameters of the VAE and of each text encoder."""
  names = ('vae', *opened.model.text_encoders)
  return {name: trees.digest(opened.params[name]) for name in names}


def check_cache(
  folder: str | os.PathLike, opened: loading.Opened
) -> cached.Description:
  """What the folder's cache is, if this very model computed it.

  Raises ValueError where there is no cache, and naming both models and their
  hashes where another model did.
  """
  found = cached.read_description(pathlib.Path(folder))
  if found is None:
    raise ValueError(
      f'{folder}: has no cache of latents; prepare with --model, or train from '
      'its pictures'
    )
  _check_weights(folder, found, opened, digest_weights(opened))
  return found


def _check_weights(folder, found, opened, weights) -> None:
  wrong = sorted(
    name
    for name in found.weights.keys() | weights.keys()
    if found.weights.get(name) != weights.get(name)
  )
  if wrong:
    name = wrong[0]
    raise ValueError(
      f'{folder}: its cache is of the model {found.model.get("name")!r}, '
      f'{name} sha256 {found.weights.get(name)}; this is '
      f'{opened.source["name"]!r}, {name} sha256 {weights.get(name)}: train '
      'that model, or prepare with this one'
    )


def add_cache(
  folder: str | os.PathLike,
  *,
  model: str | loading.Opened,
  mesh: jax.sharding.Mesh,
  size: int,
  flips: bool = True,
  batch_size: int = 0,
  keep_images: bool = True,
  on_progress: Progress = lambda stage, done, total: None,
) -> cached.Description:
  """Adds latents and text states to a prepared folder, or continues to.

  `model` is opened on `mesh`, or named as for loading.open_model. Pictures are
  scaled to `size` pixels (shorter side) and cut to the middle square, with
  `flips` also mirrored; mean and logvar are stored as float16. The text states
  of every distinct caption, and of the empty prompt, make the data set
  'captions'. Batches of `batch_size` records or captions (0: four a device)
  are split over all devices. Without `keep_images` only latents remain.

  on_progress(stage, done, total): stage 'latents' counts records, stage 'text'
  captions.

  Raises ValueError for sizes that do not fit, a folder that has or was begun
  with another cache, damaged records and numbers beyond float16.
  """
  root = pathlib.Path(folder)
  batch_size = batch_size or 4 * mesh.devices.size
  if batch_size % mesh.devices.size:
    raise ValueError(
      f'batch size {batch_size}: must be a multiple of the {mesh.devices.size} '
      'devices'
    )
  opened = model
  if isinstance(model, str):
    opened = loading.open_model(model, mesh=mesh, dtype='float32')
  if jax.process_count() > 1:
    raise ValueError(
      f'{jax.process_count()} processes: a cache is computed by one, on all of '
      'its devices'
    )
  if not opened.model.text_encoders:
    raise ValueError(
      f'{opened.source["name"]}: works on pixels and takes no text, so that '
      'there is nothing to compute before; prepare without --model'
    )
  opened.model.latent_shape(size)
  description = cached.Description(
    model=opened.source,
    weights=digest_weights(opened),
    size=size,
    flips=1 + flips,
    keep_images=keep_images,
    compute_dtype=str(jnp.dtype(opened.model.vae.dtype)),
    versions={'dpo_jax': dpo_jax.__version__, 'jax': jax.__version__},
  )
  found = cached.read_description(root)
  if found is not None:
    _check_same(root, found.to_json(), description.to_json())
    # What a kill may have left after the last step.
    shutil.rmtree(root / WORK, ignore_errors=True)
    return found
  build = _Build(root, opened, mesh, description, batch_size, on_progress)
  build.begin()
  if not build.computed:
    build.compute()
  build.publish()
  return description


def _check_same(root, found: dict[str, Any], wanted: dict[str, Any]) -> None:
  """Raises ValueError unless both are caches of the same."""
  # The weights are compared, not where they lay.
  for key in sorted(wanted.keys() - {'model', 'versions'}):
    if found.get(key) != wanted[key]:
      raise ValueError(
        f'{root}: has or was begun with a cache of another {key} '
        f'({found.get(key)!a:.200}, now {wanted[key]!a:.200}); give the same, '
        'or prepare another folder'
      )


class _Build:
  """A cache under way."""

  def __init__(self, root, opened, mesh, description, batch_size, progress):
    self.root, self.work = root, root / WORK
    self.opened, self.mesh = opened, mesh
    self.description, self.batch_size = description, batch_size
    self.progress = progress
    self.kind, self.had_checksums = 'pairs', False

  @property
  def computed(self) -> bool:
    """Whether only the exchange of the folders is left to do."""
    return (self.work / cached.NAME).is_file()

  def begin(self) -> None:
    """Makes the work folder, or compares the settings of the one there."""
    path = self.work / _SETTINGS
    if path.is_file():
      begun = json.loads(path.read_bytes())
      self.kind, self.had_checksums = begun['kind'], begun['checksums']
      _check_same(self.root, begun['cache'], self.description.to_json())
      return
    if not (self.root / self.kind).exists():
      self.kind = 'likes'
    metadata = record_metadata.read(self.root, self.kind)
    if 'moments' in metadata.fields:
      raise ValueError(
        f'{self.root}: has latents but no {cached.NAME}; prepare it again'
      )
    if len(metadata.splits) != 1:
      raise ValueError(
        f'{self.root}: has the splits {", ".join(metadata.splits)}; a cache is '
        'made for folders with one'
      )
    self.had_checksums = (self.root / _CHECKSUMS).is_file()
    self.work.mkdir(exist_ok=True)
    begun = {
      'kind': self.kind,
      'checksums': self.had_checksums,
      'cache': self.description.to_json(),
    }
    _write(path, json.dumps(begun, indent=1).encode())

  def compute(self) -> None:
    """Writes all that the cache is into the work folder."""
    (split,) = record_metadata.read(self.root, self.kind).splits
    source = records.open_folder(self.root, kind=self.kind, split=split)
    shapes = _shapes(self.opened, self.description)
    captions = self._compute_latents(source, split, shapes)
    ids = self._compute_text(captions, split, shapes)
    side_files.write_index(self.work / cached.INDEX, ids)
    text = json.dumps(self.description.to_json(), indent=1) + '\n'
    _write(self.work / cached.NAME, text.encode())

  def _compute_latents(self, source, split, shapes) -> dict[int, str]:
    """Writes the records with latents; returns all captions by id."""
    scores = [name for name in source.fields if name.startswith('score_')]
    fields = record_fields.fields(self.kind, cache=shapes, scores=scores)
    data = record_metadata.data_folder(self.work, self.kind)
    data.mkdir(parents=True, exist_ok=True)
    distinct = self.work / 'distinct'
    distinct.mkdir(exist_ok=True)
    make = encoding.LatentMaker(
      self.opened.model,
      self.opened.params['vae'],
      mesh=self.mesh,
      kind=self.kind,
      size=self.description.size,
      flips=self.description.flips,
      keep_images=self.description.keep_images,
    )
    captions, start = {cached.caption_id(''): ''}, 0
    for shard in source.shards:
      rows = range(start, start + shard.length)
      # Written before the shard, so that it is there with it.
      beside = distinct / f'{shard.name}.json'
      if not (data / shard.name).is_file():
        self._compute_shard(
          data / shard.name, beside, source, rows, fields, make
        )
      for key, caption in json.loads(beside.read_bytes()).items():
        self._add_caption(captions, int(key), caption)
      start += shard.length
      self.progress('latents', start, len(source))
    lengths = [shard.length for shard in source.shards]
    records.write_metadata(self.work, self.kind, fields, {split: lengths})
    return captions

  def _compute_shard(self, path, beside, source, rows, fields, make) -> None:
    captions = {}
    with records.ShardWriter(path, fields) as writer:
      for batch in make.batches(source, rows, self.batch_size):
        for record in batch:
          writer.write(record)
          caption = record['caption'].decode('utf-8', 'replace')
          self._add_caption(captions, int(record['caption_id']), caption)
        self.progress('latents', rows.start + writer.length, len(source))
      _write(beside, json.dumps(captions).encode())

  def _add_caption(self, captions: dict[int, str], key, caption) -> None:
    if captions.setdefault(key, caption) != caption:
      raise ValueError(
        f'{self.root}: caption id {key} is that of {caption!a:.80} and of '
        f'{captions[key]!a:.80}; prepare the folder again'
      )

  def _compute_text(self, captions, split, shapes) -> np.ndarray:
    """Writes the text states of all captions; returns the ids in order."""
    ids = np.array(sorted(captions), np.uint64)
    fields = record_fields.fields('captions', cache=shapes)
    data = record_metadata.data_folder(self.work, 'captions')
    data.mkdir(parents=True, exist_ok=True)
    count = -(-len(ids) // CAPTIONS_A_SHARD)
    parts = np.split(ids, range(CAPTIONS_A_SHARD, len(ids), CAPTIONS_A_SHARD))
    encode = encoding.TextMaker(
      self.opened.model,
      self.opened.params,
      self.opened.tokenizers,
      mesh=self.mesh,
    )
    done = 0
    for i, part in enumerate(parts):
      name = record_metadata.shard_name('captions', split, i, count)
      if not (data / name).is_file():
        with records.ShardWriter(data / name, fields) as writer:
          for start in range(0, len(part), self.batch_size):
            some = part[start : start + self.batch_size]
            texts = [captions[int(key)] for key in some]
            for record in encode(some, texts, self.batch_size):
              writer.write(record)
            self.progress('text', done + writer.length, len(ids))
      done += len(part)
      self.progress('text', done, len(ids))
    lengths = [len(part) for part in parts]
    records.write_metadata(self.work, 'captions', fields, {split: lengths})
    return ids

  def publish(self) -> None:
    """Puts the work in the place of what was there, as often as called."""
    (self.root / _CHECKSUMS).unlink(missing_ok=True)
    old = self.work / 'old'
    old.mkdir(exist_ok=True)
    for name in (self.kind, 'captions', cached.INDEX):
      # Of what is there twice the one in the work folder is the new one.
      if (self.work / name).exists():
        if (self.root / name).exists():
          (self.root / name).rename(old / name)
        (self.work / name).rename(self.root / name)
    if self.had_checksums:
      _write_checksums(self.root)
    (self.work / cached.NAME).replace(self.root / cached.NAME)
    shutil.rmtree(self.work)


def _shapes(
  opened: loading.Opened, description: cached.Description
) -> record_fields.CacheShapes:
  """Shapes of what is stored, found without computing."""
  h, w, c = opened.model.latent_shape(description.size)
  ids = opened.tokenizers.encode([''])[0]
  cond = jax.eval_shape(opened.model.encode_text, opened.params, ids)
  pooled = cond.get('pooled_embeds')
  return record_fields.CacheShapes(
    moments=(description.flips, h, w, 2 * c),
    input_ids=ids.shape[1:],
    prompt_embeds=cond['prompt_embeds'].shape[1:],
    pooled_embeds=None if pooled is None else pooled.shape[1:],
  )


def _write(path: pathlib.Path, data: bytes) -> None:
  """Writes a file that is there in full or not at all."""
  partial = path.with_name(f'{path.name}.partial')
  with partial.open('wb') as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  partial.rename(path)


def _write_checksums(root: pathlib.Path) -> None:
  """Sizes and SHA-256 of all shards."""
  sums = {}
  for path in sorted(
    root.glob(f'*/{record_metadata.VERSION}/*.array_record-*')
  ):
    with path.open('rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
    name = path.relative_to(root).as_posix()
    sums[name] = {'bytes': path.stat().st_size, 'sha256': digest}
  _write(root / _CHECKSUMS, json.dumps(sums, indent=1).encode() + b'\n')
