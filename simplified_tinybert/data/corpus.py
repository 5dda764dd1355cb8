"""Plain text as training examples for general distillation.

Each document is split into consecutive segments: [CLS], up to max_seq_length - 2 tokens, [SEP]. The last segment may be
shorter. No segment spans two documents, and no token is masked.
"""
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from simplified_tinybert.common.files import Problems, UserError, check_input_file
from simplified_tinybert.common.text import BLOCK, in_groups, read_lines
from simplified_tinybert.common.workers import default_workers, map_in_order
from simplified_tinybert.data.cache import map_chunks
from simplified_tinybert.data.documents import read_documents
from simplified_tinybert.data.features import NO_LABEL, Examples, token_dtype
from simplified_tinybert.tokenization.pairs import CachedTokenizer, words_suffice
from simplified_tinybert.tokenization.vocabulary import Vocabulary

DOCUMENTS = ("lines", "paragraphs")     # formats of --corpus
COLUMNS = "columns"                     # format of --docs


def documents(paths: list[Path], kind: str, problems: Problems) -> Iterator[str]:
    """Yield the documents of plain or gzip files.

    A document is a line that is not blank, a paragraph between blank lines, or title and body of a line in columns.
    """
    for path in paths:
        if kind == COLUMNS:
            texts = (f"{document.title} {document.body}".strip() for document in read_documents(path, problems))
            yield from filter(None, texts)
        elif kind == "lines":
            yield from (line for _, line in read_lines(path, problems) if line.strip())
        else:
            groups = groupby((line for _, line in read_lines(path, problems)), lambda line: bool(line.strip()))
            yield from (" ".join(lines) for has_text, lines in groups if has_text)


def check_corpus(paths: list[Path], kind: str, problems: Problems) -> str:
    """Return a SHA-256 over the content of all files. Input errors are added to `problems`."""
    digest, has_text, before = hashlib.sha256(), False, problems.count
    for path in paths:
        if check_input_file(path, problems, "documents" if kind == COLUMNS else "corpus", read_twice=True):
            lines = (documents([path], kind, problems) if kind == COLUMNS else
                     (line for _, line in read_lines(path, problems)))
            for line in tqdm(lines, desc=f"checking {path.name}", unit=" lines", unit_scale=True, delay=2):
                digest.update(line.encode() + b"\n")
                has_text = has_text or bool(line.strip())
            digest.update(b"\0")
    if not has_text and problems.count == before:
        problems.add(f"{', '.join(map(str, paths))}: no text in the corpus")
    return digest.hexdigest()


def segments(texts: list[str], tokenizer: CachedTokenizer) -> Examples:
    pieces, lengths, size = [], [], tokenizer.dtype.itemsize
    room = (tokenizer.max_seq_length - 2) * size
    for tokens in tokenizer.tokenize_all(texts):
        for start in range(0, len(tokens), room):
            segment = tokens[start:start + room]
            pieces += [tokenizer.cls, segment, tokenizer.sep]
            lengths.append(len(segment) // size + 2)
    tokens, lengths = np.frombuffer(b"".join(pieces), tokenizer.dtype), np.array(lengths, np.uint16)
    return Examples(tokens, lengths, lengths, np.full(len(lengths), NO_LABEL, np.int8))


def segment_function(vocabulary: Vocabulary, max_seq_length: int, by_words: bool) -> Callable[[list[str]], Examples]:
    return partial(segments, tokenizer=CachedTokenizer(vocabulary, max_seq_length, by_words))


def map_corpus(paths: list[Path], kind: str, vocabulary: Vocabulary, max_seq_length: int, checksum: str,
               cache_dir: Path) -> Examples:
    """Return all segments of a checked corpus as memory maps. It is tokenized only once, on all cores."""
    name = hashlib.sha256(f"{checksum} {kind} {vocabulary.checksum()} {vocabulary.lower_case} {max_seq_length}"
                          .encode()).hexdigest()[:32]
    workers = default_workers() if sum(path.stat().st_size for path in paths) > 4 * BLOCK else 1

    def chunks() -> Iterator[Examples]:
        by_words = words_suffice(vocabulary, documents(paths, kind, Problems()))
        make = partial(segment_function, vocabulary, max_seq_length, by_words)
        texts = tqdm(documents(paths, kind, Problems()), desc="tokenizing", unit=" documents", unit_scale=True)
        count = 0
        for chunk in map_in_order(make, in_groups(texts, len, BLOCK), workers):
            count += len(chunk)
            yield chunk
        if not count:                                   # the text consists of control characters
            raise UserError(f"{', '.join(map(str, paths))}: no tokens in the corpus")
    return map_chunks(cache_dir / f"corpus-{name}", token_dtype(vocabulary), chunks())
