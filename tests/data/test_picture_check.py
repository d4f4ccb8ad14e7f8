"""Pictures of a source: what is unreadable, why, and what reading takes."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pickapic_file
import pytest

from dpo_jax.data import picture_check


@pytest.mark.parametrize(
  ('given', 'reason'),
  [
    (None, 'no bytes'),
    (b'', 'no bytes'),
    (b'text', 'not a picture'),
    (pickapic_file.bomb(), 'too many pixels'),
    (pathlib.Path('/nowhere/x'), 'no such file'),
    (pathlib.Path('/dev/null'), 'no plain file'),
    (pathlib.Path('/'), 'no plain file'),
  ],
)
def test_unreadable_pictures_have_reasons(given, reason):
  with pytest.raises(picture_check.UnreadableError, match=f'^{reason}$'):
    picture_check.PictureCheck(None)(given)


def test_limits_of_a_picture(tmp_path, monkeypatch):
  check = picture_check.PictureCheck(None)
  strips = [
    pickapic_file.encode(pickapic_file.picture(0, 2, width), 'PNG')
    for width in (32, 33)
  ]
  assert (check(strips[0]).height, check(strips[0]).width) == (2, 32)
  with pytest.raises(picture_check.UnreadableError, match=r'^too narrow$'):
    check(strips[1])
  path = tmp_path / 'a.png'
  path.write_bytes(strips[0])
  monkeypatch.setattr(picture_check, 'MAX_BYTES', len(strips[0]))
  assert check(path).data == strips[0]
  monkeypatch.setattr(picture_check, 'MAX_BYTES', len(strips[0]) - 1)
  for given in (path, strips[0]):
    with pytest.raises(picture_check.UnreadableError, match=r'^more than'):
      check(given)


def test_a_pipe_does_not_hold_the_build(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(picture_check.UnreadableError, match='no plain file'):
    picture_check.PictureCheck(None)(tmp_path / 'pipe')


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_reasons_do_not_repeat_what_the_bytes_say():
  """Of spoilt pictures there are few reasons, the same in every run."""
  rng = np.random.default_rng(3)
  reasons = set()
  check = picture_check.PictureCheck(None)
  for kind in ('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF'):
    right = pickapic_file.encode(pickapic_file.picture(1), kind)
    for _ in range(60):
      data = bytearray(right)
      for _ in range(4):
        data[rng.integers(len(data))] = rng.integers(256)
      try:
        check(bytes(data[: rng.integers(1, len(data) + 1)]))
      except picture_check.UnreadableError as error:
        reasons.add(str(error))
  assert reasons <= {
    'not a picture',
    'truncated',
    'damaged',
    'too many pixels',
    'too narrow',
    'pixels without a known range',
  }
  assert {'not a picture', 'truncated', 'damaged'} <= reasons


MEMORY = """
import io, resource, sys, threading
import numpy as np
from PIL import Image
from dpo_jax.data import picture_check
kind = sys.argv[1]
side = 4096
if kind == 'I;16':
  image = Image.fromarray(np.zeros((side, side), np.uint16))
else:
  image = Image.new(kind, (side, side))
buffer = io.BytesIO()
image.save(buffer, 'PNG' if kind != 'CMYK' else 'JPEG')
del image
check = picture_check.PictureCheck(None)
check(buffer.getvalue()[:0] or open(sys.argv[2], 'rb').read())
with open('/proc/self/clear_refs', 'w') as file:
  file.write('5')
before = int(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])
threads = [
  threading.Thread(target=check, args=[buffer.getvalue()]) for _ in range(3)
]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
print((peak - before) // 1024)
"""


@pytest.mark.parametrize('kind', ['RGBA', 'I;16', 'CMYK'])
def test_the_largest_pictures_take_500_mb_at_most(tmp_path, kind):
  (tmp_path / 'small').write_bytes(
    pickapic_file.encode(pickapic_file.picture(0))
  )
  done = subprocess.run(
    [sys.executable, '-c', MEMORY, kind, tmp_path / 'small'],
    check=True,
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': os.getcwd()},
  )
  assert int(done.stdout) < 500
