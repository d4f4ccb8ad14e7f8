"""The hub's own client, against a server of the test's and its cache alone."""

import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest

pytest.importorskip('huggingface_hub')

COMMIT, LATER = '1' * 40, '2' * 40
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
  'unet/diffusion_pytorch_model.fp16.safetensors': 'half',
  'safety_checker/model.safetensors': 'not listed',
}
# Names on stdin to what resolve says of each, both as JSON. The client reads
# its environment when it is imported, so it has a process of its own.
SCRIPT = """
import json, sys
from dpo_jax.weights import sources
answers = []
for options in json.load(sys.stdin):
  try:
    found = sources.resolve(**options)
    answers.append({'path': str(found.path), 'revision': found.revision})
  except ValueError as error:
    answers.append({'error': str(error)})
print(json.dumps(answers))
"""


@pytest.fixture
def resolve(tmp_path):
  def resolve(*requests, **environment):
    env = os.environ | {
      'HF_HOME': str(tmp_path / 'home'),
      'HF_HUB_CACHE': str(tmp_path / 'hub'),
      'HF_HUB_DISABLE_TELEMETRY': '1',
      'HF_HUB_DISABLE_PROGRESS_BARS': '1',
      'PYTHONPATH': os.getcwd(),
      'NO_PROXY': '127.0.0.1',
    }
    done = subprocess.run(
      [sys.executable, '-c', SCRIPT],
      input=json.dumps(requests),
      env=env | environment,
      cwd=tmp_path,
      capture_output=True,
      text=True,
      timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert all('\n' not in answer.get('error', '') for answer in answers)
    return answers

  return resolve


def _content(folder):
  folder = pathlib.Path(folder)
  return {
    path.relative_to(folder).as_posix(): path.read_text()
    for path in folder.rglob('*')
    if path.is_file()
  }


def _fill_cache(tmp_path, name, files):
  """The layout that huggingface_hub documents: refs, snapshots, blobs."""
  folder = tmp_path / 'hub' / f'models--{name.replace("/", "--")}'
  snapshot = folder / 'snapshots' / COMMIT
  (folder / 'refs').mkdir(parents=True)
  (folder / 'blobs').mkdir()
  (folder / 'refs' / 'main').write_text(COMMIT)
  for file, text in files.items():
    blob = folder / 'blobs' / hashlib.sha256(text.encode()).hexdigest()
    blob.write_text(text)
    link = snapshot / file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
  return snapshot


def test_offline_from_the_cache(resolve, tmp_path):
  whole = _fill_cache(tmp_path, 'org/whole', FILES)
  bare = {k: v for k, v in FILES.items() if k != 'tokenizer/vocab.json'}
  _fill_cache(tmp_path, 'org/bare', bare)
  weightless = {k: v for k, v in FILES.items() if 'model.safe' not in k}
  _fill_cache(tmp_path, 'org/weightless', weightless)
  requests = [
    {'name': 'org/whole'},
    {'name': 'org/whole', 'revision': COMMIT},
    {'name': 'org/whole', 'revision': LATER},
    {'name': 'org/whole', 'variant': 'fp16'},
    {'name': 'org/bare'},
    {'name': 'org/weightless'},
    {'name': 'models/sd15'},
  ]
  answers = resolve(*requests, HF_HUB_OFFLINE='1')
  found = {'path': str(whole), 'revision': COMMIT}
  assert answers[:2] == [found, found]
  hints = [
    '',
    r"a part of it in the cache \(unet: no weights of variant='fp16'",
    r'a part of it in the cache \(tokenizer missing\)',
    r'a part of it in the cache \(unet: no weights among config.json\)',
    r"^'models/sd15': no folder here \(/.*/models/sd15\), and the hub gave",
  ]
  for request, answer, hint in zip(
    requests[2:], answers[2:], hints, strict=True
  ):
    name = request['name']
    assert re.search(hint, answer['error']), answer
    assert f'hf download {name} --local-dir FOLDER' in answer['error']
    assert 'download model_index.json and, of each' in answer['error']
    assert 'then give that folder' in answer['error']


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the hub as its client asks for."""

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    self.server.asked.append(f'{self.command} {self.path}')
    path = self.path.partition('?')[0]
    head, _, file = path.partition('/resolve/')
    if '/gated/' in path:
      self.answer(403, b'', {'X-Error-Code': 'GatedRepo'})
    elif not head.endswith('/org/name'):
      found = re.match(r'/api/models/org/name/(revision|tree)/([^/]+)', path)
      if not found:
        self.answer(401, b'', {'X-Error-Code': 'RepoNotFound'})
      elif found[2] not in ('main', 'v1', COMMIT):
        self.answer(404, b'', {'X-Error-Code': 'RevisionNotFound'})
      else:
        self.answer(200, json.dumps(self.describe(found[1])).encode(), {})
    else:
      text = self.server.files[file.partition('/')[2]].encode()
      etag = hashlib.sha256(text).hexdigest()
      self.answer(200, text, {'ETag': f'"{etag}"', 'X-Repo-Commit': COMMIT})

  def describe(self, kind):
    files = self.server.files
    if kind == 'revision':
      names = [{'rfilename': name} for name in files]
      return {'id': 'org/name', 'sha': COMMIT, 'siblings': names}
    return [
      {'type': 'file', 'path': name, 'size': len(text), 'oid': f'{i:040x}'}
      for i, (name, text) in enumerate(files.items())
    ]

  def answer(self, status, body, headers):
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(body)


@pytest.fixture
def server():
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
    server.files, server.asked = {**FILES, **OTHERS}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_online_and_then_offline(resolve, server, tmp_path):
  endpoint = f'http://127.0.0.1:{server.server_port}'
  requests = [
    {'name': 'org/name'},
    {'name': 'org/name', 'revision': 'v1'},
    {'name': 'org/name', 'revision': 'v2'},
    {'name': 'org/name', 'variant': 'bf16'},
    {'name': 'org/none'},
    {'name': 'gated/name'},
  ]
  answers = resolve(*requests, HF_ENDPOINT=endpoint)
  assert answers[0] == answers[1]
  assert answers[0]['revision'] == COMMIT
  assert _content(answers[0]['path']) == FILES
  fetched = [line for line in server.asked if '/resolve/' in line]
  for name in OTHERS:
    assert not [line for line in fetched if line.endswith(name)]
  for answer, hint in zip(
    answers[2:],
    [
      r"^'org/name': the hub has no revision 'v2' of it; allowed: a branch",
      r"^'org/name' on the hub: unet: no weights of variant='bf16'; allowed",
      r"'org/none': no folder here .*, and no model of that name on the hub",
      r"'gated/name': gated on the hub; accept its licence there and log in",
    ],
    strict=True,
  ):
    assert re.search(hint, answer['error']), answer

  # What was fetched is pinned, and there without a network.
  offline = resolve(*requests[:2], HF_HUB_OFFLINE='1')
  assert offline == answers[:2]
  (half,) = resolve(
    {'name': 'org/name', 'variant': 'fp16'}, HF_ENDPOINT=endpoint
  )
  assert _content(half['path']).keys() - FILES.keys() == {
    'unet/diffusion_pytorch_model.fp16.safetensors'
  }


def test_a_repository_that_is_no_pipeline(resolve, server):
  del server.files['model_index.json']
  (answer,) = resolve(
    {'name': 'org/name'},
    HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}',
  )
  assert answer['error'].startswith(
    "'org/name': no model_index.json on the hub"
  )


def test_no_network(resolve):
  (answer,) = resolve({'name': 'org/name'}, HF_ENDPOINT='http://127.0.0.1:9')
  assert re.search(r'the hub gave nothing \(\w+: .*refused', answer['error'])
