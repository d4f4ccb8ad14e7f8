"""CLIP's tokenizer of a diffusers `tokenizer` folder, and BERT's of BLIP."""

import dataclasses
import pathlib
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import transformers
from jaxtyping import Int32

# transformers writes a huge number where a tokenizer has no limit.
_NO_LIMIT = 1 << 20


class Encoder(Protocol):
  """Whatever turns captions into token ids."""

  def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, int]:
    """Returns int32 [n, ...] token ids and how many captions were cut."""
    ...


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Encodes captions to fixed-length token ids; safe to share by threads."""

  backend: transformers.PreTrainedTokenizerBase
  max_length: int
  _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  @property
  def vocab_size(self) -> int:
    return len(self.backend)

  def encode(
    self, captions: Sequence[str]
  ) -> tuple[Int32[np.ndarray, 'n s'], int]:
    """Returns int32 [n, max_length] token ids and how many were truncated.

    Rows are start, caption, end, padding; a long caption keeps its first
    max_length - 2 tokens. Text that spells a control token is encoded as
    text, and lone surrogates, which UTF-8 cannot hold, become '?'.
    """
    ids = np.full(
      (len(captions), self.max_length), self.backend.pad_token_id, np.int32
    )
    if not captions:
      return ids, 0
    texts = [
      caption.encode('utf-8', 'replace').decode() for caption in captions
    ]
    rows = self._encode(texts)
    truncated = 0
    for i, row in enumerate(rows):
      if len(row) > self.max_length:
        row = [*row[: self.max_length - 1], self.backend.eos_token_id]
        truncated += 1
      ids[i, : len(row)] = row
    return ids, truncated

  def _encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text with start and end, as long as they are."""
    mark = self.backend.pad_token
    if mark in (self.backend.bos_token, self.backend.eos_token):
      parts = [[text] for text in texts]
    else:
      # SD 2.x and SDXL pad with '!'. A text that holds one has always been
      # cut there by transformers and given the padding's id, in training too.
      # More marks than the tokens that are kept need not be told apart.
      parts = [text.split(mark, self.max_length) for text in texts]
    # The backend's settings are changed inside a call, which other threads
    # must not see.
    with self._lock:
      found = iter(
        self.backend(
          [part for row in parts for part in row],
          add_special_tokens=False,
          verbose=False,
        )['input_ids']
      )
    rows = []
    for row in parts:
      ids = [self.backend.bos_token_id, *next(found)]
      for _ in row[1:]:
        ids += [self.backend.pad_token_id, *next(found)]
      rows.append([*ids, self.backend.eos_token_id])
    return rows


@dataclasses.dataclass(frozen=True)
class Tokenizers:
  """The tokenizers of a pipeline, one for each text encoder, in order."""

  members: tuple[Tokenizer, ...]

  def encode(
    self, captions: Sequence[str]
  ) -> tuple[Int32[np.ndarray, 'n k s'], int]:
    """Returns int32 [n, k, s] token ids and how many captions were cut.

    SDXL's two tokenizers give the same tokens and other padding. Of none k is
    0: captions are not read.
    """
    if not self.members:
      return np.zeros((len(captions), 0, 1), np.int32), 0
    encoded = [member.encode(captions) for member in self.members]
    ids = np.stack([rows for rows, _ in encoded], axis=1)
    return ids, max(cut for _, cut in encoded)


def load_all(folders: Sequence[str | pathlib.Path]) -> Tokenizers:
  """Returns the tokenizers of these folders.

  Raises ValueError for a folder that is no CLIP tokenizer, and when their
  lengths differ.
  """
  members = tuple(load(folder) for folder in folders)
  lengths = {member.max_length for member in members}
  if len(lengths) > 1:
    raise ValueError(
      f'{", ".join(map(str, folders))}: tokenizers of different '
      f'model_max_length {sorted(lengths)}; they must be equal'
    )
  return Tokenizers(members)


def load(
  folder: str | pathlib.Path, *, max_length: int | None = None
) -> Tokenizer:
  """Returns the tokenizer of a folder with vocab.json and merges.txt.

  `max_length` in tokens, start and end included; by default the folder's
  model_max_length. Raises ValueError when the folder is no CLIP tokenizer.
  """
  folder = pathlib.Path(folder)
  missing = [
    name
    for name in ('vocab.json', 'merges.txt')
    if not (folder / name).is_file()
  ]
  if missing:
    raise ValueError(
      f'{folder}: no CLIP tokenizer there, {" and ".join(missing)} missing; '
      "name a diffusers pipeline's tokenizer folder"
    )
  try:
    backend = transformers.CLIPTokenizer.from_pretrained(
      folder, split_special_tokens=True, local_files_only=True
    )
  # The readers of the files raise what they like, down to a bare Exception.
  except Exception as error:
    reason = ' '.join(str(error).split())
    raise ValueError(f'{folder}: not a CLIP tokenizer: {reason}') from error
  length = max_length or backend.model_max_length
  if not 3 <= length < _NO_LIMIT:
    raise ValueError(
      f'{folder}: tokenizer length {length}; model_max_length in '
      'tokenizer_config.json must be at least 3 (77 for Stable Diffusion)'
    )
  return Tokenizer(backend, int(length))


class BertTokenizer(Tokenizer):
  """Encodes captions as ImageReward does; safe to share by threads."""

  def encode(
    self, captions: Sequence[str]
  ) -> tuple[Int32[np.ndarray, 'n s'], int]:
    """Returns int32 [n, max_length] token ids and how many were truncated.

    Rows are [CLS], caption, [SEP], [PAD]; a long caption keeps its first
    max_length - 2 tokens. Unlike CLIP's, text that spells a control token is
    that token, as in the original, and lone surrogates become '?'.
    """
    backend, length = self.backend, self.max_length
    ids = np.full((len(captions), length), backend.pad_token_id, np.int32)
    if not captions:
      return ids, 0
    texts = [
      caption.encode('utf-8', 'replace').decode() for caption in captions
    ]
    with self._lock:
      found = backend(texts, add_special_tokens=False, verbose=False)
    truncated = 0
    for i, row in enumerate(found['input_ids']):
      truncated += len(row) > length - 2
      row = [
        backend.cls_token_id,
        *row[: length - 2],
        backend.sep_token_id,
      ]
      ids[i, : len(row)] = row
    return ids, truncated


def load_bert(
  folder: str | pathlib.Path, *, max_length: int = 35
) -> BertTokenizer:
  """BLIP's tokenizer, from the vocab.txt of bert-base-uncased in a folder.

  It has two more tokens behind the vocabulary's: [DEC] and [ENC]. Raises
  ValueError when there is no vocab.txt or it is none of BERT's.
  """
  path = pathlib.Path(folder) / 'vocab.txt'
  if not path.is_file():
    raise ValueError(f'{path}: no such file; it is that of bert-base-uncased')
  words = set(path.read_text(encoding='utf-8').split('\n'))
  missing = [
    word for word in '[PAD] [UNK] [CLS] [SEP]'.split() if word not in words
  ]
  if missing:
    raise ValueError(f'{path}: not a vocabulary of BERT, no {missing[0]} in it')
  try:
    backend = transformers.BertTokenizer.from_pretrained(
      path.parent, do_lower_case=True, local_files_only=True
    )
  # The readers of the files raise what they like.
  except Exception as error:
    reason = ' '.join(str(error).split())
    raise ValueError(f'{path}: not a vocabulary of BERT: {reason}') from error
  backend.add_special_tokens({'bos_token': '[DEC]'})
  backend.add_special_tokens({'additional_special_tokens': ['[ENC]']})
  return BertTokenizer(backend, max_length)
