"""CLIP's tokenizer, read from a diffusers `tokenizer` folder."""

import dataclasses
import pathlib
import threading
from collections.abc import Sequence

import numpy as np
import transformers
from jaxtyping import Int32

# transformers writes a huge number where a tokenizer has no limit.
_NO_LIMIT = 1 << 20


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
    # The backend's settings are changed inside a call, which other threads
    # must not see.
    with self._lock:
      rows = self.backend(texts, verbose=False)['input_ids']
    truncated = 0
    for i, row in enumerate(rows):
      if len(row) > self.max_length:
        row = [*row[: self.max_length - 1], self.backend.eos_token_id]
        truncated += 1
      ids[i, : len(row)] = row
    return ids, truncated


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
