"""Combine a ranker's scores with those of the first stage, such as BM25.

First, the scores of each ranking are scaled for each query, to mean 0 and standard deviation 1 (all 0 if they are
equal). A document that is missing from one ranking gets the lowest score there. The new score is
(1 - weight) · ranker + weight · first stage.
"""
import statistics
from collections.abc import Mapping

from simplified_tinybert.common.files import Problems
from simplified_tinybert.ranking.measures import evaluate, parse_measures
from simplified_tinybert.ranking.trec import Qrels, Run

WEIGHTS = [step / 20 for step in range(21)]             # that are tried on dev queries


def interpolate(ranker: Mapping[str, float], first_stage: Mapping[str, float], weight: float) -> dict[str, float]:
    """Return the scores of all documents of a query."""
    return weighted(scaled(ranker), scaled(first_stage), weight)


def weighted(one: Mapping[str, float], two: Mapping[str, float], weight: float) -> dict[str, float]:
    """Interpolate scaled scores."""
    lowest = [min(side.values(), default=0.0) for side in (one, two)]
    return {document_id: (1.0 - weight) * one.get(document_id, lowest[0]) + weight * two.get(document_id, lowest[1])
            for document_id in {**one, **two}}


def scaled(scores: Mapping[str, float]) -> dict[str, float]:
    """Bring a query's scores to mean 0 and standard deviation 1."""
    if not scores:
        return {}
    if max(map(abs, scores.values())) > 1e100:          # sums and squares would overflow; a power of 2 changes no digit
        scores = {document_id: score * 2.0 ** -700 for document_id, score in scores.items()}
    mean, deviation = statistics.fmean(scores.values()), statistics.pstdev(scores.values())
    return {document_id: (score - mean) / deviation if deviation else 0.0 for document_id, score in scores.items()}


def interpolate_run(ranker: Run, first_stage: Run, weight: float) -> Run:
    """Interpolate each query of the ranker's run."""
    return {query_id: interpolate(scores, first_stage.get(query_id, {}), weight) for query_id, scores in ranker.items()}


def values_by_weight(ranker: Run, first_stage: Run, qrels: Qrels) -> dict[float, float]:
    """Return nDCG@10 over the judged queries for each of WEIGHTS."""
    measures, values = parse_measures(["nDCG@10"], 1, Problems()), {}
    sides = {query_id: (scaled(scores), scaled(first_stage.get(query_id, {})))
             for query_id, scores in ranker.items() if query_id in qrels}
    for weight in WEIGHTS:
        run = {query_id: weighted(one, two, weight) for query_id, (one, two) in sides.items()}
        values[weight] = evaluate(qrels, run, measures, level=1, complete=False).results["nDCG@10"].average
    return values


def best_weight(values: Mapping[float, float]) -> float:
    """Return the weight with the highest value; of equal ones, the one nearest to the ranker alone."""
    return max(values, key=lambda weight: (values[weight], -weight))


def count_missing(ranker: Run, first_stage: Run) -> tuple[int, int]:
    """Return how many documents the ranker lacks, and how many the first stage lacks."""
    pairs = [(ranker[query_id].keys(), first_stage.get(query_id, {}).keys()) for query_id in ranker]
    return sum(len(two - one) for one, two in pairs), sum(len(one - two) for one, two in pairs)
