"""The training step: pure, jitted once, sharded over the mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dpo_jax import task as task_lib
from dpo_jax import trees, types
from dpo_jax.train import state as state_lib

Metrics = dict[str, jax.Array]
StepFn = Callable[..., tuple[state_lib.TrainState, Metrics]]


def mean_present(values: jax.Array) -> jax.Array:
  """Mean over the entries that are not NaN; NaN where there are none."""
  present = ~jnp.isnan(values)
  total = jnp.sum(jnp.where(present, values, 0.0))
  return jnp.where(
    jnp.any(present), total / jnp.maximum(jnp.sum(present), 1), jnp.nan
  )


def split_microbatches(
  batch: dict[str, jax.Array], count: int
) -> dict[str, jax.Array]:
  """[b, ...] -> [count, b / count, ...], microbatch i taking rows i::count.

  Striding keeps a batch-sharded array where it is; cutting it into runs of
  rows would move it between devices.
  """

  def split(array):
    rows = array.reshape((-1, count, *array.shape[1:]))
    return jnp.moveaxis(rows, 1, 0)

  return jax.tree.map(split, batch)


def _gradients(loss_fn, params, frozen, batch, key, accumulate):
  """Gradient of the mean loss; per-example loss and metrics, [b] or [k, b/k].

  The latter stay in that shape: flattening them would gather them.
  """

  def mean_loss(params, microbatch):
    loss, metrics = loss_fn(params, frozen, microbatch, key)
    return jnp.mean(loss), (loss, metrics)

  grad_fn = jax.grad(mean_loss, has_aux=True)
  if accumulate == 1:
    return grad_fn(params, batch)

  def body(total, microbatch):
    grads, outputs = grad_fn(params, microbatch)
    return jax.tree.map(jnp.add, total, grads), outputs

  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
  total, outputs = jax.lax.scan(
    body, zeros, split_microbatches(batch, accumulate)
  )
  return jax.tree.map(lambda leaf: leaf / accumulate, total), outputs


def make_step(
  loss_fn: task_lib.LossFn,
  optimizer: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  ema_decay: float = 0.0,
) -> StepFn:
  """step(state, frozen, batch, key) -> (state, metrics); jit it yourself.

  The batch is global, [b, ...], and b a multiple of `accumulate`; the
  gradient is that of the mean over all b examples whatever `accumulate` is.
  The EMA's decay is warmed up as min(decay, (1 + step) / (10 + step)).
  Metrics are float32 scalars; NaN means that no example had the metric.
  """

  def step(state, frozen, batch, key):
    grads, (loss, metrics) = _gradients(
      loss_fn, state.params, frozen, batch, key, accumulate
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      count = state.step.astype(jnp.float32)
      decay = jnp.minimum(ema_decay, (1.0 + count) / (10.0 + count))
      ema = optax.incremental_update(params, ema, 1.0 - decay)
    metrics = {name: mean_present(value) for name, value in metrics.items()}
    metrics |= {
      # Not mean_present: a NaN loss must stay one.
      'loss': jnp.mean(loss),
      'norm/grads': trees.global_norm(grads),
      'norm/updates': trees.global_norm(updates),
      'norm/params': trees.global_norm(params),
    }
    state = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state, ema=ema
    )
    return state, metrics

  return step


def make_eval_step(loss_fn: task_lib.LossFn) -> Callable[..., Metrics]:
  """eval_step(params, frozen, batch, key) -> metrics, gradients untouched.

  Returns per-example arrays [b] so that a short last batch can be cut.
  """

  def eval_step(
    params: types.Params, frozen: types.PyTree, batch: dict, key: types.Key
  ):
    loss, metrics = loss_fn(params, frozen, batch, key)
    return metrics | {'loss': loss}

  return eval_step
