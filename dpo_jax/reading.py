"""The data that a config names."""

import ml_collections

from dpo_jax import datasets, reward_runs
from dpo_jax.data import labelling, prepared


def read_data(config: ml_collections.ConfigDict) -> datasets.Data:
  """The examples that the config names; reads no picture of a folder.

  Raises ValueError for data that the task cannot use, and as what reads them.
  """
  if config.task == 'reward':
    return reward_runs.read_labels(config)
  paths = datasets.split_paths(config.data.path)
  eval_paths = datasets.split_paths(config.data.eval_path)
  if any(map(datasets.is_prepared, paths)):
    if config.task != 'preference':
      raise ValueError(
        f'data.path={config.data.path}: prepared folders are for '
        f'task=preference; task={config.task} reads parquet files'
      )
    likes = config.objective.name == 'kto' and all(
      'likes' in prepared.find_kinds(path) for path in paths
    )
    if config.eval.retrieval:
      raise ValueError(
        'eval.retrieval=True: compares with every picture in memory, which is '
        'for parquet files; set it to False for prepared folders'
      )
    return datasets.open_prepared(
      paths,
      weights=tuple(config.data.weights),
      holdout=config.data.holdout,
      eval_paths=eval_paths,
      use_cache=config.data.use_cache,
      max_held=config.eval.num_pairs,
      kind='likes' if likes else 'pairs',
      label_noise=config.data.label_noise,
      labels=_labelling(config),
    )
  if config.data.winner or len(config.data.consensus):
    name = 'winner' if config.data.winner else 'consensus'
    raise ValueError(
      f'data.{name}={config.data[name]!r}: is for prepared folders that python '
      f'-m dpo_jax.tools.label has scored, and data.path={config.data.path} is '
      'none'
    )
  if eval_paths or len(config.data.weights):
    name = 'eval_path' if eval_paths else 'weights'
    raise ValueError(
      f'data.{name}={config.data[name]}: is for prepared folders, and '
      f'data.path={config.data.path} is none (python -m dpo_jax.tools.prepare)'
    )
  return datasets.read_parquet(
    paths,
    holdout=config.data.holdout,
    paired=config.task == 'preference',
    max_held=config.eval.num_pairs,
    label_noise=config.data.label_noise,
  )


def _labelling(config) -> labelling.Labelling:
  """Who wins the training pairs, and the scores that batches come with."""
  names = (config.objective.scores,) if config.objective.scores else ()
  return labelling.Labelling(
    winner=config.data.winner,
    consensus=tuple(config.data.consensus),
    min_agree=config.data.min_agree,
    per_caption=config.data.per_caption,
    columns=names,
  )
