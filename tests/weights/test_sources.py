import pathlib
import pickle
import re
import sys

import pytest

from dpo_jax.weights import buckets, sources

fsspec = pytest.importorskip('fsspec')

INDEX = '{"unet": ["diffusers", "UNet"], "tokenizer": ["transformers", "T"]}'
FILES = {
  'model_index.json': INDEX,
  'README.md': 'card',
  'unet/config.json': '{}',
  'unet/diffusion_pytorch_model.safetensors': 'weights',
  'tokenizer/vocab.json': '{}',
}
OTHERS = {
  'big.safetensors': 'one file',
  'unet/diffusion_pytorch_model.bin': 'pickle',
  'vae/config.json': '{}',
  'vae/diffusion_pytorch_model.safetensors': 'not listed',
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv(buckets.CACHE_VARIABLE, str(tmp_path / 'cache'))
  monkeypatch.chdir(tmp_path)
  return tmp_path / 'cache'


@pytest.fixture
def bucket():
  """The memory of fsspec, filled."""
  fs = fsspec.filesystem('memory')
  for name, text in {**FILES, **OTHERS}.items():
    fs.pipe_file(f'/bucket/model/{name}', text.encode())
  yield fs
  fs.rm('/bucket', recursive=True)


URL = 'memory://bucket/model'


def _content(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_text()
    for path in folder.rglob('*')
    if path.is_file()
  }


def _error(name, pattern, **options):
  with pytest.raises(ValueError, match=pattern) as error:
    sources.resolve(name, **options)
  assert '\n' not in str(error.value)
  assert name in str(error.value)


def test_a_local_folder_as_it_is(tmp_path):
  (tmp_path / 'org' / 'name').mkdir(parents=True)
  # Before the hub id of the same name.
  for name in ('org/name', str(tmp_path), '.'):
    found = sources.resolve(name, variant='fp16')
    assert found == sources.Source(pathlib.Path(name), 'folder', name, '')


def test_a_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'model').mkdir()
  assert sources.resolve('~/model').path == tmp_path / 'model'


def test_a_local_file_as_it_is(tmp_path):
  path = tmp_path / 'xl.safetensors'
  path.write_bytes(b'')
  assert sources.resolve(str(path)).kind == 'file'
  _error(str(path), r"variant='fp16' is for pipeline folders", variant='fp16')


def test_a_revision_is_for_the_hub_alone(tmp_path, bucket):
  for name in (str(tmp_path), URL):
    _error(name, r"revision='main' is for hub ids only", revision='main')


@pytest.mark.parametrize('name', ['model.ckpt', 'model.bin', 'model.pt'])
def test_a_pickle_is_refused_unread(name, tmp_path):
  class Bomb:
    def __reduce__(self):
      return (pytest.fail, ('unpickled',))

  (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
  _error(name, r'refused: it is a pickle')
  _error(f'memory://bucket/{name}', r'refused: it is a pickle')


def test_other_files_are_refused(tmp_path):
  (tmp_path / 'notes.txt').write_text('')
  _error('notes.txt', r'a file of another kind; allowed: a pipeline folder or')


@pytest.mark.parametrize(
  'name', ['sd15', './models/sd15', 'a/b/c', 'my model/x', 'a/xl.safetensors']
)
def test_a_name_that_is_nothing(name):
  _error(name, r'no such file or folder \(.*\); allowed: .*gs://.*hub id')
  assert not sources.is_remote(name)


@pytest.mark.parametrize('name', ['org/name', 'org/name-1.5_x', 'gs://a/b'])
def test_a_name_that_may_be_elsewhere(name):
  assert sources.is_remote(name)


def test_a_bucket(bucket, cache):
  found = sources.resolve(URL)
  assert found.kind == 'folder' and found.name == URL
  assert _content(found.path) == FILES
  assert re.fullmatch(r'[0-9a-f]{16}', found.revision)
  assert found.path.parent == cache and found.path.name.startswith('model-')


def test_a_bucket_is_copied_once(bucket, monkeypatch):
  first = sources.resolve(URL)
  monkeypatch.setattr(type(bucket), 'get_file', None)
  assert sources.resolve(URL + '/').path == first.path


def test_a_change_of_the_same_size_is_fetched(bucket):
  first = sources.resolve(URL)
  name = 'unet/diffusion_pytorch_model.safetensors'
  bucket.pipe_file(f'/bucket/model/{name}', b'WEIGHTS')
  second = sources.resolve(URL)
  assert second.revision != first.revision
  assert _content(second.path) == FILES | {name: 'WEIGHTS'}
  assert _content(first.path) == FILES


def test_an_interrupted_copy_goes_on(bucket, cache, monkeypatch):
  fetched, get_file = [], type(bucket).get_file

  def fail(self, path, target, **options):
    fetched.append(path)
    pathlib.Path(target).write_text('hal')
    if len(fetched) == 3:
      raise OSError('the line\nbroke')
    get_file(self, path, target, **options)

  monkeypatch.setattr(type(bucket), 'get_file', fail)
  _error(URL, r'not fetched: OSError: the line broke$')
  (folder,) = cache.iterdir()
  assert len(_content(folder)) == 2
  assert _content(folder).items() <= FILES.items()
  assert _content(sources.resolve(URL).path) == FILES
  assert len(fetched) == len(FILES) + 1


def test_a_short_copy_is_no_copy(bucket, cache, monkeypatch):
  monkeypatch.setattr(
    type(bucket),
    'get_file',
    lambda self, path, target, **_: pathlib.Path(target).write_text('x'),
  )
  _error(URL, r'fetched 1 of \d+ bytes; try again')
  (folder,) = cache.iterdir()
  assert _content(folder) == {}


def test_a_damaged_copy_is_fetched_again(bucket):
  path = sources.resolve(URL).path
  (path / 'unet' / 'config.json').write_text('')
  (path / 'README.md').unlink()
  assert _content(sources.resolve(URL).path) == FILES


def test_one_file_of_a_bucket(bucket):
  found = sources.resolve(f'{URL}/big.safetensors')
  assert found.kind == 'file' and found.path.read_text() == 'one file'
  assert found.path.name == 'big.safetensors'
  _error(f'{URL}/big.safetensors', r"variant='x' is for", variant='x')
  _error(f'{URL}/README.md', r'a file of another kind')


def test_a_file_url(tmp_path):
  for name, text in FILES.items():
    path = tmp_path / 'there' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  found = sources.resolve(f'file://{tmp_path}/there')
  assert _content(found.path) == FILES


def test_what_is_wrong_with_a_bucket(bucket):
  _error('memory://bucket/none', r'no such file or folder, or an empty one')
  _error(f'{URL}/unet', r'no model_index.json there; not a pipeline folder')
  _error(URL, r"unet: no weights of variant='fp16'", variant='fp16')
  bucket.pipe_file('/bucket/model/model_index.json', b'[')
  _error(URL, r'model_index.json: not a JSON object')
  bucket.pipe_file('/bucket/model/unet/../../x.json', b'')
  _error(URL, r'outside of it')


def test_packages_that_are_missing(bucket, monkeypatch):
  _error('nosuch://bucket/model', r'cannot be opened: .*allowed: gs://')
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  _error('gs://bucket/model', r"pip install 'dpo_jax\[gcs\]'$")
  monkeypatch.setitem(sys.modules, 'fsspec', None)
  _error(URL, r'install fsspec and its package for memory://')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  _error('org/name', r"hub id: pip install 'dpo_jax\[hub\]'$")
