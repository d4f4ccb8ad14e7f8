"""The style judge: which generator drew a picture."""

import dataclasses

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Float, UInt8

from dpo_jax import stable_diffusion as sd_lib
from dpo_jax import types
from dpo_jax.evaluate import scorers


@dataclasses.dataclass(frozen=True, eq=False)
class StyleJudge:
  """A classifier of real pictures and the class that should win."""

  classifier: nn.Module
  params: types.Params
  classes: tuple[str, ...]
  preferred: str

  def score(
    self, images: UInt8[np.ndarray, 'n H W 3'], *, batch_size: int = 256
  ) -> Float[np.ndarray, ' n']:
    """Log odds of the preferred class; above 0 it is the judged style."""
    index = self.classes.index(self.preferred)
    compute = jax.jit(scorers.classifier_compute(self.classifier, index))
    parts = [
      np.asarray(
        compute(
          self.params, sd_lib.to_float(images[i : i + batch_size, None]), None
        )
      )[:, 0]
      for i in range(0, len(images), batch_size)
    ]
    return np.concatenate(parts)
