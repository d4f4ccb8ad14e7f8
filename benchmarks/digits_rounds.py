"""The table and the picture of docs/digits_rounds.md.

  pip install scikit-learn==1.9.1
  python -m benchmarks.digits_rounds --digits=digits.csv.gz \
    --hand=examples/digits/crossed7.json --plot=docs/digits_rounds.png \
    none=runs/rounds/base 'round 1=runs/rounds/round_1/eval' ...

An arm is a folder with pictures/ and measured.jsonl, as tools.censor_rounds
leaves them. Malign is said by the labeller (measured.jsonl), and by a support
vector machine on the pixels of the hand-labelled sevens, another kind of model
than the labeller. Whether a picture still looks like a seven is said by one on
every second of all digits; its accuracy is that on the others. Shares have
Wilson's 95% intervals. Nearest: the median distance to the nearest of the real
sevens that are not crossed, root mean square, of 255 grey values. Spread: the
standard deviation of a pixel over the pictures, root mean square over pixels:
small where all pictures are alike.
"""

import argparse
import gzip
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from dpo_jax.data import images as images_lib
from dpo_jax.evaluate import stats
from dpo_jax.judging import items as items_lib
from dpo_jax.judging import votes as votes_lib

SIDE, LEVELS, DIGIT = 8, 16, 7
# Of the picture: pictures a row, their enlargement, room for the names.
SHOWN, ENLARGED, EDGE, ROOM = 24, 5, 3, 110


class Arm(NamedTuple):
  """Pictures [n 8 8], and which of them the labeller calls malign [n]."""

  pictures: UInt8[np.ndarray, 'n 8 8']
  malign: np.ndarray


class Judges(NamedTuple):
  """Support vector machines, and the accuracy of each on what it has not seen.

  `uncrossed` are the real sevens that are not crossed, [m 64].
  """

  digit: Any
  crossed: Any
  digit_accuracy: dict[str, Any]
  crossed_accuracy: dict[str, Any]
  uncrossed: np.ndarray


def read_arm(folder: pathlib.Path) -> Arm:
  """Raises ValueError where a picture has no vote, or not just one."""
  items = items_lib.open_pictures(str(folder / 'pictures'))
  file = votes_lib.open_for(
    folder / 'measured.jsonl', items, mode=items_lib.LIKES
  )
  votes = file.votes()
  file.close()
  choices = {vote.item: vote.choice for vote in votes}
  if len(votes) != len(items) or len(choices) != len(items):
    raise ValueError(f'{folder}: {len(votes)} votes on {len(items)} pictures')
  return Arm(
    np.stack([images_lib.load(item.pictures[0])[..., 0] for item in items]),
    np.array([choices[item.key] == 'malign' for item in items]),
  )


def make_judges(digits: pathlib.Path, hand: pathlib.Path) -> Judges:
  """Trains them; the accuracy of `crossed` is five-fold cross-validated."""
  # Of no requirement of ours.
  from sklearn import model_selection, svm

  with gzip.open(digits, 'rt') as file:
    values = np.loadtxt(file, delimiter=',')
  pixels = np.round(255 / LEVELS * values[:, :-1]) / 255
  kinds = values[:, -1].astype(int)
  digit = svm.SVC(C=10).fit(pixels[::2], kinds[::2])
  right = digit.predict(pixels[1::2]) == kinds[1::2]

  sevens, labels = pixels[kinds == DIGIT], json.loads(hand.read_text())
  crossed = np.isin(np.arange(len(sevens)), labels['crossed'])
  known = ~np.isin(np.arange(len(sevens)), labels['ambiguous'])
  machine = svm.SVC(C=10)
  folds = model_selection.StratifiedKFold(5, shuffle=True, random_state=0)
  found = model_selection.cross_val_predict(
    machine, sevens[known], crossed[known], cv=folds
  )
  return Judges(
    digit,
    machine.fit(sevens[known], crossed[known]),
    stats.share(right),
    stats.share(found == crossed[known]),
    sevens[known & ~crossed],
  )


def row(name: str, arm: Arm, judges: Judges) -> str:
  """A line of the table."""
  pixels = arm.pictures.reshape(len(arm.pictures), -1) / 255
  gaps = pixels[:, None] - judges.uncrossed[None]
  nearest = 255 * np.sqrt((gaps**2).mean(-1)).min(1)
  cells = [
    name,
    f'{len(pixels)}',
    percent(stats.share(arm.malign)),
    percent(stats.share(judges.crossed.predict(pixels))),
    percent(stats.share(judges.digit.predict(pixels) == DIGIT)),
    f'{np.median(nearest):.0f}',
    f'{spread(pixels):.0f}',
  ]
  return f'| {" | ".join(cells)} |'


def spread(pixels: np.ndarray) -> float:
  """Of pictures [n pixels] with values of 0 to 1, in 255 grey values."""
  return 255 * float(np.sqrt(pixels.var(0).mean()))


def percent(share: dict[str, Any]) -> str:
  """A share with its interval."""
  value, low, high = (100 * share[key] for key in ('value', 'low', 'high'))
  return f'{value:.1f} [{low:.1f}, {high:.1f}]'


def save_rows(path: pathlib.Path, arms: dict[str, Arm]) -> None:
  """Writes a PNG: a row an arm, malign pictures framed in red.

  Equal places have equal noise where an arm leaves out none.
  """
  cell = SIDE * ENLARGED + 2 * EDGE
  sheet = Image.new(
    'RGB', (ROOM + SHOWN * (cell + 2), len(arms) * (cell + 2)), 'white'
  )
  draw = ImageDraw.Draw(sheet)
  for line, (name, arm) in enumerate(arms.items()):
    y = line * (cell + 2)
    draw.text((4, y + cell // 2 - 5), name, 'black')
    for i, picture in enumerate(arm.pictures[:SHOWN]):
      x = ROOM + i * (cell + 2)
      colour = '#dc2828' if arm.malign[i] else '#404040'
      draw.rectangle((x, y, x + cell - 1, y + cell - 1), colour)
      tile = Image.fromarray(picture).resize(
        (SIDE * ENLARGED,) * 2, Image.Resampling.NEAREST
      )
      sheet.paste(tile, (x + EDGE, y + EDGE))
  path.parent.mkdir(parents=True, exist_ok=True)
  sheet.save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the table; 2 with one line for a folder that is no arm's."""
  parser = argparse.ArgumentParser('benchmarks.digits_rounds')
  parser.add_argument('--digits', type=pathlib.Path, required=True)
  parser.add_argument('--hand', type=pathlib.Path, required=True)
  parser.add_argument('--plot', type=pathlib.Path)
  parser.add_argument('arms', nargs='+', help='NAME=FOLDER')
  flags = parser.parse_args(argv)
  try:
    arms = {}
    for word in flags.arms:
      name, _, folder = word.partition('=')
      arms[name] = read_arm(pathlib.Path(folder))
  except ValueError as error:
    print(f'error: {word}: {error}', file=sys.stderr)
    return 2
  judges = make_judges(flags.digits, flags.hand)
  print(
    f'digit judge right on {percent(judges.digit_accuracy)}%, judge of crosses '
    f'on {percent(judges.crossed_accuracy)}%; spread of the real uncrossed '
    f'sevens {spread(judges.uncrossed):.0f}\n'
  )
  print(
    '| arm | pictures | malign, % | malign by the other judge, % '
    '| still a seven, % | nearest | spread |\n|---|---|---|---|---|---|---|'
  )
  for name, arm in arms.items():
    print(row(name, arm, judges))
  if flags.plot:
    save_rows(flags.plot, arms)
  return 0


if __name__ == '__main__':
  sys.exit(main())
