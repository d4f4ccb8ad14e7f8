"""The page in a real headless Chromium: keyboard, mouse, undo, kills."""

import shutil

import judge_server
import pytest

playwright = pytest.importorskip('playwright.sync_api')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
pytestmark = pytest.mark.skipif(
  CHROMIUM is None, reason='needs chromium (apt-get install chromium)'
)
FLAGS = (
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
)


@pytest.fixture(scope='module')
def browser():
  with playwright.sync_playwright() as engine:
    made = engine.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
    yield made
    made.close()


@pytest.fixture
def open_page(browser):
  """Opens the page as a judge, in a browser of their own."""
  contexts = []

  def run(server, judge=''):
    context = browser.new_context(viewport={'width': 1200, 'height': 900})
    contexts.append(context)
    page = context.new_page()
    page.set_default_timeout(20_000)
    problems = []
    page.on('pageerror', lambda error: problems.append(str(error)))
    page.problems = problems
    more = f'?judge={judge}' if judge else ''
    page.goto(server.url + more)
    return page

  yield run
  for context in contexts:
    context.close()


@pytest.fixture
def server(tmp_path):
  folders = [
    judge_server.write_pictures(tmp_path / name, draw)
    for draw, name in enumerate('ab')
  ]
  made = judge_server.Server(
    f'--votes={tmp_path / "votes.jsonl"}',
    f'--a={folders[0]}',
    f'--b={folders[1]}',
  )
  yield made
  made.kill()


def wait_for(page, count):
  # The page's own policy forbids scripts that are given as a text.
  counter = page.locator('#count')
  playwright.expect(counter).to_have_text(count, timeout=20_000)


def lines(tmp_path):
  return judge_server.read_votes(tmp_path / 'votes.jsonl')


def test_votes_by_keyboard_and_mouse_and_undo(server, open_page, tmp_path):
  page = open_page(server)
  page.fill('#name', 'ann')
  page.click('#start')
  wait_for(page, '0 / 6')
  page.keyboard.press('ArrowLeft')
  wait_for(page, '1 / 6')
  page.keyboard.press('ArrowRight')
  wait_for(page, '2 / 6')
  page.keyboard.press('Space')
  wait_for(page, '3 / 6')
  page.click('[data-side=right]')
  wait_for(page, '4 / 6')
  page.keyboard.press('u')
  wait_for(page, '3 / 6')
  page.click('text=About the same')
  wait_for(page, '4 / 6')
  found = lines(tmp_path)
  assert ['undo' in line for line in found] == [False] * 4 + [True, False]
  choices = [line['votes'][0]['choice'] for line in found if 'votes' in line]
  assert choices[2] == 'tie' and choices[4] == 'tie'
  assert {choices[0], choices[1], choices[3]} <= {'a', 'b'}
  # The item that was undone came again.
  assert found[3]['votes'][0]['item'] == found[5]['votes'][0]['item']
  for _ in range(2):
    page.keyboard.press('ArrowLeft')
    page.wait_for_timeout(300)
  page.wait_for_selector('text=That is all')
  # Keys do nothing now.
  page.keyboard.press('ArrowLeft')
  page.wait_for_timeout(200)
  assert len(lines(tmp_path)) == 8 and page.problems == []


def test_captions_are_text(server, open_page):
  page = open_page(server, 'ann')
  wait_for(page, '0 / 6')
  seen = []
  for _ in range(6):
    seen.append(page.inner_text('.prompt'))
    done = int(page.inner_text('#count').split(' / ')[0])
    page.keyboard.press('Space')
    wait_for(page, f'{done + 1} / 6')
  (hostile,) = [text for text in seen if 'onerror' in text]
  assert hostile.startswith('<img src=x onerror=') and '{{7*7}}' in hostile
  # The override of the reading direction is spelt out.
  assert '\\u202e' in hostile
  assert page.title() == 'Which is better?' and page.problems == []


def test_the_next_pictures_are_there_before(server, open_page):
  page = open_page(server, 'ann')
  wait_for(page, '0 / 6')
  page.wait_for_load_state('networkidle')
  asked = []
  page.on('request', lambda request: asked.append(request.url))
  page.keyboard.press('Space')
  wait_for(page, '1 / 6')
  page.wait_for_load_state('networkidle')
  # Those of the pair shown now came earlier; those of the next are new.
  shown = page.eval_on_selector_all('.pair img', 'all => all.map(i => i.src)')
  assert len(shown) == 2
  assert not {url for url in asked if 'picture/' in url} & set(shown)


def test_two_judges_and_a_resume(server, open_page, tmp_path):
  ann, bob = open_page(server, 'ann'), open_page(server, 'bob')
  for page in (ann, bob):
    wait_for(page, '0 / 6')
    page.keyboard.press('Space')
    wait_for(page, '1 / 6')
  ann.keyboard.press('Space')
  wait_for(ann, '2 / 6')
  again = open_page(server, 'ann')
  wait_for(again, '2 / 6')
  assert [line['judge'] for line in lines(tmp_path)] == ['ann', 'bob', 'ann']


def test_a_vote_given_while_the_server_is_away_arrives(
  server, open_page, tmp_path
):
  page = open_page(server, 'ann')
  wait_for(page, '0 / 6')
  server.kill()
  page.keyboard.press('ArrowLeft')
  page.wait_for_selector('text=your vote is kept')
  # More keys while it waits are no votes.
  page.keyboard.press('ArrowLeft')
  server.start()
  wait_for(page, '1 / 6')
  assert page.is_hidden('#problem')
  assert len(lines(tmp_path)) == 1


def test_likes_by_clicks(open_page, tmp_path):
  folder = judge_server.write_pictures(tmp_path / 'p', 0, count=10)
  server = judge_server.Server(
    f'--votes={tmp_path / "votes.jsonl"}', f'--likes={folder}', '--grid=6'
  )
  try:
    page = open_page(server, 'ann')
    wait_for(page, '0 / 10')
    cells = page.query_selector_all('.cell')
    assert len(cells) == 6
    items = [cell.get_attribute('data-item') for cell in cells]
    cells[1].click()
    for _ in range(2):
      cells[2].click()
    for _ in range(3):
      cells[3].click()
    page.keyboard.press('Enter')
    wait_for(page, '6 / 10')
    page.click('text=Next page')
    page.wait_for_selector('text=That is all')
    first, second = lines(tmp_path)
    choices = {vote['item']: vote['choice'] for vote in first['votes']}
    wanted = ['benign', 'malign', 'unsure', 'benign', 'benign', 'benign']
    assert [choices[item] for item in items] == wanted
    assert len(second['votes']) == 4 and page.problems == []
  finally:
    server.kill()
