"""Make a document retrieval collection of docstrings: a module of build_collection.py.

    documents = make_documents(entries)                               # of docstrings.read_package
    queries = choose_queries(documents, {"dev": 300, "test": 400})    # by split
    passages = cut(documents, window=40, stride=28)

A document is the docstring of one class, function or method without its first sentence, which is the query.
"""
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import Stemmer

from examples.docstrings import Entry

MIN_WORDS = 12              # of a document
QUERY_WORDS = range(5, 31)
SHARED_SENTENCE = 2         # a sentence that more docstrings have is boilerplate
ALIKE_QUERIES, ALIKE_DOCUMENTS = 0.75, 0.5     # Jaccard similarity of near-duplicates: content words, 3-grams
FUNCTION_WORDS = set("a an and are as be by for from given if in is it its of on or that the this to with".split())
BUCKETS = 20                # of the documents, by their names
SPLIT_OF_BUCKET = {**dict.fromkeys(range(4), "test"), **dict.fromkeys(range(4, 6), "dev")}


class Document(NamedTuple):
    name: str               # qualified
    title: str              # the last two parts of the name, as words
    summary: str            # not part of the document
    sentences: list[str]

    @property
    def body(self) -> str:
        return " ".join(self.sentences)


class Query(NamedTuple):
    qid: str
    text: str
    document: int           # the relevant one
    rest: str = ""          # of a sentence cut out of its document: the passage that is left without it


class Passages(NamedTuple):
    texts: list[str]        # with the titles
    first: np.ndarray       # (documents + 1): where the passages of each document begin


def digest(text: str) -> int:
    """Return a number that depends on the text alone and looks random."""
    return int.from_bytes(hashlib.sha256(f"seed 2\t{text}".encode()).digest()[:8], "big")


def normal_form(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def stems(text: str) -> list[str]:
    """The words of a text for BM25: identifiers are split at underscores, words are stemmed."""
    return stemmer().stemWords(re.findall(r"[a-z0-9]+", text.lower()))


@cache
def stemmer() -> Stemmer.Stemmer:
    return Stemmer.Stemmer("english")


def title(name: str) -> str:
    """
    >>> title("numpy.ma.core.MaskedArray.__copy__")
    'Masked Array copy'
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", " ".join(name.split(".")[-2:]))
    return " ".join(re.findall(r"[A-Za-z0-9]+", words))


def make_documents(entries: Iterable[Entry]) -> list[Document]:
    """Documents without boilerplate and without near-duplicates, which could not be called irrelevant."""
    entries = list({entry.name: entry for entry in entries}.values())
    shared = Counter(form for entry in entries for form in set(map(normal_form, entry.sentences)))
    documents = []
    for entry in entries:
        kept = [sentence for sentence in dict.fromkeys(entry.sentences)
                if shared[normal_form(sentence)] <= SHARED_SENTENCE and len(sentence.split()) > 2]
        if sum(len(sentence.split()) for sentence in kept) >= MIN_WORDS:
            documents.append(Document(entry.name, title(entry.name), entry.summary, kept))
    words = [stems(document.body) for document in documents]
    dropped = near_duplicates([set(zip(each, each[1:], each[2:])) for each in words], ALIKE_DOCUMENTS)
    dropped |= near_duplicates([set(stems(document.summary)) - FUNCTION_WORDS for document in documents], ALIKE_QUERIES)
    return [document for number, document in enumerate(documents) if number not in dropped]


def near_duplicates(sets: list[set], similarity: float) -> set[int]:
    """The numbers of the sets that are similar to an earlier kept one (Jaccard similarity of at least `similarity`).

    Two similar sets share at least one of their rarest elements, so only such sets are compared.

    >>> near_duplicates([{1, 2, 3, 4}, {5, 6}, {1, 2, 3}, {1, 2, 9}], 0.75)
    {2}
    """
    frequency = Counter(element for each in sets for element in each)
    index: dict[object, list[int]] = defaultdict(list)
    found = set()
    for number, each in enumerate(sets):
        rarest = sorted(each, key=lambda element: (frequency[element], element))
        rarest = rarest[:len(each) - math.ceil(similarity * len(each)) + 1]
        others = {other for element in rarest for other in index[element]}
        if any(len(each & sets[other]) >= similarity * len(each | sets[other]) for other in others):
            found.add(number)
        else:
            for element in rarest:
                index[element].append(number)
    return found


def choose_queries(documents: list[Document], sizes: dict[str, int]) -> dict[str, list[Query]]:
    """Summaries as queries, by split, in an order that looks random. No sentence of a document equals one.

    The split follows from the SHA-256 of the name. Dev and test take only names whose last part does not begin with an
    underscore.
    """
    sentences = {normal_form(sentence) for document in documents for sentence in document.sentences}
    splits: dict[str, list[Query]] = {"train": [], **{split: [] for split in sizes}}
    for number in sorted(range(len(documents)), key=lambda number: digest(documents[number].name)):
        document = documents[number]
        summary = normal_form(document.summary)
        if len(summary.split()) not in QUERY_WORDS or summary in sentences or document.summary in document.body:
            continue
        public = not document.name.rpartition(".")[2].startswith("_")
        split = SPLIT_OF_BUCKET.get(digest(document.name) % BUCKETS, "train") if public else "train"
        if split == "train" or len(splits[split]) < sizes[split]:
            splits[split].append(Query(document.name, document.summary, number))
    return splits


def cut_out_queries(documents: list[Document], count: int, window: int) -> list[Query]:
    """Sentences as queries for what their documents say besides, in an order that looks random."""
    return sorted(sentence_queries(documents, window), key=lambda query: digest(query.text))[:count]


def sentence_queries(documents: list[Document], window: int) -> Iterator[Query]:
    for number, document in enumerate(documents):
        for place, sentence in enumerate(document.sentences):
            rest = " ".join(document.sentences[place + 1:] + document.sentences[:place]).split()
            if len(normal_form(sentence).split()) in QUERY_WORDS and len(rest) >= MIN_WORDS:
                yield Query(document.name, sentence, number, f"{document.title} : {' '.join(rest[:window])}")


def cut(documents: list[Document], window: int, stride: int) -> Passages:
    """Title and `window` words of each document's text, every `stride` words."""
    texts, first = [], [0]
    for document in documents:
        words = document.body.split()
        for start in range(0, max(1, len(words) - window + stride), stride):
            texts.append(f"{document.title} : {' '.join(words[start:start + window])}")
        first.append(len(texts))
    return Passages(texts, np.array(first))
