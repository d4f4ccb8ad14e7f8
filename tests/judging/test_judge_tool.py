"""The server itself: sides, kills, foreign requests, export."""

import http.client
import json
import pathlib
import threading

import judge_server
import pytest
from PIL import Image

from dpo_jax.judging import export, items
from dpo_jax.tools import arguments, judge, prepare


@pytest.fixture
def folders(tmp_path):
  return [
    judge_server.write_pictures(tmp_path / name, draw)
    for draw, name in enumerate('ab')
  ]


@pytest.fixture
def start(tmp_path, folders):
  """Starts servers that end with the test."""
  servers = []

  def run(*words, **options):
    server = judge_server.Server(
      f'--votes={tmp_path / "votes.jsonl"}',
      *(words or (f'--a={folders[0]}', f'--b={folders[1]}')),
      **options,
    )
    servers.append(server)
    return server

  yield run
  for server in servers:
    server.kill()


def side_of(server, url, folders):
  """Which model a shown picture is of."""
  data = server.ask('GET', f'/{url}')[2]
  (found,) = [
    name
    for name, folder in zip('ab', folders, strict=True)
    if any(path.read_bytes() == data for path in folder.glob('*_0.png'))
  ]
  return found


def test_a_choice_is_of_the_picture_and_not_of_the_side(
  start, folders, tmp_path
):
  server = start()
  lefts = []
  found = server.next('ann')
  assert (found['done'], found['total']) == (0, 6)
  while found['shown']:
    (one,) = found['shown']
    sides = [side_of(server, url, folders) for url in one['images']]
    lefts.append(sides[0])
    # Always for b, wherever it is.
    choice = 'left' if sides[0] == 'b' else 'right'
    status, found = server.vote('ann', [one], choice)
    assert status == 200
  lines = judge_server.read_votes(tmp_path / 'votes.jsonl')
  assert [line['votes'][0]['choice'] for line in lines] == ['b'] * 6
  assert set(lefts) == {'a', 'b'}
  # Nothing that the browser gets names a folder or a file of it.
  text = json.dumps(server.next('bob'))
  assert str(folders[0]) not in text and '"a"' not in text
  text = server.stop()
  assert 'b wins 100.0%' in text


def vote_all(server, name, choice, acknowledged):
  """Votes until nothing is left, whatever happens to the server."""
  found = None
  while found is None or found['shown']:
    try:
      if found is None:
        found = server.next(name)
        continue
      (one,) = found['shown']
      number = f'{name}-{one["item"].replace(".", "_")}'
      status, answer = server.vote(name, [one], choice, number)
      assert status == 200
      acknowledged.append((name, one['item']))
      found = answer
    # An answer may break off in its middle.
    except (OSError, http.client.HTTPException):
      threading.Event().wait(0.05)


def start_judges(server, names, choice):
  """(threads that vote, what is acknowledged to them)."""
  acknowledged = []
  threads = [
    threading.Thread(target=vote_all, args=[server, name, choice, acknowledged])
    for name in names
  ]
  for thread in threads:
    thread.start()
  return threads, acknowledged


def written(tmp_path):
  """(judge, item) of the lines of votes."""
  lines = judge_server.read_votes(tmp_path / 'votes.jsonl')
  return [(line['judge'], line['votes'][0]['item']) for line in lines]


def test_kills_lose_no_acknowledged_vote(start, tmp_path):
  """3 judges vote while the server is killed again and again."""
  server = start()
  threads, acknowledged = start_judges(server, ['ann', 'bob', 'eve'], 'tie')
  for _ in range(3):
    server.kill()
    server.start()
  for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
  found = written(tmp_path)
  assert len(found) == len(set(found)) == 18
  assert set(acknowledged) == set(found)


@pytest.mark.slow
def test_10000_votes_with_5_kills(start, tmp_path):
  """RELIABILITY.md X6: none lost, none doubled."""
  count = 2500
  folders = [
    judge_server.write_pictures(
      tmp_path / f'many{draw}', draw, count=count, side=4
    )
    for draw in range(2)
  ]
  server = start(f'--a={folders[0]}', f'--b={folders[1]}')
  names = [f'judge{i}' for i in range(4)]
  threads, acknowledged = start_judges(server, names, 'left')
  for kill in range(1, 6):
    while len(acknowledged) < kill * 1500:
      threading.Event().wait(0.02)
    server.kill()
    server.start()
  for thread in threads:
    thread.join()
  found = written(tmp_path)
  assert len(found) == len(set(found)) == 4 * count
  assert set(acknowledged) == set(found)


def test_foreign_requests_are_refused(start, tmp_path):
  server = start()
  (one,) = server.next('ann')['shown']
  body = {
    'id': 'x' * 12,
    'judge': 'ann',
    'votes': [{'item': one['item'], 'question': 'q1', 'choice': 'tie'}],
  }
  own = f'{server.host}:{server.port}'
  for path in ('/', '/next?judge=ann', '/page.js', f'/{one["images"][0]}'):
    for host in ('evil.example', f'evil.example:{server.port}', 'localhost'):
      assert server.ask('GET', path, headers={'Host': host})[0] == 421
  for headers in (
    {'Origin': 'http://evil.example'},
    {'Origin': 'null'},
    {'Sec-Fetch-Site': 'cross-site'},
    {'Content-Type': 'text/plain'},
    {'Host': 'evil.example'},
  ):
    status, _, _ = server.ask('POST', '/vote', body, headers)
    assert status in (403, 421), headers
  assert judge_server.read_votes(tmp_path / 'votes.jsonl') == []
  status, headers, _ = server.ask(
    'POST', '/vote', body, {'Origin': f'http://{own}'}
  )
  assert status == 200
  assert "default-src 'none'" in headers['content-security-policy']
  assert 'access-control-allow-origin' not in headers
  for path in ('/picture/../votes.jsonl', '/picture/0', '/votes.jsonl', '/x'):
    assert server.ask('GET', path)[0] == 404


def test_wrong_votes_are_refused(start, tmp_path):
  server = start()
  (one,) = server.next('ann')['shown']
  good = {'item': one['item'], 'question': 'q1', 'choice': 'tie'}

  def post(**changes):
    body = {'id': 'x' * 12, 'judge': 'ann', 'votes': [good]} | changes
    return server.ask('POST', '/vote', body)

  for changes in (
    {'id': 'x'},
    {'judge': '<b>'},
    {'votes': []},
    {'votes': [good, good]},
    {'votes': [good | {'choice': 'a'}]},
    {'votes': [good | {'item': '../x'}]},
    {'votes': [good | {'question': 'q2'}]},
    {'votes': ['tie']},
    {'votes': 3},
  ):
    status, _, answer = post(**changes)
    assert status == 409 and answer['error'], changes
  assert judge_server.read_votes(tmp_path / 'votes.jsonl') == []
  assert post()[0] == 200
  # Again, with another id: the item has its vote.
  status, _, answer = post(id='y' * 12)
  assert status == 409 and 'has your vote already' in answer['error']


def test_a_token_is_asked_for(tmp_path, folders):
  words = [f'--a={folders[0]}', f'--b={folders[1]}', '--token=secret-token']
  server = judge_server.Server(f'--votes={tmp_path / "v.jsonl"}', *words)
  try:
    assert server.query == '?token=secret-token'
    for path in ('/', '/next?judge=ann', '/page.js'):
      assert server.ask('GET', path)[0] == 403
    assert server.ask('GET', '/?token=wrong')[0] == 403
    status, headers, _ = server.ask('GET', f'/{server.query}')
    assert status == 200
    cookie = headers['set-cookie']
    assert 'HttpOnly' in cookie and 'samesite=strict' in cookie.lower()
    sent = {'Cookie': cookie.partition(';')[0]}
    assert server.ask('GET', '/next?judge=ann', headers=sent)[0] == 200
  finally:
    server.kill()


def test_enough_votes_end_an_item(start):
  server = start()
  server.kill()
  server._words = (*server._words, '--votes_per_item=1')
  server.start()
  found = server.next('ann')
  while found['shown']:
    found = server.vote('ann', found['shown'], 'tie')[1]
  assert server.next('bob')['shown'] == []


def test_three_questions_and_one_without_the_prompt(start, folders):
  server = start(f'--a={folders[0]}', f'--b={folders[1]}', '--questions=three')
  asked = []
  found = server.next('ann')
  for _ in range(3):
    (one,) = found['shown']
    asked.append((one['question'], bool(one['prompt'])))
    found = server.vote('ann', [one], 'tie')[1]
  assert asked == [('q1', True), ('q2', False), ('q3', True)]


def test_export_becomes_a_prepared_folder(start, folders, tmp_path, capsys):
  server = start()
  choices = {}
  for name, wanted in (('ann', 'a'), ('bob', 'a'), ('eve', 'b')):
    found = server.next(name)
    while found['shown']:
      (one,) = found['shown']
      sides = [side_of(server, url, folders) for url in one['images']]
      choice = ('left', 'right')[sides.index(wanted)]
      if name == 'eve' and one['item'] == '000003_0.png':
        choice = 'tie'
      choices[name, one['item']] = choice
      found = server.vote(name, [one], choice)[1]
  server.kill()
  out = tmp_path / 'export'
  judge.main(
    [
      f'--a={folders[0]}',
      f'--b={folders[1]}',
      f'--votes={tmp_path / "votes.jsonl"}',
      f'--export={out}',
    ]
  )
  text = capsys.readouterr().out
  assert 'b wins 0.0%' in text and '18 votes of 3 judges on 6 items' in text
  rows = [json.loads(x) for x in (out / 'pairs.jsonl').read_text().splitlines()]
  assert len(rows) == 6 and rows[0]['caption'] == judge_server.HOSTILE
  assert rows[2]['winner_generator'] == 'a'
  with Image.open(out / rows[2]['winner']) as image:
    assert image.size == (16, 16)
  assert (out / rows[2]['winner']).read_bytes() == (
    folders[0] / '000002_0.png'
  ).read_bytes()
  record = json.loads((out / 'votes.json').read_text())
  assert record['counts']['kept'] == 6
  assert record['questions']['q1']['krippendorff_alpha'] < 0.5
  prepare.main(
    [
      f'--source={out / "pairs.jsonl"}',
      '--format=jsonl',
      f'--out={tmp_path / "prepared"}',
    ]
  )
  assert (tmp_path / 'prepared' / 'pairs').is_dir()


def test_likes_a_page_at_a_time(start, folders, tmp_path):
  server = start(f'--likes={folders[0]}', '--grid=4')
  found = server.next('ann')
  assert len(found['shown']) == 4 and len(found['ahead']) == 2
  body = {
    'id': 'page-0001',
    'judge': 'ann',
    'votes': [
      {'item': one['item'], 'question': one['question'], 'choice': choice}
      for one, choice in zip(
        found['shown'], ['benign', 'malign', 'unsure', 'malign'], strict=True
      )
    ],
  }
  status, _, after = server.ask('POST', '/vote', body)
  assert status == 200 and (after['done'], after['total']) == (4, 6)
  assert len(after['shown']) == 2
  status, _, back = server.ask(
    'POST', '/undo', {'id': 'undo-0001', 'judge': 'ann'}
  )
  assert back['done'] == 0 and back['shown'] == found['shown']
  server.ask('POST', '/vote', body | {'id': 'page-0002'})
  server.kill()
  judge.main(
    [
      f'--likes={folders[0]}',
      f'--votes={tmp_path / "votes.jsonl"}',
      f'--export={tmp_path / "likes"}',
      '--cross=all',
    ]
  )
  likes, pairs = (
    [json.loads(line) for line in (tmp_path / 'likes' / name).open()]
    for name in ('likes.jsonl', 'pairs.jsonl')
  )
  assert sorted(one['liked'] for one in likes) == [False, False, True]
  (good,) = [one for one in likes if one['liked']]
  bad = {one['image'] for one in likes if not one['liked']}
  assert len(pairs) == 2 and {one['loser'] for one in pairs} == bad
  for pair in pairs:
    assert (pair['caption'], pair['winner']) == (good['caption'], good['image'])


def test_contact_sheets_are_no_pictures(tmp_path):
  for name in ('a_0', 'contact_sheet_0', 'contact_sheet', 'contact_sheet-01'):
    Image.new('RGB', (4, 4)).save(tmp_path / f'{name}.png')
  found = [item.key for item in items.open_pictures(str(tmp_path))]
  assert found == ['a_0.png', 'contact_sheet_0.png']


def test_likes_are_crossed_within_a_prompt_or_all():
  likes = [
    {'caption': caption, 'image': f'{number}.png', 'liked': liked}
    for number, (caption, liked) in enumerate(
      [('cat', True), ('cat', False), ('dog', False), ('dog', True)]
    )
  ]

  def crossed(by):
    return [
      (one['caption'], one['winner'][0], one['loser'][0])
      for one in export.cross_likes(likes, by=by)
    ]

  assert crossed('prompt') == [('cat', '0', '1'), ('dog', '3', '2')]
  assert crossed('all') == [
    ('cat', '0', '1'),
    ('cat', '0', '2'),
    ('dog', '3', '1'),
    ('dog', '3', '2'),
  ]
  with pytest.raises(ValueError, match=r'1 benign and 1 malign .*all'):
    export.cross_likes([likes[0], likes[2]], by='prompt')


def error_of(capsys, *words):
  assert arguments.run(judge.main, words) == 2
  return capsys.readouterr().err.splitlines()[-1]


def test_errors_are_one_line(folders, tmp_path, capsys):
  votes = f'--votes={tmp_path / "v.jsonl"}'
  pairs = [f'--a={folders[0]}', f'--b={folders[1]}']
  assert 'give --a and --b (pairs), or --likes' in error_of(capsys, votes)
  assert '--likes and --a, --b' in error_of(capsys, votes, *pairs, '--likes=x')
  assert 'no pictures there' in error_of(capsys, votes, f'--likes={tmp_path}/x')
  assert 'is for pairs' in error_of(
    capsys, votes, f'--likes={folders[0]}', '--questions=three'
  )
  assert 'the votes are on q1' in error_of(
    capsys, votes, *pairs, f'--export={tmp_path / "e"}', '--question=q9'
  )
  assert '--cross=all: is for --likes' in error_of(
    capsys, votes, *pairs, f'--export={tmp_path / "e"}', '--cross=all'
  )
  assert pathlib.Path(tmp_path / 'v.jsonl').is_file()
