"""Prepares preference data: checked, counted, in shards, resumable.

  python -m dpo_jax.tools.prepare --source=pickapic --out=prepared \\
    --format=pickapic [--size=512] [--shards=960] [--split=train]

SOURCE is a file, a folder, a glob, or (pickapic) a data set's id on the hub.
Formats: pickapic (parquet), hpd (JSON of ranked lists), folder (pictures and
a .jsonl of caption, winner, loser), jsonl (such lines, or caption, image,
liked). Written is a tensorflow-datasets data set of ArrayRecord shards with
build_report.json, build_report.txt and checksums.json. Until all is done it is
called OUT.incomplete; the same command continues there, shard by shard.

With --model the VAE's moments and the text states of each distinct caption
are computed too, for --size, so that training needs neither.
"""

import contextlib
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence

from dpo_jax import caching, loading, sharding
from dpo_jax.data import build_files, build_report, building, examples
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.data.formats import rows as rows_lib
from dpo_jax.data.formats import sources
from dpo_jax.tools import arguments, ticker
from dpo_jax.weights import diffusers_maps, pipeline
from dpo_jax.weights import sources as weight_sources

DEFAULT_CACHE_SIZE = 512


def _parse(argv: Sequence[str]):
  number = arguments.number
  parser = arguments.Parser('dpo_jax.tools.prepare', __doc__)
  add = parser.add_argument
  add('--source', required=True, help='file, folder, glob, or hub id')
  add('--out', required=True, help='folder to write; must not be there')
  add('--format', required=True, choices=sources.FORMATS)
  add('--split', default='train', help='name of the split; see the README')
  add('--revision', default='', help='of a hub id: branch, tag or commit')
  add('--limit', type=number(int, low=1), help='only the first rows')
  add(
    '--shards',
    type=number(int, low=1, high=99_999),
    help=f'default: one for {building.SHARD_ROWS} rows',
  )
  add(
    '--size',
    type=number(int, low=8, high=8192),
    help='larger pictures are scaled to this shorter side; with --model also '
    f'the side of the cached crops (default there: {DEFAULT_CACHE_SIZE})',
  )
  add('--threads', type=number(int, low=1), help='default: one a core')
  add('--tokenizer', help='folder of a tokenizer, to count long captions')
  add('--model', help='compute latents and text states with this model')
  add(
    '--flips',
    type=arguments.switch,
    default=True,
    help='latents of the mirrored pictures too; true or false',
  )
  add(
    '--keep_images',
    type=arguments.switch,
    default=True,
    help='keep the pictures beside their latents; true or false',
  )
  add(
    '--batch',
    type=number(int, low=1),
    default=0,
    help='records at once for --model; default: four a device',
  )
  return parser.parse(argv)


def main(argv: Sequence[str]) -> None:
  """Prepares; ValueError and OSError say what is wrong with the input."""
  values = _parse(argv)
  if not building.is_split(values.split):
    raise ValueError(
      f'--split={values.split}: must be small letters, digits and _, such as '
      'train'
    )
  tokenizers = _load_tokenizers(values)
  building.check_out(values.out)
  source = sources.open_source(
    values.source, values.format, split=values.split, revision=values.revision
  )
  options = _options(values, source, tokenizers)
  threads = values.threads or os.cpu_count() or 1
  with (
    warnings.catch_warnings(),
    building.Build(values.out, source, options) as build,
    examples.ExampleMaker(
      size=values.size, threads=threads, count_long=_counter(tokenizers)
    ) as make,
    ticker.Ticker(options.rows, label='rows') as bar,
  ):
    # Pillow tells of what it finds odd in a picture, a line for each.
    warnings.filterwarnings('ignore', module='PIL')
    build.build_shards(make, on_progress=bar.update)
    if values.model and not build.complete:
      _add_cache(build.folder, values)
    report = build.finish()
  print(build_report.to_text(report), end='', file=sys.stderr)
  print(f'wrote {values.out}', file=sys.stderr)


def _options(
  values, source: rows_lib.Source, tokenizers: tokenizer_lib.Tokenizers | None
) -> building.Options:
  """The numbers of a build, and what a resume must agree in."""
  rows = min(sum(file.rows for file in source.files), values.limit or 1 << 62)
  shards = values.shards or max(1, -(-rows // building.SHARD_ROWS))
  if shards > max(1, rows):
    raise ValueError(
      f'--shards={shards}: there are only {rows} rows; give fewer'
    )
  settings = {
    'format': values.format,
    'kind': source.kind,
    'split': values.split,
    'shards': shards,
    'limit': values.limit,
    'size': values.size,
    'model': values.model,
    'flips': values.flips if values.model else None,
    'keep_images': values.keep_images if values.model else None,
    'token_limit': tokenizers and tokenizers.members[0].max_length,
    'files': build_files.describe_files(source.files),
  }
  return building.Options(values.split, shards, rows, settings)


def _load_tokenizers(values) -> tokenizer_lib.Tokenizers | None:
  """Those of --tokenizer, else of --model; None without either.

  Raises ValueError for a model that could not compute the cache later, too.
  """
  given = values.tokenizer and tokenizer_lib.load_all([values.tokenizer])
  if not values.model:
    for name in ('flips', 'keep_images'):
      if not getattr(values, name):
        raise ValueError(f'--{name}=false: is for --model, which is not given')
    return given
  found = weight_sources.resolve(values.model)
  if found.kind == 'folder':
    everything = tuple(diffusers_maps.COMPONENTS)
    parts = pipeline.load(found.path, without=everything)
    model = loading.make_model(parts, dtype='float32')
    model.latent_shape(values.size or DEFAULT_CACHE_SIZE)
    return given or tokenizer_lib.load_all(parts.tokenizer_folders)
  if not given:
    raise ValueError(
      f'--model={values.model}: a single file has no tokenizer; give '
      '--tokenizer=FOLDER too'
    )
  return given


def _counter(
  tokenizers: tokenizer_lib.Tokenizers | None,
) -> Callable[[list[str]], int] | None:
  """How many of some captions are cut by the tokenizers."""
  return tokenizers and (lambda captions: tokenizers.encode(captions)[1])


def _add_cache(folder: pathlib.Path, values) -> None:
  """Computes the latents and the text states, shard by shard."""
  with contextlib.ExitStack() as stack:
    bars = {}

    def show(stage: str, done: int, total: int) -> None:
      if stage not in bars:
        bars[stage] = stack.enter_context(ticker.Ticker(total, label=stage))
      bars[stage].update(done)

    caching.add_cache(
      folder,
      model=values.model,
      mesh=sharding.make_mesh(),
      size=values.size or DEFAULT_CACHE_SIZE,
      flips=values.flips,
      batch_size=values.batch,
      keep_images=values.keep_images,
      on_progress=show,
    )


if __name__ == '__main__':
  sys.exit(arguments.run(main, sys.argv[1:]))
