"""Pictures that a run draws of its model: which, how, and batch by batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8, UInt32

from dpo_jax import loading, sharding, types
from dpo_jax.evaluate import generate

# Whole components -> (rows, their pictures), as generate.generate_batches.
DrawFn = Callable[
  [Mapping[str, types.Params]],
  Iterator[tuple[slice, UInt8[np.ndarray, 'm H W 3']]],
]


def make_draw(
  opened: loading.Opened,
  captions: Sequence[str],
  seeds: UInt32[np.ndarray, ' n'],
  *,
  negatives: Sequence[str] | None = None,
  settings: Mapping[str, Any],
  side: int,
  seed: int,
  mesh: jax.sharding.Mesh,
) -> DrawFn:
  """Draws these captions, each from the noise of its seed; compiled once.

  negatives: what each is guided away from. settings: those of the config's
  `eval`. side: of the pictures, pixels. seed: the run's. All processes call
  what is returned, and get all pictures.
  """
  sample_fn = generate.make_sample_fn(
    opened.model,
    generate.Settings(
      size=(side, side),
      sampler=settings['sampler'],
      num_steps=settings['num_steps'],
      guidance_scale=settings['guidance_scale'],
      guidance_rescale=settings['guidance_rescale'],
    ),
  )
  inputs = generate.prompt_batch(
    opened.model,
    opened.tokenizers.encode,
    list(captions),
    negatives and list(negatives),
  )

  def draw(params):
    return generate.generate_batches(
      sample_fn,
      jax.device_put(params, sharding.state_shardings(params, mesh)),
      inputs,
      seeds,
      seed=seed,
      batch_size=settings['batch_size'],
      mesh=mesh,
    )

  return draw
