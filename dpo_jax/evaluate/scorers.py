"""Judges of pictures: PickScore, HPSv2, CLIP, aesthetics, ImageReward.

A score is a number a picture, larger is better, comparable within a prompt.

| name | score | published weights |
|---|---|---|
| pickscore | exp(logit_scale) cos(text, image), about 20 | CLIP ViT-H/14 |
| hpsv2, hpsv21 | cos(text, image), about 0.28 | OpenCLIP ViT-H/14 |
| clip | 100 cos(text, image) | any CLIP |
| aesthetic | LAION's predictor of the image alone, 1 to 10 | CLIP ViT-L/14 |
| imagereward | a head on BLIP, mean 0 and spread 1 | BLIP ViT-L/16 |
| classifier | log odds of one class of a classifier of task `classify` | |
| implicit | err(ref) - err(policy): a trained model's own reward | |
| reward | log r of a reward that censors, 0 at most | |

Kirstain et al. 2023, section 4; Wu et al. 2023, section 4; Hessel et al. 2021,
eq. 1 without its cut at 0, which would make ties; Schuhmann 2022; Xu et al.
2023.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, Int32, UInt8

from dpo_jax import distributed, sharding, types
from dpo_jax.models import clip_pair

NAMES = (
  'pickscore',
  'hpsv2',
  'hpsv21',
  'clip',
  'aesthetic',
  'imagereward',
  'classifier',
  'implicit',
  'reward',
)
# Threads that scale pictures while the device computes.
THREADS = 2
# Token ids int32 [n s] of captions; [n e s] where e encoders have their own.
EncodeFn = Callable[[Sequence[str]], Int32[np.ndarray, 'n *s']]
# (params, pixels [n k h w 3], input_ids [n *s] or None) -> scores [n k],
# float32, of n captions and their k pictures.
ComputeFn = Callable[[types.Params, Array, Array | None], Array]
# A caption and its pictures, uint8 [H W 3] or what `read` makes such of.
Question = tuple[str, Sequence[Any]]


def cosine(
  texts: Float[Array, 'n e'], images: Float[Array, 'n k e']
) -> Float[Array, 'n k']:
  """Of each text with its own k images; all are of length 1."""
  return jnp.einsum('ne,nke->nk', texts, images)


def clip_compute(name: str, model: clip_pair.CLIP) -> ComputeFn:
  """What `name` makes of CLIP's parameters 'clip', and 'head' of aesthetic."""

  def compute(params, pixels, input_ids):
    n, k = pixels.shape[:2]
    tower = params['clip']
    flat = pixels.reshape(n * k, *pixels.shape[2:])
    images = model.embed_images(tower, flat)
    if name == 'aesthetic':
      head = clip_pair.AestheticPredictor()
      return head.apply({'params': params['head']}, images).reshape(n, k)
    texts = model.embed_texts(tower, input_ids)
    cos = cosine(texts, images.reshape(n, k, -1))
    if name == 'pickscore':
      return jnp.exp(tower['logit_scale'].astype(jnp.float32)) * cos
    return 100.0 * cos if name == 'clip' else cos

  return compute


def imagereward_compute(model: nn.Module) -> ComputeFn:
  """Of a model of (pixels, input_ids): each text is read with each picture."""

  def compute(params, pixels, input_ids):
    n, k = pixels.shape[:2]
    flat = pixels.reshape(n * k, *pixels.shape[2:])
    texts = jnp.repeat(input_ids, k, axis=0)
    return model.apply({'params': params}, flat, texts).reshape(n, k)

  return compute


def classifier_compute(model: nn.Module, index: int) -> ComputeFn:
  """Log odds of class `index` against all others; texts are not looked at."""

  def compute(params, pixels, input_ids):
    del input_ids
    n, k = pixels.shape[:2]
    flat = pixels.reshape(n * k, *pixels.shape[2:])
    logits = model.apply({'params': params}, flat)
    others = jnp.delete(logits, index, axis=-1)
    odds = logits[:, index] - jax.nn.logsumexp(others, axis=-1)
    return odds.reshape(n, k)

  return compute


def reward_compute(log_reward_fn: Callable) -> ComputeFn:
  """Of (params, pixels [n h w 3]) -> log r [n]; texts are not looked at."""

  def compute(params, pixels, input_ids):
    del input_ids
    n, k = pixels.shape[:2]
    flat = pixels.reshape(n * k, *pixels.shape[2:])
    return log_reward_fn(params, flat).reshape(n, k)

  return compute


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
  """A judge whose networks lie on a mesh.

  Attributes:
    name: one of NAMES.
    compute: what gives the scores of a batch.
    params: its first argument, placed.
    preprocess: from uint8 [H W 3] to what the networks take.
    encode: None where texts are not looked at.
    source: where the weights came from, and their digest, for the record.
    batch_size: captions at once; a multiple of the mesh's batch axes.
    compiled: programs by `compute` and shape, which copies share.
  """

  name: str
  compute: ComputeFn
  params: types.Params
  preprocess: Callable[[np.ndarray], np.ndarray]
  encode: EncodeFn | None
  mesh: jax.sharding.Mesh
  source: dict[str, str]
  batch_size: int = 8
  compiled: dict[Any, Callable] = dataclasses.field(
    default_factory=dict, repr=False
  )

  def __post_init__(self):
    if self.name not in NAMES:
      raise ValueError(
        f'scorer {self.name!r}: must be one of {", ".join(NAMES)}'
      )

  def batches(
    self,
    questions: Iterable[Any],
    *,
    ask: Callable[[Any], Question] = tuple,
    read: Callable[[Any], np.ndarray] = np.asarray,
  ) -> Iterator[Float32[np.ndarray, 'n k']]:
    """Scores of captions with as many pictures each, a batch at a time.

    `ask` makes a question of what stands for one, `read` uint8 [H W 3] of what
    stands for a picture. That and the scaling of the next batches go on while
    the device computes. Equal pictures of a caption get equal scores: rounding
    alone does not promise it, as it hangs on the place in the batch.

    Several processes all call it with the same questions and get all scores;
    each asks and reads its share alone.
    """
    local = self.batch_size // jax.process_count()
    begin = local * jax.process_index()

    def prepare(picture):
      return self.preprocess(read(picture))

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:

      def start(group):
        # This process's rows; past the end the last one is repeated.
        rows = [min(begin + i, len(group) - 1) for i in range(local)]
        asked = {row: ask(group[row]) for row in sorted(set(rows))}
        jobs = {
          row: [pool.submit(prepare, picture) for picture in some]
          for row, (_, some) in asked.items()
        }
        return len(group), [(asked[row][0], jobs[row]) for row in rows]

      running = None
      groups = _grouped(questions, self.batch_size)
      for total, share in _ahead(map(start, groups)):
        pixels = np.stack(
          [np.stack([job.result() for job in jobs]) for _, jobs in share]
        )
        captions = [caption for caption, _ in share]
        # The device works on this batch while the next one is made.
        scores = self._compute(pixels, captions)
        if running is not None:
          yield _take(*running)
        running = scores, self._gather(_first_equal(pixels)), total
        if jax.process_count() > 1:
          # What `questions` compute must not come between on one of them.
          jax.block_until_ready(scores)
      if running is not None:
        yield _take(*running)

  def _compute(self, pixels: np.ndarray, captions: list[str]) -> jax.Array:
    """Scores [n k] of the whole batch, of this process's rows of it."""
    batch = {'pixels': pixels}
    if self.encode is not None:
      batch['input_ids'] = self.encode(captions)
    batch = sharding.put_batch(batch, self.mesh)
    key = self.compute, batch['pixels'].shape
    if key not in self.compiled:
      jitted = jax.jit(
        self.compute, out_shardings=sharding.replicated(self.mesh)
      )
      self.compiled[key] = distributed.run_together(jitted)
    run = self.compiled[key]
    return run(self.params, batch['pixels'], batch.get('input_ids'))

  def _gather(
    self, first: Int32[np.ndarray, 'm k']
  ) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the batch's rows in the mesh's order, `first` of each)."""
    numbers = np.arange(len(first), dtype=np.int32)
    if jax.process_count() == 1:
      return numbers, first
    numbers += len(first) * jax.process_index()
    local = {'numbers': numbers, 'first': first}
    gather = jax.jit(_same, out_shardings=sharding.replicated(self.mesh))
    found = gather(sharding.put_batch(local, self.mesh))
    return np.asarray(found['numbers']), np.asarray(found['first'])

  def score(
    self,
    images: Sequence[UInt8[np.ndarray, 'H W 3']],
    captions: Sequence[str],
  ) -> Float32[np.ndarray, ' n']:
    """Scores [n] of pictures, each with its caption.

    Raises ValueError where there are not as many captions as pictures.
    """
    if len(images) != len(captions):
      raise ValueError(f'{len(images)} pictures and {len(captions)} captions')
    pairs = zip(captions, images, strict=True)
    found = list(self.batches((text, [picture]) for text, picture in pairs))
    return np.concatenate(found)[:, 0] if found else np.zeros(0, np.float32)


def _same(tree: types.PyTree) -> types.PyTree:
  return tree


def _first_equal(pixels: np.ndarray) -> Int32[np.ndarray, 'n k']:
  """Of each of k pictures the first one that is the same."""
  n, k = pixels.shape[:2]
  first = np.tile(np.arange(k, dtype=np.int32), (n, 1))
  for row, pictures in enumerate(pixels):
    for i in range(1, k):
      for j in range(i):
        if np.array_equal(pictures[i], pictures[j]):
          first[row, i] = j
          break
  return first


def _take(
  scores: jax.Array, gathered: tuple[np.ndarray, np.ndarray], total: int
) -> Float32[np.ndarray, 'n k']:
  """The rows that are no padding; equal pictures share the first's score."""
  numbers, first = gathered
  order = np.argsort(numbers)[:total]
  return np.take_along_axis(np.asarray(scores)[order], first[order], axis=1)


def _grouped(items: Iterable, size: int) -> Iterator[list]:
  group = []
  for item in items:
    group.append(item)
    if len(group) == size:
      yield group
      group = []
  if group:
    yield group


def _ahead(groups: Iterator[list]) -> Iterator[list]:
  """The same, each taken one before it is asked for: its threads run."""
  waiting = None
  for group in groups:
    if waiting is not None:
      yield waiting
    waiting = group
  if waiting is not None:
    yield waiting
