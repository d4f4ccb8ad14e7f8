"""A small image classifier: the style judge of the quickstart."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import types


@dataclasses.dataclass(frozen=True)
class ImageClassifierConfig:
  """Shape of an ImageClassifier.

  classes: names of the classes, in the order of the logits.
  widths: channels of each stage of the convolutional branch; a stage halves
    the resolution. Empty: no such branch.
  palette: channels of the layers that look at one pixel at a time; their
    mean is a learned histogram of colours. Empty: no such branch.
  image_size: side in pixels of the square images it judges.
  num_groups: groups of every GroupNorm; divides each width.
  """

  classes: tuple[str, ...]
  widths: tuple[int, ...] = (16, 32, 64)
  palette: tuple[int, ...] = ()
  image_size: int = 32
  num_groups: int = 8

  def __post_init__(self):
    if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
      raise ValueError(
        f'classes: got {self.classes!r}; give at least two distinct names'
      )
    if not all(isinstance(name, str) and name for name in self.classes):
      raise ValueError(f'classes: got {self.classes!r}; names are text')
    for name in ('image_size', 'num_groups'):
      if not _is_positive_int(getattr(self, name)):
        raise ValueError(
          f'{name}: got {getattr(self, name)!r}; give a positive integer'
        )
    for name in ('widths', 'palette'):
      if not all(map(_is_positive_int, getattr(self, name))):
        raise ValueError(
          f'{name}: got {getattr(self, name)!r}; give positive integers'
        )
    if not self.widths and not self.palette:
      raise ValueError('widths and palette: both are empty; give one of them')
    uneven = [w for w in self.widths if w % self.num_groups]
    if uneven:
      raise ValueError(
        f'widths: {uneven} not divisible by num_groups={self.num_groups}'
      )
    if self.image_size % 2 ** len(self.widths):
      raise ValueError(
        f'image_size: got {self.image_size}; must be divisible by '
        f'{2 ** len(self.widths)}, as each of {len(self.widths)} widths '
        'halves it'
      )

  @classmethod
  def from_dict(cls, config: dict[str, Any]) -> 'ImageClassifierConfig':
    """Builds the config from a JSON object; lists become tuples.

    Raises ValueError naming the option that is unknown, missing or out of
    range.
    """
    allowed = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(config) - set(allowed))
    if unknown:
      raise ValueError(f'unknown option {unknown}; allowed: {allowed}')
    if 'classes' not in config:
      raise ValueError('classes: missing; give the class names in order')
    for name in ('classes', 'widths', 'palette'):
      if not isinstance(config.get(name, []), (list, tuple)):
        raise ValueError(f'{name}: got {config[name]!r}; give a list')
    return cls(
      **{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    )


class ImageClassifier(nn.Module):
  """Convolutional classifier of drawing style.

  The first convolution keeps full resolution, because style sits in edges,
  gradients and palette; another branch sees colours alone. Averaging over all
  positions at the end makes what is drawn, and where, matter little. GroupNorm
  sees one image at a time, so a verdict does not depend on the rest of the
  batch.
  """

  config: ImageClassifierConfig
  dtype: types.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'n H W 3']
  ) -> Float[Array, 'n classes']:
    """Returns logits [n classes] float32 of images [n H W 3] in [-1, 1].

    Raises ValueError for images of another size than config.image_size.
    """
    side = self.config.image_size
    if images.ndim != 4 or images.shape[1:] != (side, side, 3):
      raise ValueError(
        f'images: got shape {images.shape}; this classifier takes '
        f'[n, {side}, {side}, 3]'
      )
    branches = []
    if self.config.widths:
      hidden = images.astype(self.dtype)
      for stage, width in enumerate(self.config.widths):
        hidden = self._block(hidden, width, 1, f'stage_{stage}')
        hidden = self._block(hidden, width, 2, f'stage_{stage}_down')
      branches.append(hidden)
    if self.config.palette:
      # Not normalised: what counts is the colour itself. Scaled up, so that
      # the first layer can part near colours.
      hidden = 4.0 * images.astype(self.dtype)
      for layer, width in enumerate(self.config.palette):
        name = f'palette_{layer}'
        hidden = nn.silu(nn.Dense(width, dtype=self.dtype, name=name)(hidden))
      branches.append(hidden)
    # Pooling and logits in float32 whatever the compute dtype.
    pooled = jnp.concatenate(
      [jnp.mean(x.astype(jnp.float32), axis=(1, 2)) for x in branches], -1
    )
    if self.config.palette:
      width = self.config.palette[-1]
      pooled = nn.silu(nn.Dense(width, dtype=jnp.float32, name='mix')(pooled))
    return nn.Dense(
      len(self.config.classes), dtype=jnp.float32, name='classifier'
    )(pooled)

  def _block(self, hidden, width, stride, name):
    hidden = nn.Conv(
      width, (3, 3), (stride, stride), dtype=self.dtype, name=f'{name}_conv'
    )(hidden)
    hidden = nn.GroupNorm(
      self.config.num_groups, dtype=self.dtype, name=f'{name}_norm'
    )(hidden)
    return nn.silu(hidden)


def _is_positive_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0
