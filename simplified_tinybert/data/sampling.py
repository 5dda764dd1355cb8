"""Which passages a query's training examples are made of: of its relevant documents, and of its other candidates."""
import hashlib
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import NamedTuple, TypeVar

import numpy as np

from simplified_tinybert.common.files import Problems
from simplified_tinybert.data.collection import Collection
from simplified_tinybert.data.passages import PassageSource, SkippedLog

GROUP = 8192                    # passages that are scored together: as many as a chunk of features has
Item = TypeVar("Item")
Scores = Callable[[list[tuple[str, str]]], np.ndarray]                  # (query, passage) pairs → probabilities (N)


class Sampling(NamedTuple):
    """What examples are to be like; the fields are flags of prepare_examples.py."""
    relevance_level: int
    negatives: float                                                    # for each positive passage
    positive_passages: int | None                                       # of a document; None: all
    filter_threshold: float
    retrieved_positives: bool                                           # only relevant documents that are candidates
    seed: int


class TrainingQuery(NamedTuple):
    """A training query with all that examples can be made of."""
    query_id: str
    text: str
    relevant: list[tuple[str, list[str]]]                               # relevant documents with their passages
    sources: list[tuple[str, list[str]]]                                # those of them that label 1 is taken from
    others: list[str]                                                   # ids of candidates that are not relevant


def can_be_used(collection: Collection, query_id: str, level: int) -> bool:
    """Whether a query has a text and a relevant document."""
    return bool(collection.queries.get(query_id)) and bool(relevant_documents(collection, query_id, level))


def relevant_documents(collection: Collection, query_id: str, level: int) -> list[str]:
    return [document_id for document_id, grade in collection.grades.get(query_id, {}).items() if grade >= level]


def training_queries(collection: Collection, chosen: set[str], sampling: Sampling,
                     passages: PassageSource) -> Iterator[TrainingQuery]:
    """The `chosen` queries, in the order of the candidates."""
    for query_id, ranked in collection.candidates(Problems()):
        if not collection.queries.get(query_id):
            passages.skipped.add("query_without_text", query_id)
        elif not (relevant := relevant_documents(collection, query_id, sampling.relevance_level)):
            passages.skipped.add("query_without_relevant_document", query_id)
        elif query_id in chosen:
            cut_up = [(document_id, found) for document_id in relevant
                      if (found := passages.get(query_id, document_id))]
            grades = collection.grades[query_id]
            others = [document_id for document_id in ranked if grades.get(document_id, 0) <= 0]
            retrieved = set(ranked) if sampling.retrieved_positives else set(relevant)
            sources = [(document_id, found) for document_id, found in cut_up if document_id in retrieved]
            yield TrainingQuery(query_id, collection.queries[query_id], cut_up, sources, others)


def in_groups(stream: Iterable[TrainingQuery]) -> Iterator[list[TrainingQuery]]:
    """The queries in groups that have about GROUP passages to be scored."""
    group, passages = [], 0
    for query in stream:
        group.append(query)
        passages += sum(len(found) for _, found in query.sources)
        if passages >= GROUP:
            yield group
            group, passages = [], 0
    if group:
        yield group


def positives(group: list[TrainingQuery], sampling: Sampling, scores_of: Scores | None,
              skipped: SkippedLog) -> Iterator[list[str]]:
    """The passages of label 1 of each query."""
    pairs = [(query.text, passage) for query in group for _, found in query.sources for passage in found]
    scores, position = scores_of(pairs) if scores_of and pairs else None, 0
    for query in group:
        kept = []
        for document_id, found in query.sources:
            if scores is None:
                random = random_for(sampling.seed, "positives", query.query_id, document_id)
                most = sampling.positive_passages
                best = found if most is None else shuffled(found, random)[:most]
            else:
                mine = scores[position:position + len(found)]
                best = best_passages(found, mine, sampling.positive_passages, sampling.filter_threshold)
                if not best:
                    skipped.add("document_below_threshold", query.query_id, document_id)
            position += len(found)
            kept += best
        yield kept


def negatives(query: TrainingQuery, kept: int, sampling: Sampling, passages: PassageSource) -> tuple[list[str], int]:
    """The passages of label 0 for `kept` ones of label 1, and how many there should be."""
    random = random_for(sampling.seed, "negatives", query.query_id)
    wanted = whole_number(sampling.negatives * kept, random)
    relevant = {passage for _, found in query.relevant for passage in found}

    def not_relevant(document_id: str) -> list[str]:
        return [passage for passage in passages.get(query.query_id, document_id) if passage not in relevant]

    return draw_passages(query.others, wanted, not_relevant, random), wanted


def random_for(seed: int, purpose: str, *ids: str) -> Random:
    """Random numbers of one query, or of one of its documents: they depend on nothing else, nor on any order."""
    return Random("\t".join((str(seed), purpose, *ids)))


def shuffled(items: Iterable[Item], random: Random) -> list[Item]:
    # By Random.random() alone, whose numbers are the same in every version of Python; shuffle()'s need not be.
    return [item for _, _, item in sorted((random.random(), number, item) for number, item in enumerate(items))]


def draw_queries(query_ids: Iterable[str], count: int, seed: int) -> set[str]:
    """`count` of the queries (all if there are no more); which ones depends on ids and seed alone, not on the order."""
    def lot(query_id: str) -> bytes:
        return hashlib.blake2b(f"{seed}\t{query_id}".encode(), digest_size=16).digest()
    return set(sorted(query_ids, key=lot)[:count])


def draw_passages(document_ids: Iterable[str], count: int, passages_of: Callable[[str], list[str]],
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
