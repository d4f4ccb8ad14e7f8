"""report.json and report.html of a comparison of two models."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dpo_jax.evaluate import captions, comparison, pages


def write(
  folder: str | os.PathLike,
  *,
  results: Mapping[str, Mapping[str, Any]],
  scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
  pairs: Sequence[comparison.Pair],
  names: tuple[str, str],
  settings: Mapping[str, Any],
  max_pairs: int = 60,
) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes report.json and report.html; returns their paths.

  results: of each scorer what comparison.compare returns; the first scorer
  sorts the gallery. scores: of each scorer (a [n], b [n]). names: of a and b.
  max_pairs: shown, half of them the largest gains and half the largest losses.

  The page stands alone: no network, no script, captions as text.
  """
  first = next(iter(results))
  margins = scores[first][1] - scores[first][0]
  order = np.argsort(-margins, kind='stable')
  record = pages.plain(
    {
      'a': names[0],
      'b': names[1],
      'scorers': dict(results),
      'settings': dict(settings),
      'pictures': [
        {
          'file': pair.a.name,
          'id': pair.prompt_id,
          'prompt': pair.prompt,
          'scores': {
            name: [float(a[i]), float(b[i])] for name, (a, b) in scores.items()
          },
        }
        for i, pair in enumerate(pairs)
      ],
    }
  )
  half = max(1, max_pairs // 2)
  best = [i for i in order[:half] if margins[i] > 0]
  worst = [i for i in order[::-1][:half] if margins[i] < 0]
  page = (
    pages.environment()
    .get_template('compare.html.j2')
    .render(
      report=record,
      first=first,
      best=[_figure(pairs[i], float(margins[i])) for i in best],
      worst=[_figure(pairs[i], float(margins[i])) for i in worst],
      total=len(pairs),
    )
  )
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(record, indent=2, allow_nan=False) + '\n'
  return (
    pages.write_whole(folder / 'report.json', text),
    pages.write_whole(folder / 'report.html', page),
  )


def _figure(pair: comparison.Pair, margin: float) -> dict[str, Any]:
  shown = {}
  for side, path in (('a', pair.a), ('b', pair.b)):
    with Image.open(path) as image:
      pixels = np.asarray(image.convert('RGB'))
    shown[side] = pages.data_uri(pixels)
    tiny = min(pixels.shape[:2]) < 96
  return {
    **shown,
    'prompt': captions.shorten(pair.prompt, 160),
    'margin': margin,
    'tiny': tiny,
  }
