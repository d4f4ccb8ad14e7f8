"""What was found in a data set: inspect.json, inspect.txt, inspect.html."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import markupsafe
import numpy as np
from jaxtyping import UInt8

from dpo_jax.evaluate import captions, charts, dataset_findings, pages

# Rows of the tables on the page; the JSON holds all.
SHOWN = 30
# Sizes and token lengths that have a bar of their own.
BARS = 12
CAPTION_LENGTH = 160


class Side(NamedTuple):
  """One picture of a figure; pixels None with the reason for it."""

  name: str
  pixels: UInt8[np.ndarray, 'H W 3'] | None
  winner: bool = False
  reason: str = 'not kept'


class Figure(NamedTuple):
  """One or two pictures over a caption."""

  sides: Sequence[Side]
  caption: str
  note: str = ''


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Figures under a title."""

  title: str
  note: str
  figures: Sequence[Figure]


def write(
  folder: str | os.PathLike,
  result: Mapping[str, Any],
  galleries: Sequence[Gallery] = (),
) -> list[pathlib.Path]:
  """Writes inspect.json, inspect.txt and inspect.html; returns their paths.

  result: as `tools.inspect` assembles it. Each file appears whole or not at
  all; the page needs no network, holds no script, and shows captions as text.
  """
  result = pages.plain(result)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  found = dataset_findings.find(result)
  record = {**result, 'findings': [one._asdict() for one in found]}
  page = (
    pages.environment()
    .get_template('dataset.html.j2')
    .render(
      result=result,
      headline=_headline(result, found),
      findings=found,
      tiles=_tiles(result),
      charts=_charts(result),
      generators=_generators(result),
      galleries=[_gallery(one) for one in galleries if one.figures],
      repeats=_repeats(result),
      build=_flat(result['build']),
      build_text=json.dumps(result['build'], indent=2)[:20_000],
      leaks=[_leaks(one) for one in result['leaks']],
      failures=[_failure(one) for one in result['failures']],
    )
  )
  return [
    pages.write_whole(
      folder / 'inspect.json', json.dumps(record, indent=2) + '\n'
    ),
    pages.write_whole(folder / 'inspect.txt', as_text(result)),
    pages.write_whole(folder / 'inspect.html', page),
  ]


def as_text(result: Mapping[str, Any]) -> str:
  """The same for a terminal; captions are printable, one line each."""
  lines = [f'data set {_cut(result["data"], 200)}, split {result["split"]}', '']
  for one in dataset_findings.find(result):
    lines.append(f'{"!" if one.bad else "-"} {_cut(one.text, 400)}')
  sections = [
    ('counts', result['counts']),
    ('labels', _label_counts(result)),
    ('repeats', _repeats(result)),
    ('build report', _flat(result['build'])),
    ('sizes (height x width)', dict(_sizes(result))),
    ('tokens a caption', dict(_tokens(result) or [])),
    ('not measured', result['reasons']),
  ]
  for title, values in sections:
    if values:
      lines += ['', title]
      lines += [f'  {_cut(k, 50):<34} {_value(v)}' for k, v in values.items()]
  lines += ['', 'generators']
  for one in _generators(result):
    rate = (
      dataset_findings.share_in_words(one['rate'])
      if one['rate']
      else 'no decided pair'
    )
    lines.append(
      f'  {one["label"]:<34} {rate}  won {one["wins"]} lost {one["losses"]} '
      f'ties {one["ties"]}'
    )
  for leak in result['leaks']:
    lines += ['', f'prompts of {_cut(leak["file"], 200)} that are here']
    lines += [
      f'  {one["records"]} x {one["shown"]}'
      for one in _leaks(leak)['examples'][:SHOWN]
    ]
  if result['failures']:
    lines += ['', 'cannot be used', *map(_failure, result['failures'])]
  return '\n'.join(lines) + '\n'


def _headline(result, found) -> str:
  bad = sum(one.bad for one in found)
  count = _number(result['counts']['records'])
  text = f'{count} {result["kind"]} of '
  text += f'{_number(result["counts"]["captions"])} captions'
  if not bad:
    return f'{text}, and nothing that asks for action.'
  return f'{text}, and {bad} {"thing" if bad == 1 else "things"} to look at.'


def _tiles(result) -> list[dict[str, str]]:
  counts, labels = result['counts'], result['labels']
  shown = counts['images_shown']
  share = labels['first_share']
  pairs = result['kind'] == 'pairs'
  tiles = [
    (
      'Pairs' if pairs else 'Labelled pictures',
      _number(counts['records']),
      f'{_number(counts["unreadable"])} damaged',
    ),
    (
      'Captions',
      _number(counts['captions']),
      f'{_number(counts["captions_normalised"])} without case and spaces',
    ),
    ('Pictures', _number(counts['images']), f'shown {_number(shown)} times'),
    (
      'Image 0 wins' if pairs else 'Liked',
      pages.percent(share['value']) if share else '\u2013',
      f'{dataset_findings.interval(share)}; {_number(labels["even"])} undecided'
      if share
      else 'no decided label',
    ),
  ]
  alike = result['alike']
  if alike:
    tiles.append(
      (
        'Near-duplicates',
        _number(alike['images']),
        f'in {_number(alike["clusters"])} groups, the largest of '
        f'{_number(alike["largest"])}',
      )
    )
  return [
    {'title': title, 'value': value, 'note': note}
    for title, value, note in tiles
  ]


class _Chart(NamedTuple):
  title: str
  note: str
  svg: markupsafe.Markup


def _charts(result) -> list[_Chart]:
  made = []
  sizes = _sizes(result)[:6]
  if sizes:
    total = result['counts']['images_shown']
    rest = result['sizes']['distinct'] - len(sizes)
    note = f'Height x width; {rest} other sizes.' if rest else 'Height x width.'
    made.append(
      _Chart(
        'Pictures by size',
        f'{note} {_number(total)} showings.',
        charts.bar_chart([k for k, _ in sizes], [v for _, v in sizes]),
      )
    )
  tokens = _tokens(result)
  if tokens:
    info = result['tokens']
    note = (
      f'With the two control tokens. {_number(info["at_limit"])} of '
      f'{_number(info["captions"])} captions fill all {info["limit"]} places.'
    )
    made.append(
      _Chart(
        'Tokens a caption',
        note,
        charts.bar_chart([k for k, _ in tokens], [v for _, v in tokens]),
      )
    )
  labels = _label_counts(result)
  if any(labels.values()):
    made.append(
      _Chart(
        'Labels',
        f'{_number(result["labels"]["soft"])} of them soft (neither 0, 1 nor '
        'one half).',
        charts.bar_chart(list(labels), list(labels.values())),
      )
    )
  return made


def _sizes(result) -> list[tuple[str, int]]:
  return [
    (f'{one["height"]}x{one["width"]}', one['images'])
    for one in result['sizes']['sizes'][:BARS]
  ]


def _tokens(result) -> list[tuple[str, int]] | None:
  """(range of lengths, captions) in at most BARS ranges."""
  info = result['tokens']
  if not info:
    return None
  counts = info['counts']
  width = max(1, -(-len(counts) // BARS))
  ranges = []
  for start in range(0, len(counts), width):
    stop = min(start + width, len(counts))
    name = f'{start}-{stop - 1}' if stop - start > 1 else str(start)
    ranges.append((name, sum(counts[start:stop])))
  while len(ranges) > 1 and not ranges[0][1]:
    ranges.pop(0)
  return ranges


def _label_counts(result) -> dict[str, int]:
  names = ('image 0', 'image 1', 'undecided')
  if result['kind'] != 'pairs':
    names = ('liked', 'not liked', 'undecided')
  keys = ('first', 'second', 'even')
  return {
    name: result['labels'][key] for name, key in zip(names, keys, strict=True)
  }


def _repeats(result) -> dict[str, int]:
  alike = result['alike'] or {}
  return {
    **{k: v for k, v in result['repeats'].items() if isinstance(v, int)},
    **{
      f'near_duplicate_{k}': v
      for k, v in alike.items()
      if isinstance(v, int) and not isinstance(v, bool)
    },
  }


def _flat(build) -> dict[str, int]:
  """Counts of the build report, and its reasons; the folder's own words."""
  found = {}
  for name, prefix in (('counts', ''), ('unreadable_images', 'unreadable: ')):
    counts = build.get(name) if isinstance(build, Mapping) else None
    for key, number in counts.items() if isinstance(counts, Mapping) else ():
      if isinstance(number, int):
        found[prefix + _cut(key, 50)] = number
  return dict(list(found.items())[:SHOWN])


def _generators(result) -> list[dict[str, Any]]:
  return [
    {**one, 'label': _cut(one['name'] or '(not named)', 60)}
    for one in result['generators'][:SHOWN]
  ]


def _leaks(leak) -> dict[str, Any]:
  shown = [
    {**one, 'shown': _cut(one['prompt'], CAPTION_LENGTH)}
    for one in leak['examples']
  ]
  return {**leak, 'examples': shown}


def _gallery(gallery: Gallery) -> dict[str, Any]:
  sizes = [
    min(side.pixels.shape[:2])
    for one in gallery.figures
    for side in one.sides
    if side.pixels is not None
  ]
  return {
    'title': gallery.title,
    'note': gallery.note,
    'tiny': bool(sizes) and max(sizes) < 96,
    'figures': [
      {
        'caption': _cut(one.caption, CAPTION_LENGTH),
        'note': one.note,
        'sides': [
          {
            'name': side.name,
            'winner': side.winner,
            'reason': _cut(side.reason, 80),
            'uri': None if side.pixels is None else pages.data_uri(side.pixels),
          }
          for side in one.sides
        ],
      }
      for one in gallery.figures
    ],
  }


def _failure(one) -> str:
  return f'record {one["index"]}: {_cut(one["reason"], 300)}'


def _cut(text: str, limit: int) -> str:
  return captions.shorten(str(text), limit)


def _number(value: int) -> str:
  return f'{value:,}'


def _value(value: Any) -> str:
  return _cut(value, 200) if isinstance(value, str) else pages.figure(value)
