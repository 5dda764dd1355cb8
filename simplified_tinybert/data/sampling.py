"""Sample training passages: positives from a query's relevant documents, negatives from its other candidates."""
import hashlib
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import NamedTuple, TypeVar

import numpy as np

from simplified_tinybert.common.files import Problems
from simplified_tinybert.data.collection import Collection
from simplified_tinybert.data.passages import PassageSource, SkippedLog

Item = TypeVar("Item")
Scores = Callable[[list[tuple[str, str]]], np.ndarray]                  # (query, passage) pairs → probabilities (N)


class Sampling(NamedTuple):
    """Flags of prepare_examples.py."""
    relevance_level: int
    negatives: float                                                    # per positive passage
    positive_passages: int | None                                       # per document; None: all
    filter_threshold: float
    retrieved_positives: bool                                           # only relevant documents that are candidates
    seed: int


class TrainingQuery(NamedTuple):
    """A training query with the passages that positives and negatives are drawn from."""
    query_id: str
    text: str
    relevant: list[tuple[str, list[str]]]                               # relevant document ids with their passages
    sources: list[tuple[str, list[str]]]                                # the subset of `relevant` used for positives
    others: list[str]                                                   # ids of candidates that are not relevant


def relevant_documents(collection: Collection, query_id: str, level: int) -> list[str]:
    return [document_id for document_id, grade in collection.grades.get(query_id, {}).items() if grade >= level]


def training_queries(collection: Collection, chosen: set[str], sampling: Sampling,
                     passages: PassageSource) -> Iterator[TrainingQuery]:
    """Yield the `chosen` queries in the order of the candidates. Unusable queries are logged."""
    for query_id, ranked in collection.candidates(Problems()):
        if not collection.queries.get(query_id):
            passages.skipped.add("query_without_text", query_id)
        elif not (relevant := relevant_documents(collection, query_id, sampling.relevance_level)):
            passages.skipped.add("query_without_relevant_document", query_id)
        elif query_id in chosen:
            documents = [(document_id, found) for document_id in relevant
                         if (found := passages.get(query_id, document_id))]
            grades = collection.grades[query_id]
            others = [document_id for document_id in ranked if grades.get(document_id, 0) <= 0]
            allowed = set(ranked if sampling.retrieved_positives else relevant)
            sources = [(document_id, found) for document_id, found in documents if document_id in allowed]
            yield TrainingQuery(query_id, collection.queries[query_id], documents, sources, others)


def positives(group: list[TrainingQuery], sampling: Sampling, scores_of: Scores | None,
              skipped: SkippedLog) -> Iterator[list[str]]:
    """Yield the passages of label 1 of each query."""
    pairs = [(query.text, passage) for query in group for _, found in query.sources for passage in found]
    scores, start, limit = scores_of(pairs) if scores_of and pairs else None, 0, sampling.positive_passages
    for query in group:
        kept = []
        for document_id, found in query.sources:
            if scores is None:
                random = random_for(sampling.seed, "positives", query.query_id, document_id)
                best = found if limit is None else shuffled(found, random)[:limit]
            else:
                best = best_passages(found, scores[start:start + len(found)], limit, sampling.filter_threshold)
                if not best:
                    skipped.add("document_below_threshold", query.query_id, document_id)
            start += len(found)
            kept += best
        yield kept


def negatives(query: TrainingQuery, kept: int, sampling: Sampling, passages: PassageSource) -> tuple[list[str], int]:
    """Return passages of label 0 for `kept` passages of label 1, and the number of passages that was requested."""
    random = random_for(sampling.seed, "negatives", query.query_id)
    requested = round_randomly(sampling.negatives * kept, random)
    relevant = {passage for _, found in query.relevant for passage in found}

    def not_relevant(document_id: str) -> list[str]:
        return [passage for passage in passages.get(query.query_id, document_id) if passage not in relevant]

    return draw_passages(query.others, requested, not_relevant, random), requested


def random_for(seed: int, purpose: str, *ids: str) -> Random:
    """Return a generator that depends only on seed, purpose and ids, not on the order of the queries."""
    return Random("\t".join((str(seed), purpose, *ids)))


def shuffled(items: Iterable[Item], random: Random) -> list[Item]:
    # random() gives the same numbers in every Python version; shuffle() may not.
    return [item for _, _, item in sorted((random.random(), number, item) for number, item in enumerate(items))]


def draw_queries(query_ids: Iterable[str], count: int, seed: int) -> set[str]:
    """Draw at most `count` queries. The choice depends only on ids and seed, not on the order."""
    def key(query_id: str) -> bytes:
        return hashlib.blake2b(f"{seed}\t{query_id}".encode(), digest_size=16).digest()
    return set(sorted(query_ids, key=key)[:count])


def draw_passages(document_ids: Iterable[str], count: int, passages_of: Callable[[str], list[str]],
                  random: Random) -> list[str]:
    """Draw at most `count` passages: one of each document in random order, then a second one of each, and so on.

    Only as many documents as needed are looked up.
    """
    drawn, remaining = [], []
    for document_id in shuffled(document_ids, random):
        if len(drawn) == count:
            return drawn
        if passages := shuffled(passages_of(document_id), random):
            drawn.append(passages.pop())
            remaining.append(passages)
    while len(drawn) < count and (remaining := [passages for passages in remaining if passages]):
        drawn.extend(passages.pop() for passages in remaining[:count - len(drawn)])
    return drawn


def round_randomly(value: float, random: Random) -> int:
    """Round up or down at random, so that the mean is `value`: 1.25 becomes 2 with probability 0.25, else 1."""
    return int(value) + (random.random() < value % 1)


def best_passages(passages: list[str], scores: np.ndarray, limit: int | None, threshold: float) -> list[str]:
    """Return the passages with scores of at least `threshold`, best first, at most `limit`; ties in input order."""
    order = np.argsort(-scores, kind="stable")[:limit].tolist()
    return [passages[index] for index in order if scores[index] >= threshold]
