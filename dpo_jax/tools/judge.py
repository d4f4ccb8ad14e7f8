"""A page on this machine where people vote.

  python -m dpo_jax.tools.judge --a=OUT/a --b=OUT/b --votes=votes.jsonl
  python -m dpo_jax.tools.judge --likes=pictures --votes=labels.jsonl
  python -m dpo_jax.tools.judge ... --votes=votes.jsonl --export=DIR

Pairs: two folders of dpo_jax.tools.generate; sides are drawn anew for each
judge, and nothing tells which model a picture is of. Left and right arrow,
space for a tie, U to undo. --questions=three asks the paper's: preference,
visual appeal without the prompt, alignment with it. Likes: a grid; click what
is bad, twice for unsure; Enter for the next page.

Votes are on the disk before the page goes on. Stop with Ctrl-C and go on with
the same command. Several people may vote at once under their own names.
--export writes training data for `tools.prepare --format=jsonl`, and votes.json
with win rates, intervals and the judges' agreement. Of likes, --cross=prompt
adds pairs of each benign picture with each malign one of its prompt, and
--cross=all with every malign one, for models that read no prompt.

The page is served to this machine only. --host=ADDRESS serves it to others, who
then need the token that is printed.
"""

import contextlib
import ipaddress
import secrets
import socket
import sys
from collections.abc import Sequence

import uvicorn

from dpo_jax.judging import app as app_lib
from dpo_jax.judging import export
from dpo_jax.judging import items as items_lib
from dpo_jax.judging import votes as votes_lib
from dpo_jax.tools import arguments

LOOPBACK = '127.0.0.1'


def _parse(argv: Sequence[str]):
  parser = arguments.Parser('dpo_jax.tools.judge', __doc__)
  add, whole = parser.add_argument, arguments.number(int, low=1)
  add('--a', help="a folder of tools.generate's pictures")
  add('--b', help='another, of the same prompts and seeds')
  add('--likes', help='a folder of single pictures')
  add('--votes', required=True, help='the JSON Lines file of votes')
  add('--questions', default='one', choices=('one', 'three'))
  add('--votes_per_item', type=whole, help='then it is not shown any more')
  add('--grid', type=whole, default=app_lib.GRID, help='pictures on a page')
  add('--host', default=LOOPBACK)
  add('--port', type=arguments.number(int, low=0, high=65535), default=8378)
  add('--token', help='for others than this machine; default: drawn')
  add('--name', help='the name of this machine that others use')
  add('--export', help='write training data there, and serve nothing')
  add('--question', default='q1', help='whose winner is exported')
  add('--min_votes', type=whole, default=1, help='of an item to count')
  add('--cross', default='none', choices=export.CROSSINGS, help='of likes')
  add('--per_class', type=whole, help='of likes, of either class at most')
  return parser.parse(argv)


def _items(values) -> tuple[str, list[items_lib.Item], tuple[str, ...]]:
  """(mode, items, questions)."""
  if values.likes and (values.a or values.b):
    raise ValueError('--likes and --a, --b: give single pictures or pairs')
  if values.likes:
    if values.questions != 'one':
      raise ValueError('--questions=three: is for pairs')
    pictures = items_lib.open_pictures(values.likes)
    return items_lib.LIKES, pictures, (items_lib.LIKES_QUESTION,)
  if not values.a or not values.b:
    raise ValueError('give --a and --b (pairs), or --likes (single pictures)')
  count = {'one': 1, 'three': len(items_lib.QUESTIONS)}[values.questions]
  questions = tuple(items_lib.QUESTIONS)[:count]
  return items_lib.PAIRS, items_lib.open_pairs(values.a, values.b), questions


def main(argv: Sequence[str]) -> None:
  """Serves or exports; ValueError says what is wrong with the input."""
  values = _parse(argv)
  mode, items, questions = _items(values)
  votes = votes_lib.open_for(values.votes, items, mode=mode)
  try:
    if values.export:
      _export(values, mode, items, questions, votes)
    else:
      _serve(values, mode, items, questions, votes)
  finally:
    votes.close()


def _export(values, mode, items, questions, votes) -> None:
  if values.cross != 'none' and mode != items_lib.LIKES:
    raise ValueError(f'--cross={values.cross}: is for --likes')
  if values.per_class and mode != items_lib.LIKES:
    raise ValueError(f'--per_class={values.per_class}: is for --likes')
  question = (
    items_lib.LIKES_QUESTION if mode == items_lib.LIKES else values.question
  )
  known = {*questions, *(vote.question for vote in votes.votes())}
  if question not in known:
    raise ValueError(
      f'--question={question}: the votes are on {", ".join(sorted(known))}'
    )
  counts = export.write(
    values.export,
    items,
    votes.votes(),
    mode=mode,
    question=question,
    questions=sorted(known),
    min_votes=values.min_votes,
    cross=values.cross,
    per_class=values.per_class or 0,
  )
  print(export.describe(_summary(values, mode, known, votes)))
  left = ', '.join(f'{name} {n}' for name, n in counts.items() if n)
  print(f'{values.export}: {left}')
  if counts.get('guided'):
    print(
      f'a reward guided {counts["guided"]} of these pictures: let them teach a '
      'reward, not a generator (dpo, kto), which was seen to collapse'
    )
  if counts.get('guided_winner'):
    print(
      f'{counts["guided_winner"]} pairs are left out, as a reward guided the '
      'winner: models trained on such winners were seen to collapse'
    )


def _summary(values, mode, questions, votes):
  return export.summarise(
    votes.votes(),
    mode=mode,
    questions=sorted(questions),
    min_votes=values.min_votes,
  )


def _is_loopback(host: str) -> bool:
  if host == 'localhost':
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def _serve(values, mode, items, questions, votes) -> None:
  token = values.token or ''
  if not _is_loopback(values.host) and not token:
    token = secrets.token_urlsafe(16)
  session = app_lib.Session(
    items,
    votes,
    mode=mode,
    questions=questions,
    votes_per_item=values.votes_per_item or 0,
    grid=values.grid,
    seed=items_lib.digest(items),
  )
  listener = _listen(values.host, values.port)
  port = listener.getsockname()[1]
  names = {values.host, values.name or values.host}
  if _is_loopback(values.host):
    names |= {LOOPBACK, 'localhost', '[::1]'}
  elif not values.name:
    names |= {socket.gethostname(), socket.getfqdn()}
  app = app_lib.make_app(
    session, hosts=[f'{name}:{port}' for name in sorted(names)], token=token
  )
  shown = f'?token={token}' if token else ''
  print(
    f'{len(items)} {mode}, votes in {values.votes}\n'
    f'open http://{values.name or values.host}:{port}/{shown}   (Ctrl-C stops)',
    flush=True,
  )
  config = uvicorn.Config(app, log_level='warning', access_log=False)
  with contextlib.suppress(KeyboardInterrupt):
    uvicorn.Server(config).run(sockets=[listener])
  summary = _summary(values, mode, questions, votes)
  print(export.describe(summary))


def _listen(host: str, port: int) -> socket.socket:
  try:
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    # From here on a browser may come; it waits until it is answered.
    listener.listen(128)
  except OSError as error:
    raise ValueError(
      f'--host={host} --port={port}: cannot be listened on ({error.strerror}); '
      'choose another port, or 0 for any'
    ) from error
  return listener


if __name__ == '__main__':
  sys.exit(arguments.run(main, sys.argv[1:]))
