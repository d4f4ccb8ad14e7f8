"""What may differ in a config when a run goes on, and what may not, and why.

A key that stands nowhere here may not.
"""

from collections.abc import Mapping
from typing import Any

_RECORDED = 'when something is written or kept'
_SPREAD = (
  'the same sums in another order: noise and timesteps hang on the examples, '
  'losses agree within 1e-5 in float32'
)
_MEASURED = 'how the result is measured; no step of the training sees it'
_CHOSEN = (
  'judge, prompts and sampler by which the best step is chosen are compared by '
  'their digests, in scorer.json, and not by their names'
)

# Key to reason.
FREE = {
  'train.log_every': _RECORDED,
  'train.eval_every': _RECORDED,
  'train.checkpoint_every': _RECORDED,
  'train.keep': _RECORDED,
  'train.profile_from': _RECORDED,
  'train.profile_steps': _RECORDED,
  'train.compile_cache': 'where the same programs are kept',
  # With fewer or smaller devices, what the memory needs.
  'train.accumulate': _SPREAD,
  'train.sequential': _SPREAD,
  'model.remat': _SPREAD,
  'model.attention': _SPREAD,
  'model.stack_layers': _SPREAD,
  'optim.offload': _SPREAD,
  'mesh.data': _SPREAD,
  'mesh.fsdp': _SPREAD,
  'mesh.tensor': _SPREAD,
  'mesh.dcn_data': _SPREAD,
  'eval.num_prompts': _MEASURED,
  'eval.images_per_prompt': _MEASURED,
  'eval.sampler': _MEASURED,
  'eval.num_steps': _MEASURED,
  'eval.guidance_scale': _MEASURED,
  'eval.guidance_rescale': _MEASURED,
  'eval.batch_size': _MEASURED,
  'eval.num_pairs': _MEASURED,
  'eval.num_draws': _MEASURED,
  'eval.judge': _MEASURED,
  'eval.preferred': _MEASURED,
  'eval.retrieval': _MEASURED,
  'eval.scorer': _CHOSEN,
  'eval.scorer_tokenizer': _CHOSEN,
  'eval.score_prompts': _CHOSEN,
  'eval.num_score_prompts': _CHOSEN,
  'export.dtype': 'the checkpoints keep what was trained',
  'export.select': 'the checkpoints keep the best step and the last',
}
_START = 'the policy began as this model, and the reference is it'
_ROUNDING = (
  'errors are rounded another way, which a margin at beta 5000 shows; or the '
  'state is of another dtype than the one that was saved'
)
# Key or section to reason. In model, train and mesh each key is decided.
REFUSED = {
  'task': 'another task',
  'seed': 'order of the data, noise and timesteps follow from it',
  'model.folder': _START,
  'model.revision': _START,
  'model.variant': _START,
  'model.configs': _START,
  'model.prediction_type': _START,
  'model.random_init': _START,
  'model.dtype': _ROUNDING,
  'model.residual_dtype': _ROUNDING,
  'model.ref_path': _ROUNDING,
  'model.ref_dtype': _ROUNDING,
  'model.param_dtype': _ROUNDING,
  'model.ref_errors': _ROUNDING,
  'data': 'other examples, another order, or other inputs made of them',
  'noise': 'other draws for the same examples',
  'objective': 'another loss',
  'lora': 'a state of another form, or draws of its dropout',
  'denoise': 'another loss',
  'vae': 'another loss',
  'classifier': 'another network, or other draws of its augmentation',
  'reward': 'other labels or copies of them, other networks, or another loss',
  'optim': 'other updates, or a state of another form',
  'train.num_steps': 'the schedule of the rate ends there, and so does the run',
  'train.batch_size': 'other batches',
}


def flatten(record: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested mappings to dotted keys."""
  flat = {}
  for name, value in record.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[f'{prefix}{name}'] = value
  return flat


def find_refused(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """`key: old -> new` of what may not differ but does."""
  old, new = flatten(old), flatten(new)
  missing = 'absent'
  return [
    f'{key}: {old.get(key, missing)!r} -> {new.get(key, missing)!r}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key, missing) != new.get(key, missing) and key not in FREE
  ]
