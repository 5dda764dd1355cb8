"""Tokenize query-passage pairs with the model's own tokenizer, and truncate them as in the original.

Most words of a text have been seen before. So texts are tokenized word by word, from a cache, if that gives the same
tokens as the model's tokenizer.
"""
import string
import sys
from collections.abc import Callable, Iterable
from itertools import chain

import numpy as np

from simplified_tinybert.common.files import say
from simplified_tinybert.data.features import NO_LABEL, Examples, token_dtype
from simplified_tinybert.tokenization.vocabulary import Vocabulary

CACHE_BYTES = 2 ** 26       # for cached texts and for cached words, each
SAMPLE_TEXTS = 2000         # number of texts on which tokenization by words is compared with the library
SAMPLE_CHARACTERS = 250     # length of these texts


class TextCache(dict):
    """Maps text to compute(text), computed on first access; holds about `limit` bytes.

    Once half of the limit is used, the entries become the old generation and the previous one is dropped. An entry of
    the old generation that is accessed again moves to the new one.
    """

    def __init__(self, compute: Callable[[str], bytes], limit: int):
        super().__init__()
        self.compute, self.limit, self.old, self.bytes = compute, limit, {}, 0

    def __missing__(self, text: str) -> bytes:
        value = self.old.get(text)
        if value is None:
            value = self.compute(text)
        self.keep(text, value)
        return value

    def keep(self, text: str, value: bytes) -> None:
        self.bytes += sys.getsizeof(text) + sys.getsizeof(value) + 100               # 100: the entry of the dict
        if self.bytes > self.limit // 2:
            self.old, self.bytes = dict(self), 0
            self.clear()
        self[text] = value


class CachedTokenizer:
    """Tokenizes texts to token ids, as bytes of `dtype`, and caches the results.

    With `by_words`, texts are tokenized word by word (default: if `Vocabulary.splits_at_blanks`), otherwise as a whole.
    """

    def __init__(self, vocabulary: Vocabulary, max_seq_length: int, by_words: bool | None = None,
                 cache_bytes: int = CACHE_BYTES):
        self.vocabulary, self.max_seq_length = vocabulary, max_seq_length
        self.by_words = vocabulary.splits_at_blanks if by_words is None else by_words
        self.dtype = np.dtype(token_dtype(vocabulary))
        self.cls, self.sep = (np.array(vocabulary.token_ids[token], self.dtype).tobytes()
                              for token in ("[CLS]", "[SEP]"))
        self.library = vocabulary.tokenizer()
        self.prefixes = TextCache(self._prefix_by_words if self.by_words else self._tokenize_text, cache_bytes)
        self.words = TextCache(self._tokenize_word, cache_bytes)
        self.splits_punctuation = not vocabulary.state["added_tokens"]
        self.unknown_id = vocabulary.token_ids[vocabulary.state["model"]["unk_token"]]
        self.special_ids = [vocabulary.token_ids.get(token, self.unknown_id)
                            for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")]

    def tokenize_prefixes(self, texts: list[str]) -> list[bytes]:
        """Return at least the first `max_seq_length` tokens of each text. Truncation would drop the others."""
        if not self.by_words:
            new = [text for text in dict.fromkeys(texts) if text not in self.prefixes and text not in self.prefixes.old]
            for text, tokens in zip(new, self.tokenize_uncached(new)):
                self.prefixes.keep(text, tokens[:self.max_seq_length * self.dtype.itemsize])
        return [self.prefixes[text] for text in texts]

    def tokenize_all(self, texts: list[str]) -> list[bytes]:
        """Return all tokens of each text. Only words are cached."""
        if not self.by_words:
            return self.tokenize_uncached(texts)
        return [b"".join(map(self.words.__getitem__, text.split(" "))) for text in texts]

    def tokenize_uncached(self, texts: list[str]) -> list[bytes]:
        """Return all tokens of each text by the tokenizers library. Special tokens in a text become [UNK]."""
        encodings = self.library.encode_batch_fast(texts, add_special_tokens=False)
        arrays = (np.array(encoding.ids, self.dtype) for encoding in encodings)
        return [np.where(np.isin(ids, self.special_ids), self.unknown_id, ids).astype(self.dtype).tobytes()
                for ids in arrays]

    def _prefix_by_words(self, text: str) -> bytes:
        tokens, count = b"", self.max_seq_length
        while True:
            *words, rest = text.split(" ", count)
            tokens += b"".join(map(self.words.__getitem__, words))
            if len(tokens) >= self.max_seq_length * self.dtype.itemsize:
                return tokens
            if len(words) < count:
                return tokens + self.words[rest]
            text, count = rest, 2 * count

    def _tokenize_text(self, text: str) -> bytes:
        return self.tokenize_uncached([text])[0]

    def _tokenize_word(self, word: str) -> bytes:
        bare = word.rstrip(string.punctuation) if self.splits_punctuation else ""   # never part of a longer token
        if bare and bare != word:
            return self.words[bare] + self.words[word[len(bare):]]
        return np.array(self.library.encode(word, add_special_tokens=False).ids, self.dtype).tobytes()


def words_suffice(vocabulary: Vocabulary, texts: Iterable[str]) -> bool:
    """Check on the first `texts` whether tokenization by words gives the right tokens. If not, print a note."""
    tokenizer, sample = CachedTokenizer(vocabulary, SAMPLE_CHARACTERS, by_words=True), set()
    for text in texts if vocabulary.splits_at_blanks else ():
        sample.add(text[:SAMPLE_CHARACTERS])
        if len(sample) == SAMPLE_TEXTS:
            break
    sample = list(sample)
    same = vocabulary.splits_at_blanks and tokenizer.tokenize_all(sample) == tokenizer.tokenize_uncached(sample)
    if not same:
        say("note         this model's tokenizer needs whole texts instead of single words; tokenization takes longer")
    return same


def tokenize(lines: list[str], tokenizer: CachedTokenizer) -> Examples:
    """Return the examples of checked lines: id, query, passage and possibly label, separated by tabs."""
    rows, size = [line.split("\t") for line in lines], tokenizer.dtype.itemsize
    queries, passages = (tokenizer.tokenize_prefixes([row[column] for row in rows]) for column in (1, 2))
    query_lengths, passage_lengths = truncated_lengths(
        *(np.array([len(tokens) // size for tokens in side]) for side in (queries, passages)), tokenizer.max_seq_length)
    cls, sep = tokenizer.cls, tokenizer.sep
    tokens = b"".join(chain.from_iterable(
        (cls, query[:query_end], sep, passage[:passage_end], sep) for query, query_end, passage, passage_end
        in zip(queries, (query_lengths * size).tolist(), passages, (passage_lengths * size).tolist())))
    labels = np.array([int(row[3]) if len(row) == 4 else NO_LABEL for row in rows], dtype=np.int8)
    return Examples(np.frombuffer(tokens, tokenizer.dtype), (query_lengths + passage_lengths + 3).astype(np.uint16),
                    (query_lengths + 2).astype(np.uint16), labels, [row[0] for row in rows])


def truncated_lengths(query_lengths: np.ndarray, passage_lengths: np.ndarray,
                      max_seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of tokens kept of each query and passage.

    The original removes one token at a time from the longer text, or from the passage if both are equally long. So the
    query keeps the room that the passage leaves, but at least the larger half of the whole room.
    """
    room = max_seq_length - 3                                                        # [CLS] query [SEP] passage [SEP]
    queries = np.minimum(query_lengths, np.maximum(room - passage_lengths, room - room // 2))
    return queries, np.minimum(passage_lengths, room - queries)
