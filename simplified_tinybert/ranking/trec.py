"""TREC runs and judgements, and the one rule by which every script puts documents in order.

Run:    query_id Q0 document_id rank score run_tag      six columns, white space between them
Qrels:  query_id 0 document_id grade                    four columns, the grade an integer
"""
import math
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path

import numpy as np

from simplified_tinybert.common.files import Problems, shorten, warn
from simplified_tinybert.common.text import read_lines

RUN_COLUMNS = ("query_id", "Q0", "document_id", "rank", "score", "run_tag")
QRELS_COLUMNS = ("query_id", "0", "document_id", "grade")
GRADES = range(-10 ** 9, 10 ** 4 + 1)   # trec_eval counts by grade: with 100,000, nDCG takes 13 s a query
NO_RANK = -1

# What C's isspace() splits at, and so trec_eval: a no-break space, for one, is part of an id.
_COLUMN = re.compile(r"[^ \t\v\f\r]+")


def rank(scores: Mapping[str, float]) -> list[str]:
    """Documents by descending score in double precision, equal scores by descending id: trec_eval's rule.

    Ids are compared as strings, so that "D9" stands before "D10" in a tie; neither the order of the file nor its rank
    column has a say.
    """
    return sorted(scores, key=lambda document_id: (scores[document_id], document_id), reverse=True)


def float32_ties(scores: Collection[float]) -> int:
    """How many neighbouring pairs of different scores become equal in single precision.

    trec_eval keeps scores as C floats, so it orders such a pair by document id instead of by score.
    """
    different = np.unique(np.fromiter(scores, dtype=np.float64, count=len(scores)))
    with np.errstate(over="ignore"):  # two scores beyond 3.4e38 both become infinite: a tie like any other
        single = different.astype(np.float32)
    return int(np.count_nonzero(single[1:] == single[:-1]))


def sum_in_order(values: Iterable[float]) -> float:
    """Plain left-to-right addition: from Python 3.12 on the built-in sum() compensates and ends in other digits."""
    return reduce(add, values, 0.0)


def split_passage_id(passage_id: str) -> tuple[str, str | None]:
    """Document id and what follows its last "_"; the second is None if there is no "_"."""
    document_id, underscore, suffix = passage_id.rpartition("_")
    return (document_id, suffix) if underscore else (passage_id, None)


def parse_score(text: str) -> float | None:
    """The finite number that `text` stands for, or None; unlike float(), 1_000 is none."""
    try:
        score = float(text)
    except ValueError:
        return None
    if "_" in text or not math.isfinite(score):
        return None
    return score + 0.0  # -0.0 becomes 0.0: the two are equal, so which of them is printed must not depend on the order


def parse_grade(text: str) -> int:
    """Raises ValueError with what was found and expected, unless it is a whole number that trec_eval can hold."""
    if not re.fullmatch(r"[+-]?[0-9]{1,1000}", text):
        raise ValueError(f"grade {shorten(text)} is not a whole number; expected one such as 0 or 2")
    if int(text) not in GRADES:
        raise ValueError(f"grade {shorten(text)} is too large for trec_eval; expected {GRADES.start:,} to "
                         f"{GRADES.stop - 1:,}")
    return int(text)


def split_columns(line: str) -> list[str]:
    """The columns of a line of a run or of qrels."""
    return _COLUMN.findall(line)


def _read_columns(path: Path, names: tuple[str, ...], problems: Problems) -> Iterator[tuple[int, list[str]]]:
    for number, line in read_lines(path, problems):
        columns = split_columns(line)
        if len(columns) == len(names):
            yield number, columns
        else:
            problems.add(f"{path}:{number}: found {len(columns)} columns ({shorten(line)}), "
                         f"expected {len(names)}: {' '.join(names)}")


@dataclass
class RankCheck:
    """Does the rank column of a run tell of another order than the scores, which are what counts?

    `add` takes its lines, `finish` looks at those of a query once all are there. Where the lines of a query have the
    same rank, or a rank that is no number, they tell of no order.
    """
    source: str
    queries: int = 0
    differing: int = 0          # queries whose order is another by rank
    tied: int = 0               # of these, those that differ between equal scores only
    first: str = ""             # what is said of the first of them
    lines: dict[str, tuple[array, array]] = field(default_factory=dict)    # query id → ranks, line numbers

    def add(self, number: int, query_id: str, rank_text: str) -> None:
        ranks, numbers = self.lines.setdefault(query_id, (array("q"), array("q")))
        ranks.append(int(rank_text) if re.fullmatch("[0-9]{1,15}", rank_text) else NO_RANK)
        numbers.append(number)

    def finish(self, query_id: str, scores: Mapping[str, float]) -> None:
        """`scores`: of the query's documents, in the order of their lines."""
        ranks, numbers = self.lines.pop(query_id)
        self.queries += 1
        if NO_RANK in ranks or len(ranks) != len(scores):
            return
        lines = sorted(zip(scores.values(), scores, ranks, numbers), reverse=True)     # the order of `rank`
        wrong = [(upper, lower) for upper, lower in pairwise(lines) if upper[2] > lower[2]]
        if wrong:
            (score, document_id, place, number), (lower_score, lower_id, lower_place, _) = wrong[0]
            self.differing += 1
            self.tied += all(upper[0] == lower[0] for upper, lower in wrong)
            self.first = self.first or (
                f"{self.source}:{number}: query {shorten(query_id)}: document {shorten(document_id)} of rank {place} "
                f"stands before {shorten(lower_id)} of rank {lower_place}, for its score is {score!r}, the other's "
                f"{lower_score!r}")

    def warn(self) -> None:
        """Say in one line how many queries have another order by rank."""
        if self.differing:
            tied = f", in {self.tied} of them only where scores are equal" if self.tied else ""
            warn(f"{self.first}; rank and score disagree in {self.differing} of {self.queries} queries{tied}. The "
                 f"scores count, equal ones by descending document id (trec_eval's rule)")


def read_run(path: Path, problems: Problems) -> dict[str, dict[str, float]]:
    """{query_id: {document_id: score}} in file order; what is wrong with the file is added to `problems`.

    A warning says where the rank column tells of another order than the scores.
    """
    run: dict[str, dict[str, float]] = {}
    ranks, before = RankCheck(str(path)), problems.count
    for number, (query_id, _, document_id, rank_text, text, _) in _read_columns(path, RUN_COLUMNS, problems):
        scores = run.setdefault(query_id, {})
        score = parse_score(text)
        if score is None:
            problems.add(f"{path}:{number}: score {shorten(text)} is not a finite number; expected one such as 0.25")
        elif document_id in scores:
            problems.add(f"{path}:{number}: document {shorten(document_id)} is ranked a second time for query "
                         f"{shorten(query_id)}; each may occur once")
        else:
            scores[document_id] = score
            ranks.add(number, query_id, rank_text)
    if problems.count == before:
        for query_id, scores in run.items():
            ranks.finish(query_id, scores)
        ranks.warn()
    return run


def read_qrels(path: Path, problems: Problems) -> dict[str, dict[str, int]]:
    """{query_id: {document_id: grade}} in file order; what is wrong with the file is added to `problems`."""
    qrels: dict[str, dict[str, int]] = {}
    for number, (query_id, _, document_id, text) in _read_columns(path, QRELS_COLUMNS, problems):
        grades = qrels.setdefault(query_id, {})
        try:
            grade = parse_grade(text)
        except ValueError as error:
            problems.add(f"{path}:{number}: {error}")
            continue
        if document_id in grades:
            problems.add(f"{path}:{number}: document {shorten(document_id)} is judged a second time for query "
                         f"{shorten(query_id)} (grade {grade}, before that {grades[document_id]}); each may occur once")
        else:
            grades[document_id] = grade
    return qrels


def line_of_judgement(path: Path, query_id: str, document_id: str) -> int | None:
    """The line of qrels, as read before, on which a document is judged for a query; None if that cannot be read again.
    """
    if not path.is_file():                              # a pipe
        return None
    return next((number for number, columns in _read_columns(path, QRELS_COLUMNS, Problems())
                 if (columns[0], columns[2]) == (query_id, document_id)), None)
