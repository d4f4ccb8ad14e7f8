"""Trains the small CLIP tokenizer of the emoji model from its captions.

  python examples/emoji/build_tokenizer.py \
    --pairs=examples/emoji/pairs.parquet \
    --out=examples/emoji/architecture/tokenizer

The layout and the conventions are those of CLIP: byte-level BPE on lower-case
text, `</w>` at the end of a word, start and end of text as the last two ids,
padding with the end of text. Every byte is in the vocabulary, alone and at the
end of a word, so any text can be encoded.
"""

import argparse
import collections
import itertools
import json
import pathlib

import tokenizers
from pyarrow import parquet
from tokenizers import normalizers, pre_tokenizers

MAX_LENGTH = 16
START, END = '<|startoftext|>', '<|endoftext|>'
# CLIP's rule for words: contractions, runs of letters, single digits, the rest.
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def count_words(captions: list[str]) -> dict[tuple[str, ...], int]:
  """Returns how often each word occurs; a word is its bytes, the last </w>."""
  split = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(
        tokenizers.Regex(WORDS), behavior='removed', invert=True
      ),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  clean = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
  counts = collections.Counter()
  for caption in captions:
    for word, _ in split.pre_tokenize_str(clean.normalize_str(caption)):
      counts[(*word[:-1], word[-1] + '</w>')] += 1
  return counts


def train_merges(captions: list[str], count: int) -> list[tuple[str, str]]:
  """Returns at most `count` BPE merges, the most frequent first.

  Of equal counts the longer result comes first, so that words are finished
  before new ones are begun, then the alphabet decides. (The trainer of the
  tokenizers library breaks such ties differently in every run.) A pair seen
  once is not merged.
  """
  words = count_words(captions)
  merges = []
  while len(merges) < count:
    pairs = collections.Counter()
    for word, n in words.items():
      for pair in itertools.pairwise(word):
        pairs[pair] += n
    order = {pair: (-n, -len(''.join(pair)), pair) for pair, n in pairs.items()}
    best = min(order, key=order.get, default=None)
    if best is None or pairs[best] < 2:
      break
    merges.append(best)
    merged = collections.Counter()
    for word, n in words.items():
      merged[merge(word, best)] += n
    words = merged
  return merges


def merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
  """Returns the word with every occurrence of the pair joined."""
  symbols = []
  for symbol in word:
    if symbols and (symbols[-1], symbol) == pair:
      symbols[-1] += symbol
    else:
      symbols.append(symbol)
  return tuple(symbols)


def make_vocab(merges: list[tuple[str, str]]) -> dict[str, int]:
  """Returns token -> id: bytes, bytes ending a word, merges, start, end."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokens = [*alphabet, *(byte + '</w>' for byte in alphabet)]
  # Two merges may spell the same token, which then keeps its first id.
  tokens += [left + right for left, right in merges]
  return {
    token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))
  }


def save(folder: pathlib.Path, merges: list[tuple[str, str]]) -> int:
  """Writes the files of a CLIP tokenizer; returns the number of entries."""
  vocab = make_vocab(merges)
  special = {
    'bos_token': START,
    'eos_token': END,
    'unk_token': END,
    'pad_token': END,
  }
  config = {
    'tokenizer_class': 'CLIPTokenizer',
    'add_prefix_space': False,
    'do_lower_case': True,
    'errors': 'replace',
    'model_max_length': MAX_LENGTH,
    **special,
  }
  folder.mkdir(parents=True, exist_ok=True)
  contents = {
    'vocab.json': vocab,
    'tokenizer_config.json': config,
    'special_tokens_map.json': special,
  }
  for name, content in contents.items():
    text = json.dumps(content, indent=None if name == 'vocab.json' else 2)
    (folder / name).write_text(text + '\n', 'utf-8')
  lines = ['#version: 0.2', *(' '.join(merge) for merge in merges)]
  (folder / 'merges.txt').write_text('\n'.join(lines) + '\n', 'utf-8')
  return len(vocab)


def main(argv: list[str] | None = None) -> None:
  """Trains and writes the tokenizer that the flags describe."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pairs', required=True, help='parquet with captions')
  parser.add_argument('--out', required=True, help='folder to write')
  parser.add_argument('--entries', type=int, default=1024)
  flags = parser.parse_args(argv)
  table = parquet.read_table(flags.pairs, columns=['caption'])
  captions = sorted(set(table['caption'].to_pylist()))
  merges = train_merges(captions, flags.entries - 2 * 256 - 2)
  size = save(pathlib.Path(flags.out), merges)
  print(f'{flags.out}: {size} entries, {len(merges)} merges')


if __name__ == '__main__':
  main()
