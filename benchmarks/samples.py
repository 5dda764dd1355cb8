"""Real pairs for the benchmarks, from the texts of the embedded example or from a file. Not a command.

Queries are sentences of Python's documentation, passages are windows of 140 words of it, shorter where a document ends:
as long as those that re-rankers meet (210 tokens with the query, on average, of BERT-Base's vocabulary).
"""
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np

from simplified_tinybert.common.files import Problems, UserError, atomic_writer
from simplified_tinybert.common.text import read_lines

WINDOW = 140           # words
CANDIDATES = 100       # passages of a query


class Texts:
    """Sentences that serve as queries, and any number of different passages."""

    def __init__(self, seed: int = 0):
        from examples.stdlib_collection import choose_queries, make_collection
        from examples.stdlib_docs import read_library

        modules = read_library()
        collection = make_collection(modules, choose_queries(modules, {"dev": 150, "test": 150}), WINDOW, WINDOW)
        self.random = np.random.default_rng(seed)
        self.queries = sorted({query.text for queries in collection.queries.values() for query in queries})
        self.random.shuffle(self.queries)
        self.words = [word for body in collection.bodies for word in body.split()]
        lengths = [len(body.split()) for body in collection.bodies]
        self.ends = np.repeat(np.cumsum(lengths), lengths)             # where the document of each word ends

    def passages(self) -> Iterator[str]:
        """Windows at every word, in random order; when all have been given, again with one word less each."""
        starts = self.random.permutation(len(self.words))
        for window in count(WINDOW, -1):
            for start in starts:
                yield " ".join(self.words[start:min(start + window, self.ends[start])])

    def training_lines(self) -> Iterator[str]:
        """index, query, passage, label: every pair of its own."""
        for index, passage in enumerate(self.passages()):
            yield f"{index}\t{self.queries[index % len(self.queries)]}\t{passage}\t{index % 2}"

    def pair_lines(self, total: int, repeats: float) -> Iterator[str]:
        """query_id#passage_id, query, passage: each passage is a candidate of so many queries on average."""
        pool = list(islice(self.passages(), max(CANDIDATES, round(total / repeats))))
        for index in range(total):
            if index % CANDIDATES == 0:
                chosen = self.random.choice(len(pool), CANDIDATES, replace=False)
                query = index // CANDIDATES
            passage = chosen[index % CANDIDATES]
            yield f"q{query}#D{passage}_0\t{self.queries[query % len(self.queries)]}\t{pool[passage]}"


def read_pairs(path: Path, limit: int) -> list[str]:
    """The first lines of a file of pairs. Raises UserError."""
    problems = Problems()
    lines = [text for _, text in islice(read_lines(path, problems), limit)]
    problems.raise_if_any()
    if not lines:
        raise UserError(f"{path}: is empty; expected pairs")
    return lines


def write_lines(path: Path, lines: Iterator[str]) -> None:
    with atomic_writer(path) as handle:
        handle.writelines(f"{line}\n" for line in lines)


def evenly(lengths: np.ndarray, size: int) -> np.ndarray:
    """Indices of a small sample with the lengths of the whole: its quantiles, in random order."""
    places = (np.arange(size) + 0.5) / size * len(lengths)
    return np.random.default_rng(0).permutation(np.argsort(lengths, kind="stable")[places.astype(np.int64)])
