"""Package description; tools are configured in pyproject.toml."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

setuptools.setup(
  name='dpo_jax',
  version='0.1.0',
  description=(
    'Preference alignment of text-to-image diffusion models in JAX/Flax'
  ),
  long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  packages=setuptools.find_packages(include=['dpo_jax', 'dpo_jax.*']),
  package_data={
    'dpo_jax.evaluate': ['templates/*.j2'],
    'dpo_jax.judging': ['page/*'],
  },
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'array_record>=0.8',
    'etils[epath]>=1.9',
    'flax>=0.12.8',
    'fsspec>=2024.6',
    'ftfy>=6.2',
    'grain>=0.2.18',
    'jax>=0.10.2',
    'Jinja2>=3.1',
    'jaxtyping>=0.3',
    'matplotlib>=3.9',
    'ml_collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'pillow>=11',
    'pyarrow>=18',
    'rich>=13',
    'safetensors>=0.5',
    'scipy>=1.13',
    'starlette>=1.0',
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.10',
    'tokenizers>=0.22',
    'transformers>=5.0',
    'uvicorn>=0.40',
  ],
  extras_require={
    'gpu': ['jax[cuda12]'],
    'tpu': ['jax[tpu]'],
    # Models by hub id; models and workdirs on gs://.
    'hub': ['huggingface_hub>=1.0'],
    'gcs': ['gcsfs>=2024.6'],
  },
)
