"""report.json for programs and a standalone report.html for people."""

import base64
import dataclasses
import functools
import io
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np
from jaxtyping import Float
from PIL import Image

from dpo_jax.evaluate import captions, curves, grid

MEASURES = ('win_rate', 'style_share', 'retrieval', 'implicit_accuracy')
NOT_MEASURED = 'not measured in this run'


@dataclasses.dataclass(frozen=True)
class ImagePairs:
  """Pictures to show, entry i of one prompt and seed.

  base, aligned: images [n H W 3] in [-1, 1].
  outcomes: 1 aligned won, 0 lost, 0.5 tied; None when nothing judged them.
  """

  base: Float[np.ndarray, 'n H W 3']
  aligned: Float[np.ndarray, 'n H W 3']
  prompts: Sequence[str]
  outcomes: Sequence[float] | None = None

  def __post_init__(self):
    grid.check_pairs(self.base, self.aligned, self.prompts, self.outcomes)


def write_report(
  workdir: str | os.PathLike,
  *,
  results: Mapping[str, Any],
  settings: Mapping[str, Any],
  seconds: float,
  metrics_path: str | os.PathLike | None = None,
  pairs: ImagePairs | None = None,
  reasons: Mapping[str, str] | None = None,
  judge: str = '',
  cost: Mapping[str, Any] | None = None,
  data: Mapping[str, Any] | None = None,
  title: str = 'Alignment report',
  max_pairs: int = 48,
) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes workdir/report.json and workdir/report.html; returns their paths.

  results: win_rate (`stats.win_rate`), style_share and retrieval (each
    {'base': share, 'aligned': share}, plus anything worth keeping),
    implicit_accuracy (a share); further keys are kept as they are. A measure
    that is None or absent is null in the JSON with reasons[name] beside it.
  settings: the resolved config. seconds: wall time of the whole run.
  judge: who judged and how, in a phrase: 'a style classifier trained on ...'.
  cost: pairs_per_second, peak_memory_bytes, device, versions, ...
  data: counts such as pairs, ties_dropped, held_out_prompts.
  max_pairs: the first so many of `pairs` are shown, unselected.

  Both files appear whole or not at all; the page needs no network, holds no
  script, and shows captions as text. Raises ValueError naming a result that
  is not of its form, and OSError for an unreadable metrics file.
  """
  measured, missing = _measures(results, reasons or {})
  metrics = curves.Metrics([], 0)
  if metrics_path is not None:
    metrics = curves.read_metrics(metrics_path)
  record = {
    'title': title,
    **measured,
    'reasons': missing,
    'judge': judge,
    'seconds': float(seconds),
    'cost': cost or {},
    'data': data or {},
    'metrics': {
      'steps_logged': len(metrics.rows),
      'damaged_lines': metrics.damaged,
    },
    **{k: v for k, v in results.items() if k not in MEASURES},
    'settings': settings,
  }
  record = _plain(record)
  page = (
    _environment()
    .get_template('report.html.j2')
    .render(
      report=record,
      others={
        k: record[k] for k in results if k not in MEASURES and k in record
      },
      charts=curves.make_charts(metrics.rows),
      bins=curves.timestep_charts(metrics.rows),
      figures=_figures(pairs, max_pairs) if pairs else [],
      total_pairs=len(pairs.prompts) if pairs else 0,
    )
  )
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  text = json.dumps(record, indent=2, allow_nan=False) + '\n'
  return (
    _write_whole(workdir / 'report.json', text),
    _write_whole(workdir / 'report.html', page),
  )


def _measures(results, reasons):
  """The four measures, checked, and why each null is null."""
  measured, missing = {}, {}
  for name in MEASURES:
    value = results.get(name)
    measured[name] = value
    if value is None:
      missing[name] = reasons.get(name, NOT_MEASURED)
    elif name == 'implicit_accuracy':
      _check_share(name, value)
    else:
      wanted = ('base', 'aligned')
      if name == 'win_rate':
        wanted = ('value', 'low', 'high', 'n')
      if not isinstance(value, Mapping) or not set(wanted) <= set(value):
        raise ValueError(f'results[{name!r}]: got {value!r}; give {wanted}')
      for key in wanted:
        if key != 'n':
          _check_share(f'{name}.{key}', value[key])
  unknown = sorted(set(reasons) - set(MEASURES))
  if unknown:
    raise ValueError(f'reasons: {unknown} unknown; allowed: {list(MEASURES)}')
  return measured, missing


def _check_share(name, value):
  number = np.asarray(value)
  if number.dtype.kind not in 'iuf' or number.ndim or not 0 <= number <= 1:
    raise ValueError(f'results: {name} is {value!r}; give a share in [0, 1]')


def _figures(pairs, limit):
  shown = range(min(limit, len(pairs.prompts)))
  left = grid.to_pixels(pairs.base[: len(shown)])
  right = grid.to_pixels(pairs.aligned[: len(shown)])
  names = {1.0: 'won', 0.0: 'lost', 0.5: 'tied'}
  return [
    {
      'base': _data_uri(left[i]),
      'aligned': _data_uri(right[i]),
      'prompt': captions.shorten(pairs.prompts[i], 160),
      'outcome': names[float(pairs.outcomes[i])]
      if pairs.outcomes is not None
      else '',
      'tiny': min(left.shape[1:3]) < 96,
    }
    for i in shown
  ]


def _data_uri(pixels):
  """An image for the page: exact PNG when small, else a 384 pixel JPEG."""
  image, buffer = Image.fromarray(pixels), io.BytesIO()
  if max(image.size) <= 128:
    kind = 'png'
    image.save(buffer, format='PNG', optimize=True)
  else:
    kind = 'jpeg'
    image.thumbnail((384, 384))
    image.save(buffer, format='JPEG', quality=90)
  code = base64.b64encode(buffer.getvalue()).decode('ascii')
  return f'data:image/{kind};base64,{code}'


@functools.cache
def _environment():
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('dpo_jax.evaluate'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    # Every text that reaches the page, not only captions: a config, too,
    # can hold a bidi override or half a surrogate pair.
    finalize=_inert,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters.update(
    percent=_percent,
    duration=_duration,
    words=_words,
    figure=_figure,
    pretty=_pretty,
  )
  return environment


def _inert(value):
  if isinstance(value, markupsafe.Markup) or not isinstance(value, str):
    return value
  return captions.printable(value)


def _percent(value: float) -> str:
  return f'{100 * value:.1f}%'


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min' if hours else f'{minutes} min {rest} s'


def _words(key: str) -> str:
  return key.removesuffix('_bytes').replace('_', ' ')


def _figure(value: Any, key: str = '') -> str:
  """A value of the cost and data tables, in a reader's units."""
  if isinstance(value, bool) or value is None:
    return {True: 'yes', False: 'no', None: 'unknown'}[value]
  if not isinstance(value, (int, float)):
    return str(value)
  if key.endswith('_bytes'):
    scale, unit = (30, 'GiB') if value >= 2**30 else (20, 'MiB')
    return f'{value / 2**scale:.2f} {unit}'
  if key.endswith('seconds') or key == 'seconds':
    return _duration(value)
  return f'{value:,}' if isinstance(value, int) else f'{value:,.4g}'


def _pretty(value: Any) -> str:
  return json.dumps(value, indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
  """JSON's own types; numbers JSON cannot hold become their names."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if isinstance(value, (str, bool)) or value is None:
    return value
  if hasattr(value, '__array__') and not isinstance(value, type):
    return _plain(np.asarray(value).tolist())
  if isinstance(value, int):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else str(value)
  return str(value)


def _write_whole(path, text):
  partial = path.with_name(path.name + '.partial')
  partial.write_bytes(text.encode('utf-8', 'backslashreplace'))
  os.replace(partial, path)
  return path
