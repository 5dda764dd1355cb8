"""How the scores of a document's passages become its score: MaxP, FirstP, SumP, AvgP, k-Max&AvgP."""
import argparse
import heapq
import re
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from simplified_tinybert.ranking.trec import sum_in_order


class Aggregation(NamedTuple):
    """How passages become a document: `keep` takes them one at a time, `score` comes at the end.

    keep(kept, score, number) returns what has to be remembered of the document (kept is None at its first passage;
    number is that of the passage, for FirstP only); score(kept) returns the score of the document.
    """
    name: str
    keep: Callable[[Any, float, int | None], Any]
    score: Callable[[Any], float]


def keep_best(kept: float | None, score: float, number: int | None) -> float:
    return score if kept is None else max(kept, score)


def keep_first(kept: tuple[int, float] | None, score: float, number: int) -> tuple[int, float]:
    # Two passages with the same number (D1_0 and D1_p-0): the better one, so that their order does not matter.
    if kept is None or (number, -score) < (kept[0], -kept[1]):
        return number, score
    return kept


def keep_all(kept: array | None, score: float, number: int | None) -> array:
    kept = array("d") if kept is None else kept
    kept.append(score)
    return kept


def keep_k_best(k: int) -> Callable[[list[float] | None, float, int | None], list[float]]:
    def keep(kept: list[float] | None, score: float, number: int | None) -> list[float]:
        if kept is None:
            return [score]
        if len(kept) < k:
            heapq.heappush(kept, score)
        else:
            heapq.heappushpop(kept, score)  # a heap: kept[0] is the worst of the k best
        return kept
    return keep


# np.sum adds more than eight numbers in several partial sums, and so did the original: its last digits are part of the
# result. The k best it added one after the other, from the best down.
MAX_P = Aggregation("MaxP", keep_best, lambda kept: kept)
FIRST_P = Aggregation("FirstP", keep_first, lambda kept: kept[1])
SUM_P = Aggregation("SumP", keep_all, lambda kept: float(np.sum(kept)))
AVG_P = Aggregation("AvgP", keep_all, lambda kept: float(np.sum(kept) / len(kept)))


def k_max_avg_p(k: int) -> Aggregation:
    def mean(kept: list[float]) -> float:
        return sum_in_order(sorted(kept, reverse=True)) / len(kept)
    return Aggregation(f"{k}-Max&AvgP", keep_k_best(k), mean)


def aggregation(name: str) -> Aggregation:
    for known in (MAX_P, FIRST_P, SUM_P, AVG_P):
        if name == known.name:
            return known
    if match := re.fullmatch(r"0*([1-9][0-9]*)-Max(?:&|_and_)AvgP", name):
        return k_max_avg_p(int(match[1]))
    raise argparse.ArgumentTypeError(f"{name!r} is none of MaxP, FirstP, SumP, AvgP, k-Max&AvgP with k = 1, 2, 3 ... "
                                     f"(in quotes, such as '2-Max&AvgP', or written 2-Max_and_AvgP)")
