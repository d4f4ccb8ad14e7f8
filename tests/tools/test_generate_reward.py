"""tools.generate with a reward: guidance, rejection, resume and errors."""

import hashlib
import json

import numpy as np
import pytest
import reward_folder

from dpo_jax.tools import arguments, generate

FAST = ['--steps=2', '--size=8', '--batch=8', '--images_per_prompt=4']


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp('prompts') / 'prompts.txt'
  path.write_text('a\nb\n')
  return path


@pytest.fixture(scope='module')
def reward(tmp_path_factory):
  folder = tmp_path_factory.mktemp('reward')
  return reward_folder.write(folder, 'time', 1, (8, 8), 'latents')


def _run(out, model, prompts, *more):
  argv = [f'--model={model}', f'--prompts={prompts}', f'--out={out}']
  return arguments.run(generate.main, [*argv, *FAST, *more])


def _manifest(out):
  lines = (out / 'manifest.jsonl').read_text().splitlines()
  return {entry['file']: entry for entry in map(json.loads, lines)}


def _digests(out):
  return {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in out.glob('*_*.png')
    if path.name != 'contact_sheet.png'
  }


@pytest.fixture(scope='module')
def drawn(tiny_pixel_folder, prompts, reward, tmp_path_factory):
  """Folders of plain pictures, of scored ones and of guided ones."""
  root = tmp_path_factory.mktemp('drawn')
  given = tiny_pixel_folder, prompts
  assert _run(root / 'plain', *given) == 0
  scored = [f'--reward={reward}', '--reward_scale=0']
  assert _run(root / 'scored', *given, *scored) == 0
  guided = [f'--reward={reward}', '--reward_scale=3', '--recurrence=2']
  assert _run(root / 'guided', *given, *guided) == 0
  return root


def test_guidance_raises_log_r_and_scale_0_is_the_plain_picture(drawn, reward):
  plain, scored, guided = (
    drawn / name for name in ('plain', 'scored', 'guided')
  )
  assert _digests(plain) == _digests(scored) and len(_digests(plain)) == 8
  before, after = (
    np.array([entry['log_reward'] for entry in _manifest(out).values()])
    for out in (scored, guided)
  )
  assert np.isfinite(before).all() and (before < 0).all()
  assert after.mean() > before.mean()
  record = json.loads((guided / 'settings.json').read_text())['reward']
  assert record['scale'] == 3.0 and record['recurrence'] == 2
  assert record['path'] == str(reward) and len(record['sha256']) == 64
  assert record['place'] == 'x_t' and record['reject'] is None


def test_a_share_of_malign_pictures_raises_log_r(
  drawn, tiny_pixel_folder, prompts, tmp_path
):
  """By the odds of each network, as log(9 / odds) added to its logit."""
  one = reward_folder.write(
    tmp_path / 'one', 'time', 1, (8, 8), 'latents', count=1, odds=[0.2]
  )
  found = []
  for name, more in (('balanced', []), ('rare', ['--malign_share=0.1'])):
    out = tmp_path / name
    given = [f'--reward={one}', '--reward_scale=0', *more]
    assert _run(out, tiny_pixel_folder, prompts, *given) == 0
    entries = _manifest(out).values()
    r = np.exp([entry['log_reward'] for entry in entries])
    found.append(np.log(r / (1 - r)))
    record = json.loads((out / 'settings.json').read_text())['reward']
    assert record['malign_share'] == (0.1 if more else None)
    assert _digests(out) == _digests(drawn / 'plain')
  np.testing.assert_allclose(found[1] - found[0], np.log(45), rtol=1e-3)


def test_guided_pictures_go_on_where_they_stopped(
  drawn, tiny_pixel_folder, prompts, reward, capsys
):
  out, before = drawn / 'guided', _digests(drawn / 'guided')
  (out / '000001_2.png').unlink()
  more = [f'--reward={reward}', '--reward_scale=3']
  given = tiny_pixel_folder, prompts
  assert _run(out, *given, *more, '--recurrence=2') == 0
  assert '7 pictures are there' in capsys.readouterr().err
  assert _digests(out) == before
  assert _run(out, *given, *more, '--recurrence=4') == 2
  assert 'made with other settings' in capsys.readouterr().err


def test_rejection_keeps_what_scores_above_and_goes_on(
  drawn, tiny_pixel_folder, prompts, reward, capsys
):
  out, given = drawn / 'kept', (tiny_pixel_folder, prompts)
  more = [f'--reward={reward}', '--reject=0.5', '--reject_tries=40']
  assert _run(out, *given, *more) == 0
  assert 'kept 8 pictures of' in capsys.readouterr().err
  entries = _manifest(out)
  scored = _manifest(drawn / 'scored')
  first = {name: entry['log_reward'] for name, entry in scored.items()}
  limit = np.float32(np.quantile(list(first.values()), 0.5))
  known = json.loads((out / 'threshold.json').read_text())
  assert known['log_reward'] == pytest.approx(limit, abs=1e-5)
  assert list(entries) == list(scored)
  for name, entry in entries.items():
    assert entry['log_reward'] >= known['log_reward']
    # The first draw is the plain picture, and kept if it is good enough.
    assert (entry['tries'] == 1) == (first[name] >= known['log_reward'])
    assert (entry['noise_number'] == entry['seed']) == (entry['tries'] == 1)
    assert (entry['sha256'] == scored[name]['sha256']) == (entry['tries'] == 1)
  assert sum(entry['tries'] == 1 for entry in entries.values()) == 4

  before = _digests(out)
  again = next(name for name, e in entries.items() if e['tries'] > 1)
  (out / again).unlink()
  assert _run(out, *given, *more) == 0
  assert _digests(out) == before and _manifest(out) == entries


def test_pictures_that_no_try_is_good_enough_of_are_named(
  drawn, tiny_pixel_folder, prompts, reward, capsys
):
  out, given = drawn / 'few', (tiny_pixel_folder, prompts)
  more = [f'--reward={reward}', '--reject=0.5']
  assert _run(out, *given, *more, '--reject_tries=1') == 2
  lines = capsys.readouterr().err.splitlines()
  assert '4 pictures were not accepted in 1 tries' in lines[-1]
  assert 'more --reject_tries goes on' in lines[-1]
  assert len(_manifest(out)) == len(_digests(out)) == 4
  assert _run(out, *given, *more, '--reject_tries=40') == 0
  assert '4 pictures are there' in capsys.readouterr().err
  assert _digests(out) == _digests(drawn / 'kept')


@pytest.mark.parametrize(
  'more, words',
  [
    (['--recurrence=2'], '--recurrence: is for a reward; give --reward='),
    (['--reject=0.1'], '--reject: is for a reward'),
    (['--reward=R', '--reject_tries=2'], 'give --reject too'),
    (['--reward=R', '--backward_rate=0.1'], 'give --backward_steps too'),
    (['--reward=R', '--reject=0.1', '--latents=n.npy'], 'leave one out'),
    (['--reward=R', '--reject=0.1', '--recurrence=2'], 'there is none'),
    (['--reward=R', '--reject=0.1', '--reward_start=0.3'], 'there is none'),
    (['--reward_start=0.3'], '--reward_start: is for a reward'),
    (['--reward=R', '--reject=1.0'], 'at most 0.999'),
    (['--malign_share=0.1'], '--malign_share: is for a reward'),
    (['--reward=R', '--malign_share=0.1'], 'does not say at which odds'),
    (['--reward=R', '--malign_share=0'], 'at least 1e-06'),
    (['--reward=nowhere'], 'nowhere/config.json: no such file'),
    (['--reward=R', '--size=16'], 'of 8x8, and --size makes 16x16'),
  ],
)
def test_bad_flags_are_one_line(
  tiny_pixel_folder, prompts, reward, tmp_path, capsys, more, words
):
  more = [
    f'--reward={reward}' if word == '--reward=R' else word for word in more
  ]
  assert _run(tmp_path / 'out', tiny_pixel_folder, prompts, *more) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: ')
  assert words in lines[0]
  assert not (tmp_path / 'out').exists()
