"""Trains rewards on a few labels, which then censor a generator's samples.

Labels are made on the likes page, of pictures that the generator drew:

  python -m dpo_jax.tools.judge --likes=pictures --votes=votes.jsonl
  python -m dpo_jax.tools.judge --likes=pictures --votes=votes.jsonl \
    --export=labels
  python -m dpo_jax.main --config=configs/reward.py:mnist \
    --workdir=runs/reward --config.data.path=labels \
    --config.model.folder=runs/mnist/export

Yoon et al., 2023, arXiv 2307.02770: labels a network, weight a, iterations and
rates are theirs (from notes on the paper, which was not at hand), AdamW with
weight decay .05 and a rate that falls linearly to 0, MNIST's 10 copies and
rotations. Ours: batch size, the shape of the networks (group norm instead of
ResNet18's batch norm, no weights of ImageNet), copies, crops, flips and colours
elsewhere, 128 pixels of `:tench`, and of `:sd` a reward on latents, where
theirs needs a gradient through the VAE decoder. None but `:mnist` in small was
run yet. Variants:

  :mnist    crossed sevens, 5 networks on x_t of 28x28 grey pixels (default)
  :church   watermarks, 5 networks on pixels
  :tench    faces, one network on x_t; labels in rounds of 10 + 10
  :bedroom  broken pictures, 5 networks on pixels
  :sd       any property of Stable Diffusion's pictures, 5 networks on latents;
            --config.reward.kind=time: on noisy ones, without a gradient through
            the UNet, which did better on the emoji (docs/emoji_censoring.md)

Give `--config.reward.variant=union`, or `single` with
`--config.reward.networks=1`, for one network instead. All labels are learnt
from; to measure on others, hold out a share of each class (data.holdout) or
name more labels (data.eval_path). With fewer than reward.per_class asks for,
the run says how many there are.
"""

import dataclasses

import ml_collections

from configs import common


@dataclasses.dataclass(frozen=True)
class _Variant:
  """What differs; `steps` are the paper's iterations."""

  kind: str
  resolution: int
  per_class: int
  benign_weight: float
  steps: int
  lr: float = 3e-4
  space: str = 'pixels'
  networks: int = 5
  widths: tuple[int, ...] = (32, 64, 128, 256)
  copies: int = 10
  rotation: float = 0.0
  crop: float = 0.1
  colour: float = 0.0
  flip: bool = True


_VARIANTS = {
  'mnist': _Variant(
    kind='time',
    resolution=28,
    per_class=10,
    benign_weight=0.02,
    steps=1001,
    widths=(32, 64, 128),
    rotation=20.0,
    crop=0.0,
    flip=False,
  ),
  # A watermark is neither mirrored nor cut off.
  'church': _Variant(
    kind='clean',
    resolution=256,
    per_class=30,
    benign_weight=0.1,
    steps=601,
    crop=0.0,
    colour=0.2,
    flip=False,
  ),
  # One network for each round; 501, 1501 and 3001 steps with 10, 20, 30 + 30.
  'tench': _Variant(
    kind='time',
    resolution=128,
    per_class=10,
    benign_weight=0.1,
    steps=501,
    networks=1,
  ),
  'bedroom': _Variant(
    kind='clean',
    resolution=256,
    per_class=100,
    benign_weight=0.1,
    steps=5001,
  ),
  'sd': _Variant(
    kind='clean',
    resolution=512,
    per_class=100,
    benign_weight=0.1,
    steps=10001,
    lr=1e-4,
    space='latents',
  ),
}
VARIANTS = tuple(_VARIANTS)


def get_config(variant: str = 'mnist') -> ml_collections.ConfigDict:
  """Recipe of one of the paper's experiments."""
  if variant not in VARIANTS:
    raise ValueError(f'variant {variant!r}: allowed are {", ".join(VARIANTS)}')
  chosen = _VARIANTS[variant]
  c = common.get_config()
  c.unlock()
  c.task = 'reward'
  c.data.holdout = 0.0
  c.data.resolution = chosen.resolution
  c.data.random_crop = False
  c.data.flip = chosen.flip
  c.reward.variant = 'ensemble' if chosen.networks > 1 else 'single'
  for name in (
    'kind',
    'space',
    'networks',
    'per_class',
    'benign_weight',
    'widths',
    'copies',
    'rotation',
    'crop',
    'colour',
  ):
    c.reward[name] = getattr(chosen, name)
  c.optim.lr = chosen.lr
  c.optim.weight_decay = 0.05
  # A norm over all networks would make one hang on the others.
  c.optim.clip_norm = 0.0
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 0
  c.train.num_steps = chosen.steps
  # Each network finds about a third of an ensemble's batch to be its own.
  c.train.batch_size = 128
  c.train.log_every = 50
  c.train.eval_every = 250
  c.train.checkpoint_every = 250
  c.train.keep = 1
  c.lock()
  return c
