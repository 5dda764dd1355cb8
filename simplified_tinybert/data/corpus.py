"""Raw text as training examples of general distillation: [CLS] up to max_seq_length - 2 tokens [SEP].

A document is cut into such segments from its start; its last one is as long as what is left. No segment holds text of
two documents, and nothing is masked.
"""
import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from simplified_tinybert.common.files import Problems, UserError, check_input_file
from simplified_tinybert.common.text import BLOCK, read_lines
from simplified_tinybert.common.workers import default_workers, map_in_order
from simplified_tinybert.data.cache import mapped
from simplified_tinybert.data.documents import read_documents
from simplified_tinybert.data.features import NO_LABEL, Examples
from simplified_tinybert.data.tokenization import CachedTokenizer, words_suffice
from simplified_tinybert.model.vocabulary import Vocabulary

DOCUMENTS = ("lines", "paragraphs")     # of --corpus
COLUMNS = "columns"                     # of --docs


def documents(paths: list[Path], kind: str, problems: Problems) -> Iterator[str]:
    """The documents of files, plain or .gz: lines that are not blank, paragraphs between blank lines, or the texts
    (title, blank, body) of the columns that documents.py reads.
    """
    for path in paths:
        if kind == COLUMNS:
            texts = (f"{document.title} {document.body}".strip() for document in read_documents(path, problems))
            yield from filter(None, texts)
        elif kind == "lines":
            yield from (line for _, line in read_lines(path, problems) if line.strip())
        else:
            yield from paragraphs(line for _, line in read_lines(path, problems))


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    for blank, group in groupby(lines, lambda line: not line.strip()):
        if not blank:
            yield " ".join(group)


def check_corpus(paths: list[Path], kind: str, problems: Problems) -> str:
    """SHA-256 over the content of all files; what cannot be used is added to `problems`."""
    digest, text, before = hashlib.sha256(), False, problems.count
    for path in paths:
        if check_input_file(path, problems, "documents" if kind == COLUMNS else "corpus", read_twice=True):
            lines = (documents([path], kind, problems) if kind == COLUMNS else
                     (line for _, line in read_lines(path, problems)))
            for line in tqdm(lines, desc=f"checking {path.name}", unit=" lines", unit_scale=True, delay=2):
                digest.update(line.encode() + b"\n")
                text = text or bool(line.strip())
            digest.update(b"\0")
    if not text and problems.count == before:
        problems.add(f"{', '.join(map(str, paths))}: no text in the corpus")
    return digest.hexdigest()


def segments(texts: list[str], cutter: CachedTokenizer) -> Examples:
    """The segments of some documents."""
    cls, sep = (np.array([piece], cutter.token_type) for piece in (cutter.vocabulary.cls_id, cutter.vocabulary.sep_id))
    tokens, lengths, room = [], [], cutter.max_seq_length - 2
    for whole in cutter.wholes(texts):
        pieces = np.frombuffer(whole, cutter.token_type)
        for start in range(0, len(pieces), room):
            segment = pieces[start:start + room]
            tokens += [cls, segment, sep]
            lengths.append(len(segment) + 2)
    lengths = np.array(lengths, np.uint16)
    return Examples(np.concatenate(tokens) if tokens else np.array([], cutter.token_type), lengths, lengths,
                    np.full(len(lengths), NO_LABEL, np.int8))


def segment_cutter(vocabulary: Vocabulary, max_seq_length: int, by_words: bool) -> Callable[[list[str]], Examples]:
    return partial(segments, cutter=CachedTokenizer(vocabulary, max_seq_length, by_words))


def map_corpus(paths: list[Path], kind: str, vocabulary: Vocabulary, max_seq_length: int, checksum: str,
               cache_dir: Path) -> Examples:
    """All segments of a checked corpus as memory maps; cut by as many processes as there are cores, only once."""
    name = hashlib.sha256(f"{checksum} {kind} {vocabulary.checksum()} {vocabulary.lower_case} {max_seq_length}"
                          .encode()).hexdigest()[:32]
    workers = default_workers() if sum(path.stat().st_size for path in paths) > 4 * BLOCK else 1
    token_type = "<u2" if max(vocabulary.pieces.values()) < 2 ** 16 else "<u4"

    def parts() -> Iterator[Examples]:
        by_words = words_suffice(vocabulary, documents(paths, kind, Problems()))
        make = partial(segment_cutter, vocabulary, max_seq_length, by_words)
        yield from map_in_order(make, in_blocks(documents(paths, kind, Problems())), workers)
    return mapped(cache_dir / f"corpus-{name}", token_type, not_empty(parts(), paths))


def not_empty(parts: Iterator[Examples], paths: list[Path]) -> Iterator[Examples]:
    """The same parts. Raises UserError at their end if they hold no segment: a text may be all control characters."""
    count = 0
    for part in parts:
        count += len(part)
        yield part
    if not count:
        raise UserError(f"{', '.join(map(str, paths))}: no tokens in the corpus")


def in_blocks(texts: Iterator[str]) -> Iterator[list[str]]:
    """Documents in lists of about BLOCK characters."""
    block, size = [], 0
    for text in tqdm(texts, desc="tokenizing", unit=" documents", unit_scale=True):
        block.append(text)
        size += len(text)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block
