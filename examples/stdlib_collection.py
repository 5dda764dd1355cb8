"""Make a document retrieval collection from the documentation that stdlib_docs.py reads. Used by build_collection.py.

    splits = choose_queries(modules, {"dev": 150, "test": 150})     # functions, by split
    collection = make_collection(modules, splits, window=36, stride=24)

Documents are modules. A query is the first sentence of a function's documentation. The document contains the rest of
this documentation, but neither the query nor the function's name and parameters.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from examples.stdlib_docs import Entry, Module

BUCKETS = 16  # one bucket of functions is for dev queries, one for test queries
QUERY_WORDS = range(5, 31)
PSEUDO = "pseudo"


@dataclass
class Query:
    qid: str
    text: str
    document: int
    own: list[int]  # passages that overlap with the entry the query comes from, largest overlap first
    pseudo: bool = False  # a sentence from the document itself, for training only


@dataclass
class Collection:
    names: list[str]
    bodies: list[str]
    passages: list[str]
    document_of: np.ndarray  # document of each passage, ascending
    queries: dict[str, list[Query]]  # by split; PSEUDO is one of the splits


def digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def normal_form(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def choose_queries(modules: list[Module], sizes: dict[str, int]) -> dict[str, list[Entry]]:
    """Return the functions whose summaries become queries, by split. Repeated summaries and signatures are left out.

    The SHA-256 of a function's name decides its split, so that it is the same in every Python version. Dev and test
    only contain public functions.
    """
    functions = {entry.name: entry for module in modules for entry in module.entries if entry.is_function}
    seen = Counter(normal_form(entry.summary) for entry in functions.values())
    splits: dict[str, list[Entry]] = {"train": [], **{name: [] for name in sizes}}
    for entry in sorted(functions.values(), key=lambda entry: digest(entry.name)):
        summary = normal_form(entry.summary)
        signature = re.search(r"->|^[\w.]+\(", entry.summary)
        if len(summary.split()) not in QUERY_WORDS or seen[summary] > 1 or signature:
            continue
        split = {0: "test", 1: "dev"}.get(digest(entry.name) % BUCKETS, "train")
        if split == "train" or (len(splits[split]) < sizes[split] and not re.search(r"(^|\.)_", entry.name)):
            splits[split].append(entry)
    return splits


def segment(words: list[str], window: int, stride: int) -> list[tuple[int, int]]:
    """Return (start, end) of each window over a text.

    >>> segment(list("abcdefg"), window=4, stride=2)
    [(0, 4), (2, 6), (4, 7)]
    """
    starts = range(0, max(1, len(words) - window + stride), stride)
    return [(start, min(start + window, len(words))) for start in starts]


def sentences(text: str) -> list[str]:
    parts = re.split(r"(?<=[.!?:])\s+(?=[A-Z])", text)
    return [part for part in parts if len(normal_form(part).split()) in QUERY_WORDS]


def entry_texts(module: Module, split_of: dict[str, str]) -> Iterator[tuple[Entry, str]]:
    """Yield each entry and the text that the document keeps of it."""
    for entry in {entry.name: entry for entry in module.entries}.values():
        yield entry, entry.rest if entry.name in split_of else f"{entry.heading} {entry.summary} {entry.rest}"


def entry_queries(entry: Entry, split: str | None, document: int, own: list[int]) -> Iterator[tuple[str, Query]]:
    """Yield (split, query): the held-out summary, and the other sentences as pseudo queries."""
    if split:
        yield split, Query(entry.name, entry.summary, document, own)
    for sentence in sentences(entry.rest if split else f"{entry.summary} {entry.rest}"):
        yield PSEUDO, Query(entry.name, sentence, document, own, pseudo=True)


def make_collection(modules: list[Module], splits: dict[str, list[Entry]], window: int, stride: int) -> Collection:
    """Assemble the documents, cut them into passages, and find each query's own passages."""
    split_of = {entry.name: split for split, entries in splits.items() for entry in entries}
    collection = Collection([], [], [], np.empty(0), {split: [] for split in [*splits, PSEUDO]})
    document_of: list[int] = []
    for document, module in enumerate(modules):
        words, spans = module.doc.split(), []
        for entry, text in entry_texts(module, split_of):
            spans.append((entry, len(words), len(words) + len(text.split())))
            words += text.split()
        windows = segment(words, window, stride)
        for entry, start, end in spans:
            overlaps = [min(end, last) - max(start, first) for first, last in windows]
            overlapping = [index for index, overlap in enumerate(overlaps) if overlap > 0]
            own = [len(document_of) + index for index in sorted(overlapping, key=lambda index: -overlaps[index])]
            for split, query in entry_queries(entry, split_of.get(entry.name), document, own):
                collection.queries[split].append(query)
        collection.names.append(module.name)
        collection.bodies.append(" ".join(words))
        collection.passages += [" ".join([module.name, ":", *words[start:end]]) for start, end in windows]
        document_of += [document] * len(windows)
    collection.document_of = np.array(document_of)
    everything = "\n".join(map(normal_form, collection.bodies))
    for split in splits:          # a sentence that another function's documentation contains cannot be held out
        collection.queries[split] = [query for query in collection.queries[split]
                                     if normal_form(query.text) not in everything]
    return collection
