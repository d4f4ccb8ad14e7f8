"""What is voted on: pairs of pictures of a prompt, or single pictures."""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterator, Sequence

from dpo_jax.evaluate import comparison

PAIRS, LIKES = 'pairs', 'likes'
# The only one of single pictures.
LIKES_QUESTION = 'likes'
CHOICES = {PAIRS: ('a', 'b', 'tie'), LIKES: ('benign', 'malign', 'unsure')}
SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp')
# What tools.generate lays beside its pictures, a file or one a page.
CONTACT_SHEET = re.compile(r'contact_sheet(-\d+)?\.png')
# Wallace et al. 2024, section 5.1: what people are asked of a pair.
QUESTIONS = {
  'q1': 'Which image do you prefer, given the prompt?',
  'q2': 'Which image is more visually appealing? (Never mind the prompt.)',
  'q3': 'Which image better fits the text description?',
}
# The prompt is not shown with these.
WITHOUT_PROMPT = ('q2',)


@dataclasses.dataclass(frozen=True)
class Item:
  """One thing to vote on.

  Attributes:
    key: names it in the votes.
    pictures: files: a and b of a pair, or one.
    prompt: '' where there is none.
  """

  key: str
  pictures: tuple[pathlib.Path, ...]
  prompt: str = ''


def open_pairs(a: str, b: str) -> list[Item]:
  """The pictures of two folders of tools.generate.

  Raises ValueError where they were not made alike, see evaluate.comparison.
  """
  return [
    Item(pair.a.name, (pair.a, pair.b), pair.prompt)
    for pair in comparison.open_pairs(a, b)
  ]


def open_pictures(folder: str) -> list[Item]:
  """The pictures of a folder, by name; those below it too.

  Raises ValueError where there are none.
  """
  root = pathlib.Path(folder)
  found = sorted(
    path
    for path in root.rglob('*')
    if path.suffix.lower() in SUFFIXES
    and path.is_file()
    and not CONTACT_SHEET.fullmatch(path.name)
  )
  if not found:
    raise ValueError(
      f'{folder}: no pictures there; allowed are {", ".join(SUFFIXES)}'
    )
  prompts = _read_prompts(root)
  return [
    Item(path.relative_to(root).as_posix(), (path,), prompts.get(path.name, ''))
    for path in found
  ]


def _read_prompts(root: pathlib.Path) -> dict[str, str]:
  if not comparison.is_pictures(str(root)):
    return {}
  return comparison.read_prompts(str(root))


def digest(items: Sequence[Item]) -> str:
  """Of the items' names, prompts and pictures: other items, other votes."""
  found = hashlib.sha256()
  for item in items:
    found.update(f'{item.key}\n{item.prompt}\n'.encode('utf-8', 'replace'))
    for path in item.pictures:
      found.update(hashlib.sha256(path.read_bytes()).digest())
  return found.hexdigest()


def draw(*words: str) -> int:
  """A number of 64 bits that hangs on the words alone."""
  text = '\0'.join(words).encode('utf-8', 'replace')
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'big')


def order(items: Sequence[Item], judge: str, seed: str) -> Iterator[Item]:
  """The items as this judge gets them, shuffled."""
  return iter(sorted(items, key=lambda i: draw('order', seed, judge, i.key)))


def is_swapped(item: Item, question: str, judge: str, seed: str) -> bool:
  """Whether b stands on the left for this judge."""
  return draw('side', seed, judge, question, item.key) % 2 == 1
