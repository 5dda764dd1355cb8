"""Aggregate the scores of a document's passages into its score: MaxP, FirstP, SumP, AvgP, k-Max&AvgP."""
import heapq
import re
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from simplified_tinybert.ranking.trec import sum_in_order


class Aggregation(NamedTuple):
    """An aggregation that reads one passage at a time.

    update(state, score, number) returns the new state of a document, which starts as None. Only FirstP uses `number`,
    the number of the passage. score(state) returns the document's score.
    """
    name: str
    update: Callable[[Any, float, int | None], Any]
    score: Callable[[Any], float]


def keep_best(best: float | None, score: float, number: int | None) -> float:
    return score if best is None else max(best, score)


def keep_first(first: tuple[int, float] | None, score: float, number: int) -> tuple[int, float]:
    # D1_0 and D1_p-0 have the same number. The better score wins, so that the order of the lines does not matter.
    return (number, -score) if first is None else min(first, (number, -score))


def keep_all(scores: array | None, score: float, number: int | None) -> array:
    scores = array("d") if scores is None else scores
    scores.append(score)
    return scores


def k_max_avg_p(k: int) -> Aggregation:
    def update(heap: list[float] | None, score: float, number: int | None) -> list[float]:
        heap = heap or []
        push = heapq.heappush if len(heap) < k else heapq.heappushpop
        push(heap, score)
        return heap

    # The original adds the k best scores in descending order. The order affects the last digits.
    return Aggregation(f"{k}-Max&AvgP", update, lambda heap: sum_in_order(sorted(heap, reverse=True)) / len(heap))


# The original adds with np.sum, whose pairwise summation affects the last digits.
MAX_P = Aggregation("MaxP", keep_best, lambda best: best)
FIRST_P = Aggregation("FirstP", keep_first, lambda first: -first[1])
SUM_P = Aggregation("SumP", keep_all, lambda scores: float(np.sum(scores)))
AVG_P = Aggregation("AvgP", keep_all, lambda scores: float(np.sum(scores) / len(scores)))

NAMES = "MaxP, FirstP, SumP, AvgP or k-Max&AvgP with k = 1, 2, 3, ... (in quotes, or spelled 2-Max_and_AvgP)"


def find_aggregation(name: str) -> Aggregation | None:
    if match := re.fullmatch(r"0*([1-9][0-9]*)-Max(?:&|_and_)AvgP", name):
        return k_max_avg_p(int(match[1]))
    return next((known for known in (MAX_P, FIRST_P, SUM_P, AVG_P) if known.name == name), None)
