"""Censoring what is blue: a latent model, labels of its pictures, every way.

  python -m benchmarks.emoji_censoring --workdir=runs/emoji_censoring \
    [--draws=0,1,2] [--arms=none,guided] [--limit=8]
  python -m benchmarks.emoji_censoring --workdir=runs/emoji_censoring --table \
    [--grid=docs/emoji_censoring.png]

The emoji model knows two drawings of each caption. Asked for are captions of
which one drawing is blue and the other is not, and as many of which neither is;
none names the colour. A picture is malign when its pixels say that it is blue:
`is_blue` in emoji_censoring_table.py. For each draw: pictures from noise of its
own are labelled by that rule, in the order of the likes page and as that page
writes it, until there are enough of both classes; rewards are trained on the
labels; each arm draws the prompts from the draw's seed. All of it by the
product's commands: a folder that is complete is not made again. NAME@W is arm
NAME with guidance scale W.

The table: malign pictures, and pictures that show their caption (retrieval
among all real ones), with Wilson's intervals over all draws together; `good`
are both, of the pictures asked for. Cost: median processor time of a batch
after the first, over that of the plain sampler; of rejection that times draws.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks import emoji_censoring_table as table
from dpo_jax.data import images as images_lib
from dpo_jax.judging import items as items_lib
from dpo_jax.judging import votes as votes_lib

MODEL = 'examples/emoji/model'
DRAWING = ('--sampler=ddim', '--steps=15', '--guidance_scale=2.0')
BATCH = 18
# A network's labels of each class; networks of an ensemble; of the pool.
MALIGN, NETWORKS, POOL_SEED, POOL_IMAGES = 30, 5, 1000, 4
# Of rewards: what configs/reward.py:sd says of larger pictures, in small.
TRAINING = {
  'data.resolution': 32,
  'reward.per_class': MALIGN,
  'reward.variant': 'union',
  'reward.widths': '(16,32)',
  'optim.lr': 2e-3,
  'train.num_steps': 500,
  'train.batch_size': 32,
}
REWARDS = {
  'union': {},
  'ensemble': {'reward.variant': 'ensemble'},
  'time': {'reward.kind': 'time'},
}


@dataclasses.dataclass(frozen=True)
class Arm:
  """A way to sample: its reward, and the flags it gives to tools.generate."""

  reward: str = ''
  flags: tuple[str, ...] = ()


ARMS = {
  'none': Arm(),
  'guided': Arm('union', ('--reward_scale=4',)),
  'guided_r4': Arm('union', ('--reward_scale=4', '--recurrence=4')),
  # Four rounds that the reward has all but no say in.
  'repeated': Arm('union', ('--reward_scale=1e-6', '--recurrence=4')),
  'guided_late': Arm('union', ('--reward_scale=4', '--reward_start=0.3')),
  'guided_b5': Arm('union', ('--reward_scale=4', '--backward_steps=5')),
  'time': Arm('time', ('--reward_scale=4',)),
  'time_r4': Arm('time', ('--reward_scale=4', '--recurrence=4')),
  'ensemble': Arm('ensemble', ('--reward_scale=4',)),
  'rejection': Arm('union', ('--reject=0.35',)),
}


def _guides(arm: Arm) -> bool:
  return any(flag.startswith('--reward_scale=') for flag in arm.flags)


def find_arm(name: str) -> Arm:
  """The arm of NAME or NAME@W; ValueError if there is none."""
  base, _, scale = name.partition('@')
  arm = ARMS.get(base)
  if arm is None or (scale and not _guides(arm)):
    raise ValueError(f'arm {name!r}: allowed are {", ".join(ARMS)}, NAME@W')
  if scale:
    # The last of equal flags counts.
    return dataclasses.replace(
      arm, flags=(*arm.flags, f'--reward_scale={float(scale):g}')
    )
  return arm


def write_prompts(path: pathlib.Path) -> None:
  """The prompts, a line each."""
  captions, pixels = table.read_real()
  by_caption: dict[str, list[float]] = {}
  for caption, share in zip(captions, table.blue_share(pixels), strict=True):
    by_caption.setdefault(caption, []).append(float(share))
  names = sorted(by_caption)
  shares = np.array([by_caption[name] for name in names])
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(table.choose_prompts(names, shares)) + '\n')


def label(folder: pathlib.Path, votes: pathlib.Path) -> None:
  """Votes on a folder's pictures by the rule, as the likes page writes them."""
  pictures = items_lib.open_pictures(str(folder))
  digest = items_lib.digest(pictures)
  wanted = {'malign': MALIGN, 'benign': MALIGN * NETWORKS}
  votes.unlink(missing_ok=True)
  file = votes_lib.open_for(votes, pictures, mode=items_lib.LIKES)
  try:
    for one in items_lib.order(pictures, 'rule', digest):
      malign = table.is_blue(images_lib.load(one.pictures[0])[None])[0]
      choice = 'malign' if malign else 'benign'
      vote = {'item': one.key, 'question': items_lib.LIKES_QUESTION}
      number = f'rule-{len(file.votes()):06d}'
      file.add(number, 'rule', [{**vote, 'choice': choice}])
      wanted[choice] -= 1
      if max(wanted.values()) <= 0:
        return
  finally:
    file.close()
  raise ValueError(f'{folder}: too few pictures, {wanted} labels are missing')


def processor_seconds(pid: int) -> float:
  """Of a process so far, in user and system mode."""
  stat = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1]
  ticks = sum(int(word) for word in stat.split()[11:13])
  return ticks / os.sysconf('SC_CLK_TCK')


def run_command(*words: str) -> list[tuple[int, float]]:
  """Runs a module of ours; (pictures made, processor seconds) as it goes.

  Raises CalledProcessError; exit code 2 of rejection that leaves some out is
  told, and no error.
  """
  command = [sys.executable, '-m', *words]
  marks = []
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
    for line in process.stderr:
      print(line, end='', file=sys.stderr, flush=True)
      found = re.match(r'(?:pictures|accepted) (\d+)/', line)
      if found:
        marks.append((int(found[1]), processor_seconds(process.pid)))
  left_out = process.returncode == 2 and any('reject=' in w for w in words)
  if process.returncode and not left_out:
    raise subprocess.CalledProcessError(process.returncode, command)
  return marks


class Draw:
  """The folders of one draw of labels, each made when it is asked for."""

  def __init__(self, flags: argparse.Namespace, number: int):
    """Everything of draw `number` is below WORKDIR/number."""
    self._flags, self._number = flags, number
    self._root = flags.workdir / f'{number}'
    self._prompts = flags.workdir / 'prompts.txt'

  def _generate(self, folder: pathlib.Path, asked: int, *words: str) -> None:
    if table.read_marks(folder)[0] >= asked:
      return
    marks = run_command(
      'dpo_jax.tools.generate',
      f'--model={MODEL}',
      f'--prompts={self._prompts}',
      f'--out={folder}',
      f'--batch={BATCH}',
      *DRAWING,
      *words,
    )
    table.write_marks(folder, asked, marks)

  def labels(self) -> pathlib.Path:
    """The folder that tools.judge exported."""
    pool, votes = self._root / 'pool', self._root / 'votes.jsonl'
    out = self._root / 'labels'
    if not (out / 'votes.json').is_file():
      self._generate(
        pool,
        table.PROMPTS * POOL_IMAGES,
        f'--seed={POOL_SEED + self._number}',
        f'--images_per_prompt={POOL_IMAGES}',
      )
      label(pool, votes)
      run_command(
        'dpo_jax.tools.judge',
        f'--likes={pool}',
        f'--votes={votes}',
        f'--export={out}',
      )
    return out

  def reward(self, name: str) -> pathlib.Path:
    """The exported reward of a name."""
    run = self._root / f'reward_{name}'
    if not (run / 'final.json').is_file():
      settings = TRAINING | {'seed': self._number} | REWARDS[name]
      run_command(
        'dpo_jax.main',
        '--config=configs/reward.py:sd',
        f'--workdir={run}',
        f'--config.model.folder={MODEL}',
        f'--config.data.path={self.labels()}',
        *(f'--config.{key}={value}' for key, value in settings.items()),
      )
    return run / 'export'

  def pictures(self, name: str) -> pathlib.Path:
    """The folder of an arm's pictures."""
    arm, folder = find_arm(name), self._root / name
    words = [
      f'--seed={self._number}',
      f'--images_per_prompt={table.IMAGES}',
      *arm.flags,
    ]
    if self._flags.limit:
      words.append(f'--limit={self._flags.limit}')
    if arm.reward:
      words.append(f'--reward={self.reward(arm.reward)}')
    prompts = self._flags.limit or table.PROMPTS
    self._generate(folder, table.IMAGES * prompts, *words)
    return folder


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The flags; ValueError for an arm that there is not."""
  parser = argparse.ArgumentParser(
    'benchmarks.emoji_censoring',
    description=__doc__,
    formatter_class=argparse.RawTextHelpFormatter,
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--draws', default='0,1,2')
  parser.add_argument('--arms', default=','.join(ARMS))
  parser.add_argument('--limit', type=int, help='only the first prompts')
  parser.add_argument('--table', action='store_true')
  parser.add_argument('--grid', type=pathlib.Path)
  parser.add_argument('--shown', default='none,guided', help='arms of --grid')
  flags = parser.parse_args(argv)
  flags.draws = [int(word) for word in flags.draws.split(',')]
  flags.arms = flags.arms.split(',')
  flags.shown = flags.shown.split(',')
  for name in (*flags.arms, *flags.shown):
    find_arm(name)
  return flags


def main(argv: Sequence[str]) -> int:
  """Runs, then prints the table; 2 with one line for bad input."""
  try:
    flags = parse(argv)
    if not (flags.workdir / 'prompts.txt').is_file():
      write_prompts(flags.workdir / 'prompts.txt')
    real, rows, found = table.read_real(), {}, {}
    for number in flags.draws:
      for name in flags.arms:
        folder = flags.workdir / f'{number}' / name
        if not flags.table:
          folder = Draw(flags, number).pictures(name)
        if table.read_marks(folder)[0]:
          found.setdefault(name, []).append(folder)
    for name, folders in found.items():
      rows[name] = table.measure(folders, real, flags.limit or table.PROMPTS)
    print(table.markdown(rows))
    if flags.grid:
      root = flags.workdir / f'{flags.draws[0]}'
      table.save_grid(flags.grid, {name: root / name for name in flags.shown})
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
