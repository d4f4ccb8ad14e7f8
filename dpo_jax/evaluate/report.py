"""report.json for programs and a standalone report.html for people."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from dpo_jax.evaluate import captions, curves, grid, pages

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
  exported: Mapping[str, Any] | None = None,
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
  exported: the step that these results and the export are of: `step`, `of` so
    many, `by` 'last' or 'best', and `best`, what best.json says or None.
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
    'exported': exported,
    'metrics': {
      'steps_logged': len(metrics.rows),
      'damaged_lines': metrics.damaged,
    },
    **{k: v for k, v in results.items() if k not in MEASURES},
    'settings': settings,
  }
  record = pages.plain(record)
  page = (
    pages.environment()
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
    pages.write_whole(workdir / 'report.json', text),
    pages.write_whole(workdir / 'report.html', page),
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
      'base': pages.data_uri(left[i]),
      'aligned': pages.data_uri(right[i]),
      'prompt': captions.shorten(pairs.prompts[i], 160),
      'outcome': names[float(pairs.outcomes[i])]
      if pairs.outcomes is not None
      else '',
      'tiny': min(left.shape[1:3]) < 96,
    }
    for i in shown
  ]
