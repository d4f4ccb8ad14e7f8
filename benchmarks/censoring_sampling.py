"""Draws of the arms of benchmarks/censoring.py, and the models they need."""

import dataclasses
import functools
import io
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from benchmarks import censoring_parts as parts
from dpo_jax import loading, types
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax.diffusion import reward_guidance, samplers
from dpo_jax.models import reward as reward_lib

TIME = reward_lib.RewardConfig(
  'time', in_channels=1, widths=(8, 16, 32), norm_num_groups=4
)
CLEAN = dataclasses.replace(TIME, kind='clean')
# The paper's are 0.02 and 3e-4, which in as few steps as there are here taught
# networks this small next to nothing.
BENIGN_WEIGHT, RATE = 0.2, 3e-3
NETWORKS = 5
# Copies of a labelled picture; see `vary`.
COPIES = 30


@dataclasses.dataclass(frozen=True)
class Arm:
  """How an arm's pictures are made.

  Attributes:
    networks: the reward: '' (none) | single | union | ensemble, which know
      noise, | clean (a union that does not).
    scale: w.
    recurrence, backward_steps: R and B.
    start: the share of the trajectory before it guides.
    corrected: whether the networks' logits are set right for the share of
      malign pictures in the pool: tools.generate --malign_share.
    keep: the share that rejection by these networks keeps; 1 is all.
    objective: what the generator is trained by, '' for as it is.
    numbers: that objective's.
    away: the scale of guidance away from that trained generator, which has
      learnt the swapped labels, by the one as it is (Diffusion-NPO); 0: none.
  """

  networks: str = ''
  scale: float = 0.0
  recurrence: int = 1
  backward_steps: int = 0
  start: float = 0.0
  corrected: bool = False
  keep: float = 1.0
  objective: str = ''
  numbers: tuple[tuple[str, float], ...] = ()
  away: float = 0.0

  @property
  def module(self) -> reward_lib.Reward:
    """What its networks are."""
    return reward_lib.Reward(CLEAN if self.networks == 'clean' else TIME)

  @property
  def settings(self) -> reward_guidance.Settings | None:
    """Of the guidance; None where there is none."""
    if not self.scale and not self.backward_steps:
      return None
    return reward_guidance.Settings(
      scale=self.scale,
      place='x_0_hat' if self.module.config.kind == 'clean' else 'x_t',
      backward_steps=self.backward_steps,
    )

  def offsets(self, malign_share: float) -> tuple[float, ...]:
    """What is added to its networks' logits, none where nothing is."""
    if not self.corrected:
      return ()
    count = NETWORKS if self.networks == 'ensemble' else 1
    # Of the malign labels each network has all, of the benign ones its part.
    parts_of = NETWORKS if self.networks in ('union', 'clean') else 1
    odds = BENIGN_WEIGHT * parts_of
    return (reward_lib.find_offset(malign_share, odds),) * count

  def calls(self) -> float:
    """Calls of the UNet a step and accepted picture; gradients count twice."""
    through = 2 if self.scale and self.module.config.kind == 'clean' else 0
    networks = 2 if self.away else 1
    guided = (networks + through) * self.recurrence
    return (self.start + (1 - self.start) * guided) / self.keep


class Sampler:
  """Draws pictures with the ddpm sampler, round by round from Python.

  On a CPU some gradients are slow inside of `lax.scan`: docs/censoring.md.
  """

  def __init__(
    self,
    model: sd_lib.StableDiffusion,
    *,
    num_steps: int,
    batch_size: int,
    side: int = parts.SIDE,
  ):
    """num_steps: of the sampler, out of the model's."""
    self._model, self._batch = model, batch_size
    self._plan = samplers.make_plan(
      model.scheduler_config, num_steps, sampler='ddpm'
    )
    self._shape = model.latent_shape(side)
    self._compiled: dict[Any, Any] = {}

  def __call__(
    self,
    unet: types.Params,
    numbers: np.ndarray,
    *,
    seed: int,
    arm: Arm,
    members: Sequence[types.Params] = (),
    negative: types.Params | None = None,
    malign_share: float = 0.5,
  ) -> tuple[parts.Pictures, float]:
    """(a picture a number, seconds of processor time without compiling).

    Equal numbers have equal noise, whatever the arm. negative: the UNet that an
    arm leads away from. malign_share: of what the plain sampler draws.
    """
    made, spent = [], 0.0
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    places = samplers.places(self._plan)
    rows = [
      jax.tree.map(lambda column, i=i: column[i], places)
      for i in range(self._plan.num_steps)
    ]
    for start in range(0, len(numbers), self._batch):
      own = np.resize(numbers[start : start + self._batch], self._batch)
      keys = fold(jax.random.key(seed), jnp.asarray(own, jnp.uint32))
      again = fold(jax.random.key(seed + 1), jnp.asarray(own, jnp.uint32))
      noise = parts.noise_of(keys, jnp.uint32(0), self._shape)
      carry = samplers.start(self._plan.from_noise(noise))
      inputs = unet, negative, list(members), (keys, again)
      plain = dataclasses.replace(
        arm, scale=0.0, backward_steps=0, recurrence=1, corrected=False
      )
      steps = [
        samplers.repeat(
          functools.partial(
            self._round(one, inputs, carry, rows[0], malign_share), *inputs
          ),
          one.recurrence,
        )
        for one in ((plain, arm) if arm.start else (arm, arm))
      ]
      first = round((1 - arm.start) * self._model.schedule.num_steps)
      begun = time.process_time()
      for row in rows:
        carry = steps[int(row.row.t < first)](carry, row)
      pictures = np.asarray(sd_lib.to_uint8(carry.state))[..., 0]
      spent += time.process_time() - begun
      made.append(pictures[: len(numbers) - start])
      share = min(start + self._batch, len(numbers)) / len(numbers)
      if share < 1.0:
        left = spent / share - spent
        print(
          f'{share:.0%} of {len(numbers)}, {left:.0f} s left', file=sys.stderr
        )
    return np.concatenate(made), spent

  def _round(self, arm, inputs, carry, row, malign_share):
    offsets = arm.offsets(malign_share)
    name = arm.settings, arm.recurrence, arm.away, offsets, len(inputs[2])
    if name in self._compiled:
      return self._compiled[name]
    model, plan, shape = self._model, self._plan, self._shape
    module = arm.module

    def once(unet, negative, members, keys, carry, row, j):
      denoise = model.make_denoise_fn(
        unet, {}, {}, guidance_scale=arm.away or 1.0, negative_params=negative
      )
      if arm.settings is not None:
        denoise = reward_guidance.guide(
          denoise,
          reward_lib.make_log_reward_fn(module, members, offsets),
          plan,
          arm.settings,
        )
      return samplers.make_round(
        plan,
        denoise,
        noise_fn=lambda i: parts.noise_of(keys[0], i + 1, shape),
        recurrence=arm.recurrence,
        renoise_fn=lambda i: parts.noise_of(keys[1], i + 1, shape),
      )(carry, row, j)

    given = *inputs, carry, row, np.int32(0)
    compiled = jax.jit(once).lower(*given).compile()
    self._compiled[name] = compiled
    return compiled


def vary(pictures: parts.Pictures, *, seed: int) -> parts.Pictures:
  """COPIES of each picture, turned, moved, scaled, blurred, bolder or thinner.

  The paper's are 10 that are turned by up to 20 degrees. Networks of these took
  for malign what the few malign strokes happened to have besides, thinness.
  """
  pixel = pictures.shape[1] / parts.SIDE
  return parts.augment(
    pictures,
    COPIES,
    degrees=20.0,
    shift=2.0 * pixel,
    scale=0.1,
    blur=0.7 * pixel,
    gamma=0.5,
    seed=seed,
  )


def train_networks(
  which: str,
  model: sd_lib.StableDiffusion,
  pool: parts.Pictures,
  labels: parts.Labels,
  *,
  num_steps: int,
  seed: int,
) -> list[types.Params]:
  """The networks of an arm: an ensemble's, or one of all labels.

  What knows no noise learns in a third of the steps.
  """
  members = labels.members
  if which != 'ensemble':
    members = np.ones((len(labels.rows), 1), np.float32)
  networks, module = [], Arm(which).module
  clean = module.config.kind == 'clean'
  # One by one: a network's batch then is of its own labels only.
  for k, own in enumerate(members.T > 0):
    pictures = vary(pool[labels.rows[own]], seed=seed)
    networks += parts.train_rewards(
      module,
      model,
      pictures,
      np.repeat(labels.benign[own], COPIES),
      np.ones((len(pictures), 1), np.float32),
      benign_weight=BENIGN_WEIGHT,
      num_steps=num_steps // 3 if clean else num_steps,
      batch_size=20,
      lr=RATE,
      seed=1000 * k + seed,
    )
  return networks


def select(
  pictures: parts.Pictures,
  members: Sequence[types.Params],
  count: int,
  module: reward_lib.Reward,
) -> np.ndarray:
  """Places of the `count` pictures of the largest log r, in their order."""
  logits = np.float64(parts.logits_of(module, members, pictures))
  log_r = -np.logaddexp(0, -logits).sum(-1)
  order = np.argsort(-log_r, kind='stable')
  return np.sort(order[:count])


def write_pairs(
  path: pathlib.Path, pool: parts.Pictures, labels: parts.Labels
) -> int:
  """Every benign picture beats every malign one; returns how many pairs."""

  def to_png(row):
    buffer = io.BytesIO()
    Image.fromarray(pool[row]).save(buffer, 'PNG')
    return buffer.getvalue()

  pngs = {int(row): to_png(row) for row in labels.rows}
  groups = [labels.rows[labels.benign == value].tolist() for value in (1, 0)]
  rows = [
    {
      'caption': f'pair {good} {bad}',
      'has_label': True,
      'image_0_uid': f'{good}',
      'image_1_uid': f'{bad}',
      'jpg_0': pngs[good],
      'jpg_1': pngs[bad],
      'label_0': 1.0,
      'label_1': 0.0,
      'model_0': 'generated',
      'model_1': 'generated',
    }
    for good in groups[0]
    for bad in groups[1]
  ]
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(pa.Table.from_pylist(rows), path)
  return len(rows)


def align(
  arm: Arm,
  model_folder: str,
  pairs: pathlib.Path,
  workdir: pathlib.Path,
  *,
  num_steps: int,
  seed: int,
  mesh: jax.sharding.Mesh,
) -> types.Params:
  """The UNet after a run of `dpo_jax.main` on the pairs; resumes.

  num_steps: 0 for as many as configs/censoring.py says.
  """
  numbers = ','.join(f'{name}={value}' for name, value in arm.numbers)
  command = [
    sys.executable,
    '-m',
    'dpo_jax.main',
    f'--config=configs/censoring.py:{arm.objective}',
    f'--workdir={workdir}',
    f'--config.model.folder={model_folder}',
    f'--config.data.path={pairs}',
    f'--config.seed={seed}',
    f'--config.data.label_noise={1.0 if arm.away else 0.0}',
  ]
  if num_steps:
    command.append(f'--config.train.num_steps={num_steps}')
  command += [
    f'--config.objective.numbers.{word}' for word in numbers.split(',') if word
  ]
  subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
  opened = loading.open_model(
    str(workdir / 'export'), mesh=mesh, dtype='float32'
  )
  return opened.params['unet']


def candidates(count: int, arm: Arm) -> int:
  """How many pictures are drawn so that `count` are left."""
  return math.ceil(count / arm.keep)
