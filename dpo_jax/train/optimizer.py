"""Optimizers and learning-rate schedules by name."""

from collections.abc import Callable

import optax

OPTIMIZERS = ('adamw', 'adafactor')
SCHEDULES = ('constant', 'linear', 'cosine')


def make_schedule(
  *, name: str, learning_rate: float, warmup_steps: int, num_steps: int
) -> Callable[[int], float]:
  """Step -> learning rate: linear warmup, then constant or decay to zero.

  The first step already has a rate above zero: (step + 1) / warmup_steps of
  the peak, as in the authors' program (a rate of exactly zero wastes a step).
  """
  decay_steps = max(1, num_steps - warmup_steps)
  if name == 'constant':
    after = optax.constant_schedule(learning_rate)
  elif name == 'linear':
    after = optax.linear_schedule(learning_rate, 0.0, decay_steps)
  elif name == 'cosine':
    after = optax.cosine_decay_schedule(learning_rate, decay_steps)
  else:
    raise ValueError(
      f'optim.schedule={name!r}: allowed are {", ".join(SCHEDULES)}'
    )
  if not warmup_steps:
    return after
  warmup = optax.linear_schedule(
    learning_rate / warmup_steps, learning_rate, max(1, warmup_steps - 1)
  )
  return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
  *,
  name: str,
  schedule: Callable[[int], float],
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """Global-norm clipping, then AdamW or Adafactor.

  Adafactor has no relative step and does not scale by parameter norms, as in
  the authors' SDXL launcher; its weight decay is, as there, times the rate.
  clip_norm 0 switches clipping off.
  """
  if name == 'adamw':
    inner = optax.adamw(
      schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay
    )
  elif name == 'adafactor':
    inner = optax.chain(
      optax.adafactor(
        learning_rate=None,
        multiply_by_parameter_scale=False,
        clipping_threshold=1.0,
      ),
      # optax.adafactor has already turned the direction downhill.
      optax.add_decayed_weights(-weight_decay),
      optax.scale_by_schedule(schedule),
    )
  else:
    raise ValueError(
      f'optim.name={name!r}: allowed are {", ".join(OPTIMIZERS)}'
    )
  if not clip_norm:
    return inner
  return optax.chain(optax.clip_by_global_norm(clip_norm), inner)
