"""WordPiece tokenization of query-passage pairs as the original does it, by the Rust tokenizer.

Unlike Hugging Face's ready-made BERT tokenizers, a literal "[SEP]" in a text stays text here: no input can plant a
control token.
"""
import hashlib
import json
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from simplified_tinybert.files import UserError

TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json")
LONGEST_WORD = 100     # characters; longer words become [UNK], as in the original
MEMORY = 2 ** 26       # bytes that the texts and the words already seen may take, each


@dataclass
class Vocabulary:
    """Word pieces with their ids, and how text is cleaned before it is cut into them."""
    pieces: dict[str, int]
    lower_case: bool
    strip_accents: bool | None = None                   # None: accents go when letters are lower-cased
    split_chinese: bool = True

    @property
    def cls_id(self) -> int:
        return self.pieces["[CLS]"]

    @property
    def sep_id(self) -> int:
        return self.pieces["[SEP]"]

    def fingerprint(self) -> str:
        """SHA-256 of the pieces and their ids: equal for models that can share features."""
        ordered = sorted(self.pieces.items(), key=lambda item: item[1])
        lines = (f"{number} {piece}" for piece, number in ordered)
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()

    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer(WordPiece(self.pieces, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
        tokenizer.normalizer = BertNormalizer(clean_text=True, handle_chinese_chars=self.split_chinese,
                                              strip_accents=self.strip_accents, lowercase=self.lower_case)
        tokenizer.pre_tokenizer = BertPreTokenizer()
        return tokenizer


class Remembered(dict):
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
        self.bytes += sys.getsizeof(text) + sys.getsizeof(value) + 100               # 100: their place in the table
        if self.bytes > self.limit // 2:
            self.elder, self.bytes = dict(self), 0
            self.clear()
        self[text] = value
        return value


class PieceCutter:
    """Cuts texts into word pieces: `texts[text]` holds their ids as bytes of `token_type`.

    Of a long text only as many pieces are sure to be there as a pair of `max_seq_length` pieces can use: a text longer
    than `max_seq_length` - 3 always loses what is beyond.
    A text's pieces are those of its words one after the other, since BERT's cleaning never looks across a blank: it
    replaces single characters, and combining marks move no further than the next character that is none. Most of a
    text are words that were seen before.
    """

    def __init__(self, vocabulary: Vocabulary, max_seq_length: int, memory: int = MEMORY):
        self.vocabulary, self.max_seq_length = vocabulary, max_seq_length
        self.token_type = np.dtype(np.uint16 if max(vocabulary.pieces.values()) < 2 ** 16 else np.uint32)
        self.tokenizer = vocabulary.tokenizer()
        self.texts, self.words = Remembered(self._cut_text, memory), Remembered(self._cut_word, memory)

    def all_pieces(self, text: str) -> bytes:
        """The pieces of a text of any length, all of them; only its words are remembered."""
        return b"".join(map(self.words.__getitem__, self._with_final_sigma(text).split(" ")))

    def _with_final_sigma(self, text: str) -> str:
        """Python, and so the original, lower-cases a Σ that ends a word to ς; Rust makes it σ."""
        return text.lower() if self.vocabulary.lower_case and "Σ" in text else text

    def _cut_text(self, text: str) -> bytes:
        text = self._with_final_sigma(text)
        pieces, count = b"", self.max_seq_length
        while True:
            *words, rest = text.split(" ", count)
            pieces += b"".join(map(self.words.__getitem__, words))
            if len(pieces) >= self.max_seq_length * self.token_type.itemsize:
                return pieces
            if len(words) < count:
                return pieces + self.words[rest]
            text, count = rest, 2 * count

    def _cut_word(self, word: str) -> bytes:
        bare = word.rstrip(string.punctuation)          # which is never part of a longer piece
        if bare and bare != word:
            return self.words[bare] + self.words[word[len(bare):]]
        return np.array(self.tokenizer.encode(word, add_special_tokens=False).ids, self.token_type).tobytes()


def has_vocabulary(folder: Path) -> bool:
    return (folder / "vocab.txt").is_file() or (folder / "tokenizer.json").is_file()


def load_vocabulary(folder: Path, lower_case: bool | None = None) -> Vocabulary:
    """Read vocab.txt or tokenizer.json of a model folder.

    Casing: `lower_case` if given, else what tokenizer_config.json or tokenizer.json says, else lower-casing exactly if
    the vocabulary has no piece with a capital letter (it could not represent one anyway).
    """
    settings = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = _read_json(folder / "tokenizer_config.json")
    if not has_vocabulary(folder):
        raise UserError(f"{folder}: holds no vocabulary; expected vocab.txt or tokenizer.json of a BERT model")
    if (folder / "tokenizer.json").is_file():
        pieces, normalizer = _read_tokenizer_json(folder / "tokenizer.json")
        settings = {"do_lower_case": normalizer.get("lowercase"), "strip_accents": normalizer.get("strip_accents"),
                    "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True)} | settings
    if (folder / "vocab.txt").is_file():
        pieces = _read_vocab_txt(folder / "vocab.txt")
    missing = [piece for piece in ("[UNK]", "[CLS]", "[SEP]") if piece not in pieces]
    if missing:
        raise UserError(f"{folder}: the vocabulary lacks {', '.join(missing)}; expected a BERT WordPiece vocabulary")
    if lower_case is None:
        lower_case = settings.get("do_lower_case")
    if lower_case is None:
        words = (piece for piece in pieces if not (piece.startswith("[") and piece.endswith("]")))
        lower_case = not any(word != word.lower() for word in words)
    return Vocabulary(pieces, bool(lower_case), settings.get("strip_accents"),
                      settings.get("tokenize_chinese_chars", True))


def _read_vocab_txt(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); expected one word piece a line") from error
    if lines[-1] == "":
        lines.pop()
    return {line.rstrip("\r"): number for number, line in enumerate(lines)}


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], dict]:
    content = _read_json(path)
    try:
        kind, vocabulary = content["model"].get("type", "WordPiece"), content["model"].get("vocab")
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        normalizer = dict(content.get("normalizer") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: is not a tokenizer file ({error!r}); fetch or write it again") from error
    if kind != "WordPiece" or not isinstance(vocabulary, dict):
        raise UserError(f"{path}: holds a {kind} tokenizer; expected WordPiece, as BERT has")
    pieces = vocabulary | added
    if not all(type(number) is int and 0 <= number < 2 ** 31 for number in pieces.values()):
        raise UserError(f"{path}: holds ids that are not whole numbers from 0; fetch or write it again")
    return pieces, normalizer


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); fetch or write the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a JSON object")
    return content


def truncated_lengths(query_lengths: np.ndarray, passage_lengths: np.ndarray,
                      max_seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Word pieces that remain of each query and passage when both and three control tokens have to fit.

    The reference takes one piece at a time from the longer side, from the passage at a tie. In closed form: the query
    keeps what the passage leaves free, or the larger half of the room, whichever is more.
    """
    room = max_seq_length - 3                                                        # [CLS] query [SEP] passage [SEP]
    queries = np.minimum(query_lengths, np.maximum(room - passage_lengths, room - room // 2))
    return queries, np.minimum(passage_lengths, room - queries)
