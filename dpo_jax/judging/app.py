"""The server of the page: what is next, votes, undo, pictures.

What it keeps to: votes are acknowledged once they are on the disk; the browser
never learns which model a picture is of; requests of other sites and to other
host names are refused; captions are data and never markup.
"""

import hmac
import importlib.resources
import json
import mimetypes
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from starlette import applications, requests, responses, routing

from dpo_jax.evaluate import captions
from dpo_jax.judging import items as items_lib
from dpo_jax.judging import votes as votes_lib

CSP = (
  "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; "
  "connect-src 'self'; base-uri 'none'; form-action 'none'; "
  "frame-ancestors 'none'"
)
MAX_BODY = 1 << 20
# Pictures of a page of likes.
GRID = 24
COOKIE = 'dpo_jax_judge'


class Session:
  """The items and votes of one page, whoever looks at it."""

  def __init__(
    self,
    items: Sequence[items_lib.Item],
    votes: votes_lib.VoteFile,
    *,
    mode: str,
    questions: Sequence[str] = ('q1',),
    votes_per_item: int = 0,
    grid: int = GRID,
    seed: str = '',
  ):
    """votes_per_item: items with so many votes are not shown any more; 0: all
    judges see all. grid: pictures of a page of likes."""
    self.items = {item.key: item for item in items}
    self.mode, self.questions = mode, tuple(questions)
    self.votes, self._most, self._grid = votes, votes_per_item, grid
    self._seed = seed
    # Names of pictures that tell nothing of the model, new at every start.
    self._secret = secrets.token_hex(16)
    self._pictures: dict[str, Any] = {}
    for item in items:
      for number, path in enumerate(item.pictures):
        self._pictures[self._name(item, number)] = path
    self._orders: dict[str, list[items_lib.Item]] = {}
    self._guard = threading.Lock()

  def _name(self, item, number) -> str:
    number = items_lib.draw(self._secret, item.key, str(number))
    return f'{number:016x}'

  def picture(self, name: str):
    """The file of an opaque name, None if there is none."""
    return self._pictures.get(name)

  def _order(self, judge):
    with self._guard:
      if judge not in self._orders:
        found = items_lib.order(list(self.items.values()), judge, self._seed)
        self._orders[judge] = list(found)
      return self._orders[judge]

  def _waiting(self, judge) -> list[tuple[items_lib.Item, str]]:
    """(item, question) that this judge has not voted on, in order."""
    done = self.votes.done(judge)
    counts = self.votes.counts() if self._most else {}
    return [
      (item, question)
      for item in self._order(judge)
      for question in self.questions
      if (item.key, question) not in done
      and (not self._most or counts.get((item.key, question), 0) < self._most)
    ]

  def next(self, judge: str) -> dict[str, Any]:
    """What the page shows now, what it loads ahead, and how far it is."""
    waiting = self._waiting(judge)
    done = len(self.votes.done(judge))
    found = {
      'done': done,
      'total': done + len(waiting),
      'mode': self.mode,
      'shown': [],
      'ahead': [],
    }
    size = self._grid if self.mode == items_lib.LIKES else 1
    found['shown'] = [self._show(one, judge) for one in waiting[:size]]
    ahead = waiting[size : 2 * size]
    found['ahead'] = [
      url for one in ahead for url in self._show(one, judge)['images']
    ]
    return found

  def _show(self, one, judge) -> dict[str, Any]:
    item, question = one
    numbers = list(range(len(item.pictures)))
    if self._swapped(item, question, judge):
      numbers.reverse()
    prompt = item.prompt
    if question in items_lib.WITHOUT_PROMPT:
      prompt = ''
    return {
      'item': item.key,
      'question': question,
      'ask': items_lib.QUESTIONS.get(question, ''),
      'prompt': captions.printable(prompt[:4000]),
      'images': [f'picture/{self._name(item, number)}' for number in numbers],
    }

  def _swapped(self, item, question, judge) -> bool:
    return self.mode == items_lib.PAIRS and items_lib.is_swapped(
      item, question, judge, self._seed
    )

  def vote(self, judge: str, body: Mapping[str, Any]) -> None:
    """Writes what the page sends; Refused where it fits nothing here."""
    given = body.get('votes')
    if not isinstance(given, list) or not 0 < len(given) <= 4 * self._grid:
      raise votes_lib.Refused('votes: must be a list of votes')
    votes = [self._read(judge, one) for one in given]
    if len({(vote['item'], vote['question']) for vote in votes}) < len(votes):
      raise votes_lib.Refused('an item is voted on twice')
    self.votes.add(body.get('id'), judge, votes)

  def _read(self, judge, vote) -> dict[str, str]:
    if not isinstance(vote, Mapping):
      raise votes_lib.Refused('a vote must be an object')
    item = self.items.get(str(vote.get('item')))
    question, choice = vote.get('question'), vote.get('choice')
    if item is None or question not in self.questions:
      raise votes_lib.Refused('no such item or question here')
    if self.mode == items_lib.PAIRS:
      sides = ['a', 'b']
      if self._swapped(item, question, judge):
        sides.reverse()
      names = {'left': sides[0], 'right': sides[1], 'tie': 'tie'}
      choice = names.get(str(choice))
    if choice not in items_lib.CHOICES[self.mode]:
      raise votes_lib.Refused(f'no such choice: {vote.get("choice")!a:.40}')
    return {'item': item.key, 'question': question, 'choice': choice}


class _Guard:
  """Who is answered: this page's own requests, to its own names."""

  def __init__(self, hosts: Sequence[str], token: str):
    self._hosts, self.token = tuple(hosts), token

  def refuse(
    self, request: requests.Request, *, post: bool = False
  ) -> responses.Response | None:
    """Why a request is not answered, None if it is."""
    if request.headers.get('host') not in self._hosts:
      return _error(421, 'this page is not served under that name')
    if self.token and not _knows(request, self.token):
      return _error(403, 'open the page with the ?token=... that was printed')
    if not post:
      return None
    origin = request.headers.get('origin')
    kind = request.headers.get('content-type', '').partition(';')[0]
    site = request.headers.get('sec-fetch-site', 'same-origin')
    own = origin is None or origin.partition('://')[2] in self._hosts
    own = own and site in ('same-origin', 'none')
    if not own or kind != 'application/json':
      return _error(403, 'votes come from this page only')
    return None


class _Handlers:
  """What answers each address."""

  def __init__(self, session: Session, guard: _Guard):
    self._session, self._guard = session, guard

  def page(self, request: requests.Request) -> responses.Response:
    refused = self._guard.refuse(request)
    if refused is not None:
      return refused
    response = _headers(responses.Response(_asset('page.html')))
    response.headers['content-type'] = 'text/html; charset=utf-8'
    if self._guard.token:
      response.set_cookie(
        COOKIE, self._guard.token, httponly=True, samesite='strict'
      )
    return response

  def asset(self, request: requests.Request) -> responses.Response:
    refused = self._guard.refuse(request)
    name = request.path_params['name']
    if refused is not None:
      return refused
    if name not in ('page.js', 'page.css'):
      return _error(404, 'no such file')
    kind = mimetypes.guess_type(name)[0]
    return _headers(responses.Response(_asset(name), media_type=kind))

  def picture(self, request: requests.Request) -> responses.Response:
    refused = self._guard.refuse(request)
    path = self._session.picture(request.path_params['name'])
    if refused is not None:
      return refused
    if path is None:
      return _error(404, 'no such picture')
    kind = mimetypes.guess_type(path.name)[0]
    response = _headers(responses.Response(path.read_bytes(), media_type=kind))
    response.headers['cache-control'] = 'private, max-age=86400'
    return response

  def next(self, request: requests.Request) -> responses.Response:
    refused = self._guard.refuse(request)
    judge = request.query_params.get('judge', '')
    if refused is not None:
      return refused
    if not votes_lib.JUDGE.fullmatch(judge):
      return _error(400, "a judge's name has 1 to 64 letters and digits")
    return _headers(responses.JSONResponse(self._session.next(judge)))

  async def vote(self, request: requests.Request) -> responses.Response:
    return await self._post(request, self._session.vote)

  async def undo(self, request: requests.Request) -> responses.Response:
    votes = self._session.votes
    return await self._post(
      request, lambda judge, body: votes.undo(body.get('id'), judge)
    )

  async def _post(self, request, act) -> responses.Response:
    """Acts on what was sent, and answers with what is next."""
    refused = self._guard.refuse(request, post=True)
    if refused is not None:
      return refused
    try:
      body = await _read(request)
      judge = str(body.get('judge', ''))
      act(judge, body)
      return _headers(responses.JSONResponse(self._session.next(judge)))
    except votes_lib.Refused as error:
      return _error(409, str(error))


async def _read(request: requests.Request) -> dict[str, Any]:
  """The JSON object that was sent; Refused for anything else."""
  body = bytearray()
  async for chunk in request.stream():
    body += chunk
    if len(body) > MAX_BODY:
      raise votes_lib.Refused('more than a page of votes')
  try:
    values = json.loads(bytes(body))
  except (ValueError, RecursionError) as error:
    raise votes_lib.Refused('not JSON') from error
  if not isinstance(values, dict):
    raise votes_lib.Refused('not an object')
  return values


def make_app(
  session: Session, *, hosts: Sequence[str], token: str = ''
) -> applications.Starlette:
  """The application.

  hosts: values of the Host header that are answered, NAME:PORT. token: what a
  browser must bring once (?token=), '' for none.
  """
  handlers = _Handlers(session, _Guard(hosts, token))
  return applications.Starlette(
    routes=[
      routing.Route('/', handlers.page),
      routing.Route('/next', handlers.next),
      routing.Route('/vote', handlers.vote, methods=['POST']),
      routing.Route('/undo', handlers.undo, methods=['POST']),
      routing.Route('/picture/{name}', handlers.picture),
      routing.Route('/{name}', handlers.asset),
    ]
  )


def _knows(request: requests.Request, token: str) -> bool:
  given = (
    request.query_params.get('token', ''),
    request.cookies.get(COOKIE, ''),
  )
  return any(hmac.compare_digest(one.encode(), token.encode()) for one in given)


def _asset(name: str) -> bytes:
  folder = importlib.resources.files('dpo_jax.judging')
  return (folder / 'page' / name).read_bytes()


def _error(code: int, text: str) -> responses.Response:
  return _headers(responses.JSONResponse({'error': text}, status_code=code))


def _headers(response: responses.Response) -> responses.Response:
  response.headers.update(
    {
      'content-security-policy': CSP,
      'x-content-type-options': 'nosniff',
      'referrer-policy': 'no-referrer',
      'cross-origin-resource-policy': 'same-origin',
      'cache-control': 'no-store',
    }
  )
  return response
