"""What is wrong with a checkpoint is found, said, and the one before used."""

import json
import random
import resource
import shutil

import jax
import jax.numpy as jnp
import optax
import pytest

from dpo_jax import trees
from dpo_jax.train import checkpoint, manifest
from dpo_jax.train import state as state_lib


def _state(step=0, size=64):
  params = {'w': jnp.arange(float(size)) + step, 'b': jnp.ones((3, 5))}
  state = state_lib.init_state(params, optax.adamw(1e-3), use_ema=True)
  return state.replace(step=jnp.int32(step))


def _open(path, keep=3):
  return checkpoint.Checkpointer(path, every=1, keep=keep)


def _save(path, steps=(2, 4)):
  saver = _open(path)
  for step in steps:
    saver.save(step, _state(step), {'position': step})
  saver.close()


def _restore(path):
  saver = _open(path)
  state, record = saver.restore(_state())
  saver.close()
  step = int(state.step)
  assert record == {'position': step}
  assert trees.digest(state) == trees.digest(_state(step))
  return step


def _files(folder):
  return sorted(path for path in folder.rglob('*') if path.is_file())


def _put_back(path, copy):
  shutil.rmtree(path / 'checkpoints')
  shutil.copytree(copy, path / 'checkpoints')


def _check_flips(tmp_path, capsys, count):
  """Flips single bits of the newest checkpoint; all must be noticed."""
  _save(tmp_path)
  copy = tmp_path / 'copy'
  shutil.copytree(tmp_path / 'checkpoints', copy)
  dice = random.Random(0)
  names = [
    path.relative_to(copy) for path in _files(copy / '4') if path.stat().st_size
  ]
  sizes = [(copy / name).stat().st_size for name in names]
  for _ in range(count):
    _put_back(tmp_path, copy)
    # Every byte is as likely as any other, of whichever file.
    (name,) = dice.choices(names, weights=sizes)
    path = tmp_path / 'checkpoints' / name
    data = bytearray(path.read_bytes())
    bit = dice.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    damage = manifest.find_damage(path.parents[len(name.parts) - 2], 4)
    assert str(name.relative_to('4')) in damage, (name, bit, damage)
  assert _restore(tmp_path) == 2
  said = capsys.readouterr().err
  assert 'checkpoint of step 4 is damaged' in said
  assert name.name in said and 'continues from step 2' in said


def test_flipped_bits_are_found(tmp_path, capsys):
  _check_flips(tmp_path, capsys, 20)


@pytest.mark.slow
def test_two_hundred_flipped_bits_are_found(tmp_path, capsys):
  _check_flips(tmp_path, capsys, 200)


def _truncate(path, other):
  path.write_bytes(path.read_bytes()[:-1])


def _empty(path, other):
  path.write_bytes(b'')


def _delete(path, other):
  path.unlink()


def _swap(path, other):
  mine = path.read_bytes()
  path.write_bytes(other.read_bytes())
  other.write_bytes(mine)


@pytest.mark.parametrize('harm', [_truncate, _empty, _delete, _swap])
def test_no_harm_to_any_file_is_silent(tmp_path, capsys, harm):
  _save(tmp_path, steps=(1, 2, 4))
  copy = tmp_path / 'copy'
  shutil.copytree(tmp_path / 'checkpoints', copy)
  tried = 0
  for original in _files(copy / '4'):
    _put_back(tmp_path, copy)
    name = original.relative_to(copy / '4')
    path = tmp_path / 'checkpoints' / '4' / name
    other = tmp_path / 'checkpoints' / '2' / name
    if harm is _swap and not other.exists():
      continue
    harm(path, other)
    same = path.exists() and path.read_bytes() == original.read_bytes()
    if same or not original.stat().st_size:
      continue
    tried += 1
    saver = _open(tmp_path)
    # A swap harms both.
    assert saver.latest_step() == (1 if harm is _swap else 2), name
    saver.close()
    said = capsys.readouterr().err
    assert 'step 4 is damaged' in said and name.name in said, said
    aside = tmp_path / 'checkpoints' / '4.damaged'
    assert aside.is_dir() and not (tmp_path / 'checkpoints' / '4').exists()
  assert tried > 3


def test_swapped_and_added_files_and_folders_are_told(tmp_path):
  _save(tmp_path)
  folder = tmp_path / 'checkpoints'
  (folder / '4').rename(folder / 'x')
  (folder / '2').rename(folder / '4')
  assert 'that of step 2' in manifest.find_damage(folder / '4', 4)
  (folder / 'x' / 'state' / 'more').write_text('x')
  damage = manifest.find_damage(folder / 'x', 4)
  assert damage == 'state/more is not in the manifest'


def test_after_damage_the_run_saves_the_step_again(tmp_path):
  _save(tmp_path)
  (tmp_path / 'checkpoints/4/state/_METADATA').write_bytes(b'')
  _save(tmp_path, steps=(3, 4))
  assert _restore(tmp_path) == 4


def test_one_line_when_no_checkpoint_is_whole(tmp_path):
  _save(tmp_path)
  for step in (2, 4):
    (tmp_path / f'checkpoints/{step}/state/_METADATA').write_bytes(b'')
  for _ in range(2):
    with pytest.raises(ValueError, match='no checkpoint is whole') as caught:
      _open(tmp_path)
    text = str(caught.value)
    assert 'step 4: state/_METADATA has 0 bytes' in text and 'step 2' in text
    assert '\n' not in text and '--workdir' in text
  with pytest.raises(ValueError, match='no checkpoint is whole'):
    checkpoint.restore_params(tmp_path)


def test_a_save_that_was_killed_is_removed_and_no_damage(tmp_path, capsys):
  _save(tmp_path)
  folder = tmp_path / 'checkpoints'
  (folder / '4' / manifest.NAME).unlink()
  (folder / '4.saving').write_text('')
  # Whoever reads while it is being written takes the one before.
  assert checkpoint.restore_params(tmp_path)[1] == 2
  assert _restore(tmp_path) == 2
  assert 'did not come to its end' in capsys.readouterr().err
  assert [path.name for path in folder.iterdir()] == ['2']
  # The very first save too.
  (folder / '2' / manifest.NAME).unlink()
  (folder / '2.saving').write_text('')
  assert _open(tmp_path).latest_step() is None


def test_old_ones_go_when_the_new_manifest_is_there(tmp_path, monkeypatch):
  saver = _open(tmp_path, keep=1)
  saver.save(1, _state(1), {'position': 1})
  saver.wait()
  folder = tmp_path / 'checkpoints'
  seen, real = [], manifest.write

  def write(path, step):
    seen.append(sorted(place.name for place in folder.iterdir()))
    real(path, step)

  monkeypatch.setattr(manifest, 'write', write)
  saver.save(2, _state(2), {'position': 2})
  saver.close()
  assert seen == [['1', '2', '2.saving']]
  assert [path.name for path in folder.iterdir()] == ['2']


def test_a_step_that_is_being_saved_is_not_saved_twice(tmp_path):
  saver = _open(tmp_path)
  for _ in range(2):
    saver.save(4, _state(4), {'position': 4})
  saver.close()
  assert _restore(tmp_path) == 4


def test_exported_parameters_are_verified(tmp_path, capsys):
  _save(tmp_path)
  (tmp_path / 'checkpoints/4/state/_METADATA').write_bytes(b'')
  params, step = checkpoint.restore_params(tmp_path)
  assert step == 2
  jax.tree.map(lambda a, b: (a == b).all() or 1 / 0, params, _state(2).ema)
  assert 'step 4 is damaged' in capsys.readouterr().err
  with pytest.raises(ValueError, match='step 4: state/_METADATA'):
    checkpoint.restore_params(tmp_path, step=4)
  # Reading sets nothing aside.
  assert (tmp_path / 'checkpoints' / '4').is_dir()


def _check_save_error(tmp_path, error):
  text = str(error)
  assert 'the checkpoint of step 4 could not be saved' in text
  assert 'free: ' in text and 'needed: about ' in text and '\n' not in text
  assert 'continued from: 2.' in text
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['2']


def test_a_full_disk_stops_with_the_bytes_and_saves_again(tmp_path):
  """Files cannot grow over 64 KiB; the state has more."""
  saver = _open(tmp_path)
  saver.save(2, _state(2), {'position': 2})
  saver.wait()
  big = jax.random.normal(jax.random.key(0), (2**18,))
  large = _state(4).replace(params={'w': big})
  old = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, old[1]))
  try:
    with pytest.raises(checkpoint.SaveError) as caught:
      saver.save(4, large, {'position': 4})
      saver.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
  _check_save_error(tmp_path, caught.value)
  assert f'about {trees.num_bytes(large)} bytes' in str(caught.value)
  # There is room again.
  saver.save(5, _state(5), {'position': 5})
  saver.close()
  assert _restore(tmp_path) == 5


def test_a_disk_that_is_full_for_the_manifest(tmp_path, monkeypatch):
  saver = _open(tmp_path)
  saver.save(2, _state(2), {'position': 2})
  saver.wait()

  def write(folder, step):
    (folder / 'manifest.json.tmp').write_text('{')
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(manifest, 'write', write)
    saver.save(4, _state(4), {'position': 4})
    with pytest.raises(checkpoint.SaveError) as caught:
      saver.close()
  _check_save_error(tmp_path, caught.value)
  assert 'No space left' in str(caught.value)
  assert _restore(tmp_path) == 2


def test_a_failed_save_is_noticed_before_the_next_one(tmp_path, monkeypatch):
  saver = _open(tmp_path)

  def write(folder, step):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(manifest, 'write', write)
  saver.save(4, _state(4), {'position': 4})
  saver._worker.join()
  with pytest.raises(checkpoint.SaveError, match='continued from: none'):
    saver.check()
  saver.check()


def test_a_manifest_has_one_text(tmp_path):
  _save(tmp_path)
  path = tmp_path / 'checkpoints' / '4' / manifest.NAME
  record = json.loads(path.read_text())
  assert record['step'] == 4 and 'state/_METADATA' in record['files']
  path.write_text(json.dumps(record))
  assert manifest.find_damage(path.parent, 4) == 'manifest.json is damaged'
