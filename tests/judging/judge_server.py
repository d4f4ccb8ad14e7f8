"""The page's server in a process of its own, and pictures for it."""

import http.client
import json
import os
import pathlib
import re
import secrets
import subprocess
import sys

import numpy as np

from dpo_jax.evaluate import manifest

ROOT = pathlib.Path(__file__).parents[2]
HOSTILE = '<img src=x onerror="document.title=1"> {{7*7}} \u202eabc'


def write_pictures(folder, draw, *, count=6, side=16, reward=None):
  """A folder as tools.generate leaves it."""
  settings = {'settings': {}, 'seed': 0}
  if reward is not None:
    settings['reward'] = reward
  pictures = manifest.Pictures(folder, settings)
  rng = np.random.default_rng(draw)
  entries = [
    {
      'file': f'{i:06d}_0.png',
      'id': f'{i:06d}',
      'image': 0,
      'prompt': HOSTILE if i == 0 else f'prompt {i}',
      'negative_prompt': '',
      'seed': i,
    }
    for i in range(count)
  ]
  pictures.add(entries, rng.integers(0, 256, (count, side, side, 3), np.uint8))
  pictures.close([one['file'] for one in entries])
  return folder


class Server:
  """`python -m dpo_jax.tools.judge` on a free port."""

  def __init__(self, *words, port=0):
    self._words, self.port = words, port
    self.start()

  def start(self):
    """Starts it, again on the same port after a kill."""
    self.process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'dpo_jax.tools.judge',
        f'--port={self.port}',
        *self._words,
      ],
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    while True:
      line = self.process.stdout.readline()
      assert line, 'the server ended'
      match = re.search(r'http://([^:/]+):(\d+)/(\?token=\S+)?', line)
      if match:
        break
    self.host, self.port = match[1], int(match[2])
    self.query = match[3] or ''
    self.url = f'http://{self.host}:{self.port}/{self.query}'

  def kill(self):
    """kill -9."""
    self.process.kill()
    self.process.wait()

  def stop(self):
    """Ctrl-C; returns what it printed since."""
    self.process.send_signal(2)
    return self.process.communicate(timeout=30)[0]

  def ask(self, method, path, body=None, headers=None):
    """(status, headers, JSON or bytes)."""
    connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
    sent = {'Host': f'{self.host}:{self.port}'}
    if body is not None:
      sent['Content-Type'] = 'application/json'
      body = json.dumps(body)
    connection.request(method, path, body, sent | (headers or {}))
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    if answer.headers.get_content_type() == 'application/json':
      data = json.loads(data)
    return answer.status, answer.headers, data

  def next(self, judge):
    """What the page would show."""
    return self.ask('GET', f'/next?judge={judge}')[2]

  def vote(self, judge, shown, choice, number=None):
    """(status, answer) of a vote on what is shown."""
    body = {
      'id': number or secrets.token_hex(8),
      'judge': judge,
      'votes': [
        {'item': one['item'], 'question': one['question'], 'choice': choice}
        for one in shown
      ],
    }
    status, _, answer = self.ask('POST', '/vote', body)
    return status, answer


def read_votes(path):
  """The lines of a file of votes but the first."""
  return [json.loads(line) for line in path.read_text().splitlines()[1:]]
