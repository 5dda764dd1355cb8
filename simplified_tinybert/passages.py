"""Documents cut into passages, and which of them a query's training examples are made of."""
import hashlib
from collections.abc import Callable, Collection, Iterable
from random import Random
from typing import NamedTuple, TypeVar

import numpy as np

from simplified_tinybert.documents import Document

Item = TypeVar("Item")


class Cutting(NamedTuple):
    """How documents are cut: windows of `window` words, one every `stride` words, with the title in front or not."""
    window: int
    stride: int
    title: bool


def window_starts(words: int, window: int, stride: int) -> range:
    """First word of each window over a text of `words` words: 0, stride, 2 * stride ... until one reaches the end."""
    behind = max(0, words - window)                                     # words that the first window does not reach
    return range(0, behind + stride, stride) if behind % stride else range(0, behind + 1, stride)


def cut(document: Document, cutting: Cutting) -> list[str]:
    """The passages of a document, words joined by single blanks; none if it has no words.

    Words are what str.split() finds, so that no passage holds a tab or a line end. The window counts words of the body;
    with the title in front a document without a body is one passage, its title.
    """
    words, title = document.body.split(), document.title.split() if cutting.title else []
    if not words and not title:
        return []
    return [" ".join(title + words[start:start + cutting.window])
            for start in window_starts(len(words), cutting.window, cutting.stride)]


def random_for(seed: int, query_id: str) -> Random:
    """Random numbers of one query: they depend on nothing else, neither on other queries nor on any order."""
    return Random(f"{seed}\t{query_id}")


def shuffled(items: Iterable[Item], random: Random) -> list[Item]:
    # By Random.random() alone, whose numbers are the same in every version of Python; shuffle()'s need not be.
    return [item for _, _, item in sorted((random.random(), number, item) for number, item in enumerate(items))]


def draw_queries(query_ids: Collection[str], count: int, seed: int) -> set[str]:
    """`count` of the queries (all if there are no more); which ones depends on ids and seed alone, not on the order."""
    def lot(query_id: str) -> bytes:
        return hashlib.blake2b(f"{seed}\t{query_id}".encode(), digest_size=16).digest()
    return set(sorted(query_ids, key=lot)[:count])


def draw_passages(document_ids: Collection[str], count: int, passages_of: Callable[[str], list[str]],
                  random: Random) -> list[str]:
    """`count` passages: one of each document, in random order, then a second of each, and so on.

    Fewer if the documents have no more. No more documents are looked up than needed.
    """
    drawn, opened = [], []
    for document_id in shuffled(document_ids, random):
        if len(drawn) == count:
            return drawn
        if passages := shuffled(passages_of(document_id), random):
            drawn.append(passages.pop())
            opened.append(passages)
    while len(drawn) < count and (opened := [passages for passages in opened if passages]):
        drawn.extend(passages.pop() for passages in opened[:count - len(drawn)])
    return drawn


def whole_number(expected: float, random: Random) -> int:
    """A whole number that is `expected` on average: 1.25 is 1, or in one of four cases 2."""
    return int(expected) + (random.random() < expected % 1)


def best_passages(passages: list[str], scores: np.ndarray, most: int | None, threshold: float) -> list[str]:
    """The `most` passages (None: all) with the highest scores of at least `threshold`, best first; ties as they stand.
    """
    order = np.argsort(-scores, kind="stable")[:most].tolist()
    return [passages[index] for index in order if scores[index] >= threshold]
