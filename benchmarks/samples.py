"""Realistic pairs for the benchmarks, from the texts of the built-in example or from a file. Not a command.

Queries are sentences from SciPy's documentation. Passages are windows of 140 words of it, shorter at the end of a
subpackage. With the query they have 208 tokens on average (BERT-Base's vocabulary), about as in document re-ranking.
"""
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import scipy

from simplified_tinybert.common.files import Problems, UserError, atomic_writer
from simplified_tinybert.common.text import read_lines

WINDOW = 140           # words
CANDIDATES = 100       # passages per query


class Texts:
    """Queries, and any number of different passages."""

    def __init__(self, seed: int = 0):
        from examples.docstring_collection import choose_queries, make_documents
        from examples.docstrings import read_package

        documents = make_documents(read_package("scipy", Path(scipy.__file__).parent))
        self.random = np.random.default_rng(seed)
        queries = choose_queries(documents, {"dev": 100, "test": 100})
        self.queries = sorted(query.text for split in queries.values() for query in split)
        self.random.shuffle(self.queries)
        subpackages: dict[str, list[str]] = {}                             # their documentation, one after the other
        for document in documents:
            subpackages.setdefault(".".join(document.name.split(".")[:2]), []).extend(document.body.split())
        self.words = [word for words in subpackages.values() for word in words]
        lengths = [len(words) for words in subpackages.values()]
        self.ends = np.repeat(np.cumsum(lengths), lengths)             # end of the subpackage that each word is in

    def passages(self) -> Iterator[str]:
        """Yield windows from every start in random order, then windows that are one word shorter, and so on."""
        starts = self.random.permutation(len(self.words))
        for window in count(WINDOW, -1):
            for start in starts:
                yield " ".join(self.words[start:min(start + window, self.ends[start])])

    def training_lines(self) -> Iterator[str]:
        """Yield index, query, passage, label. No passage is repeated."""
        for index, passage in enumerate(self.passages()):
            yield f"{index}\t{self.queries[index % len(self.queries)]}\t{passage}\t{index % 2}"

    def pair_lines(self, total: int, repeats: float) -> Iterator[str]:
        """Yield query_id#passage_id, query, passage. A passage is a candidate for `repeats` queries on average."""
        pool = list(islice(self.passages(), max(CANDIDATES, round(total / repeats))))
        for index in range(total):
            if index % CANDIDATES == 0:
                chosen = self.random.choice(len(pool), CANDIDATES, replace=False)
                query = index // CANDIDATES
            passage = chosen[index % CANDIDATES]
            yield f"q{query}#D{passage}_0\t{self.queries[query % len(self.queries)]}\t{pool[passage]}"


def read_pairs(path: Path, limit: int) -> list[str]:
    """Return the first `limit` lines of a file of pairs. Raises UserError."""
    problems = Problems()
    lines = [text for _, text in islice(read_lines(path, problems), limit)]
    problems.raise_if_any()
    if not lines:
        raise UserError(f"{path}: found no lines; expected pairs")
    return lines


def write_lines(path: Path, lines: Iterator[str]) -> None:
    with atomic_writer(path) as handle:
        handle.writelines(f"{line}\n" for line in lines)


def evenly(lengths: np.ndarray, size: int) -> np.ndarray:
    """Return indices of a sample with the same distribution of lengths: quantiles, in random order."""
    quantiles = (np.arange(size) + 0.5) / size * len(lengths)
    return np.random.default_rng(0).permutation(np.argsort(lengths, kind="stable")[quantiles.astype(np.int64)])
