"""Tokens of query-passage pairs: those of the model's own tokenizer, cut to length as the original does it.

Most of a text are words that were seen before, so texts are cut word by word wherever that gives the same tokens.
"""
import string
import sys
from collections.abc import Callable, Iterable
from itertools import chain

import numpy as np

from simplified_tinybert.common.files import say
from simplified_tinybert.data.features import NO_LABEL, Examples
from simplified_tinybert.model.vocabulary import Vocabulary

MEMORY = 2 ** 26            # bytes that the texts and the words already seen may take, each
SAMPLE_TEXTS = 2000         # different texts whose tokens are compared with the library's, and
SAMPLE_CHARACTERS = 250     # what is looked at of each


class TextCache(dict):
    """text → compute(text), computed when a text is first seen; holds about `limit` bytes.

    When half of that is reached, what was there becomes the elder half and the former one is given up, but for what is
    asked for again in the meantime.
    """

    def __init__(self, compute: Callable[[str], bytes], limit: int):
        super().__init__()
        self.compute, self.limit, self.elder, self.bytes = compute, limit, {}, 0

    def __missing__(self, text: str) -> bytes:
        value = self.elder.get(text)
        if value is None:
            value = self.compute(text)
        self.keep(text, value)
        return value

    def keep(self, text: str, value: bytes) -> None:
        self.bytes += sys.getsizeof(text) + sys.getsizeof(value) + 100               # 100: their place in the table
        if self.bytes > self.limit // 2:
            self.elder, self.bytes = dict(self), 0
            self.clear()
        self[text] = value


class CachedTokenizer:
    """Cuts texts into tokens: ids as bytes of `token_type`.

    A text is cut as a whole by the `tokenizers` library or, with `by_words`, word by word (default: as
    `Vocabulary.splits_at_blanks` says): most of a text are words that were seen before.
    """

    def __init__(self, vocabulary: Vocabulary, max_seq_length: int, by_words: bool | None = None,
                 memory: int = MEMORY):
        self.vocabulary, self.max_seq_length = vocabulary, max_seq_length
        self.by_words = by_words = vocabulary.splits_at_blanks if by_words is None else by_words
        self.token_type = np.dtype(np.uint16 if max(vocabulary.pieces.values()) < 2 ** 16 else np.uint32)
        self.tokenizer = vocabulary.tokenizer()
        self.texts = TextCache(self._beginning_by_words if by_words else self._whole, memory)
        self.words = TextCache(self._cut_word, memory)
        self.splits_punctuation = not vocabulary.state["added_tokens"]
        self.unknown = vocabulary.pieces[vocabulary.state["model"]["unk_token"]]
        self.planted = [vocabulary.pieces.get(piece, self.unknown) for piece in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")]

    def beginnings(self, texts: list[str]) -> list[bytes]:
        """The tokens of each text, at least as many as a pair of `max_seq_length` tokens can use.

        A text longer than `max_seq_length` - 3 always loses what is beyond.
        """
        if not self.by_words:
            new = [text for text in dict.fromkeys(texts) if text not in self.texts and text not in self.texts.elder]
            for text, tokens in zip(new, self.cut(new)):
                self.texts.keep(text, tokens[:self.max_seq_length * self.token_type.itemsize])
        return [self.texts[text] for text in texts]

    def wholes(self, texts: list[str]) -> list[bytes]:
        """All tokens of each text, however long; only words are remembered."""
        return [b"".join(map(self.words.__getitem__, text.split(" "))) for text in texts] if self.by_words \
            else self.cut(texts)

    def _beginning_by_words(self, text: str) -> bytes:
        pieces, count = b"", self.max_seq_length
        while True:
            *words, rest = text.split(" ", count)
            pieces += b"".join(map(self.words.__getitem__, words))
            if len(pieces) >= self.max_seq_length * self.token_type.itemsize:
                return pieces
            if len(words) < count:
                return pieces + self.words[rest]
            text, count = rest, 2 * count

    def _whole(self, text: str) -> bytes:
        return self.cut([text])[0]

    def _cut_word(self, word: str) -> bytes:
        bare = word.rstrip(string.punctuation) if self.splits_punctuation else ""   # never part of a longer piece
        if bare and bare != word:
            return self.words[bare] + self.words[word[len(bare):]]
        return np.array(self.tokenizer.encode(word, add_special_tokens=False).ids, self.token_type).tobytes()

    def cut(self, texts: list[str]) -> list[bytes]:
        """All tokens of each text by the library. A special token of BERT's is unknown, however it is cut out."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = (np.array(encoding.ids, self.token_type) for encoding in encodings)
        return [np.where(np.isin(each, self.planted), self.unknown, each).astype(self.token_type).tobytes()
                for each in ids]


def words_suffice(vocabulary: Vocabulary, texts: Iterable[str]) -> bool:
    """Whether texts may be cut by words: known by the tokenizer's settings, and checked on the first of `texts`.

    Where they may not the user is told, for it takes longer.
    """
    cutter, sample = CachedTokenizer(vocabulary, SAMPLE_CHARACTERS, by_words=True), set()
    for text in texts if vocabulary.splits_at_blanks else ():
        sample.add(text[:SAMPLE_CHARACTERS])
        if len(sample) == SAMPLE_TEXTS:
            break
    same = vocabulary.splits_at_blanks and cutter.wholes(list(sample)) == cutter.cut(list(sample))
    if not same:
        say("note         texts are cut by the tokenizers library as a whole, which takes longer: words alone would "
            "not always give the tokens of this model's tokenizer")
    return same


def tokenize(lines: list[str], cutter: CachedTokenizer) -> Examples:
    """Checked lines → examples."""
    rows, size, vocabulary = [line.split("\t") for line in lines], cutter.token_type.itemsize, cutter.vocabulary
    queries, passages = (cutter.beginnings([row[column] for row in rows]) for column in (1, 2))
    kept_queries, kept_passages = truncated_lengths(
        *(np.array([len(text) // size for text in texts]) for texts in (queries, passages)), cutter.max_seq_length)
    cls, sep = (np.array(piece, cutter.token_type).tobytes() for piece in (vocabulary.cls_id, vocabulary.sep_id))
    tokens = b"".join(chain.from_iterable(
        (cls, query[:query_end], sep, passage[:passage_end], sep) for query, query_end, passage, passage_end
        in zip(queries, (kept_queries * size).tolist(), passages, (kept_passages * size).tolist())))
    labels = np.array([int(row[3]) if len(row) == 4 else NO_LABEL for row in rows], dtype=np.int8)
    return Examples(np.frombuffer(tokens, cutter.token_type), (kept_queries + kept_passages + 3).astype(np.uint16),
                    (kept_queries + 2).astype(np.uint16), labels, [row[0] for row in rows])


def truncated_lengths(query_lengths: np.ndarray, passage_lengths: np.ndarray,
                      max_seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that remain of each query and passage when both and three special tokens have to fit.

    The reference takes one piece at a time from the longer side, from the passage at a tie. In closed form: the query
    keeps what the passage leaves free, or the larger half of the room, whichever is more.
    """
    room = max_seq_length - 3                                                        # [CLS] query [SEP] passage [SEP]
    queries = np.minimum(query_lengths, np.maximum(room - passage_lengths, room - room // 2))
    return queries, np.minimum(passage_lengths, room - queries)
