"""TREC runs and judgements, and the one rule by which every script puts documents in order.

Run:    query_id Q0 document_id rank score run_tag      six columns, white space between them
Qrels:  query_id 0 document_id grade                    four columns, the grade an integer
"""
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np

from simplified_tinybert.files import Problems, read_lines, shorten

RUN_COLUMNS = ("query_id", "Q0", "document_id", "rank", "score", "run_tag")
QRELS_COLUMNS = ("query_id", "0", "document_id", "grade")

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


def _parse_grade(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,9}", text) else None


def _read_columns(path: Path, names: tuple[str, ...], problems: Problems) -> Iterator[tuple[int, list[str]]]:
    for number, line in read_lines(path, problems):
        columns = _COLUMN.findall(line)
        if len(columns) == len(names):
            yield number, columns
        else:
            problems.add(f"{path}:{number}: found {len(columns)} columns ({shorten(line)}), "
                         f"expected {len(names)}: {' '.join(names)}")


def read_run(path: Path, problems: Problems) -> dict[str, dict[str, float]]:
    """{query_id: {document_id: score}} in file order; what is wrong with the file is added to `problems`."""
    run: dict[str, dict[str, float]] = {}
    for number, (query_id, _, document_id, _, text, _) in _read_columns(path, RUN_COLUMNS, problems):
        scores = run.setdefault(query_id, {})
        score = parse_score(text)
        if score is None:
            problems.add(f"{path}:{number}: score {shorten(text)} is not a finite number; expected one such as 0.25")
        elif document_id in scores:
            problems.add(f"{path}:{number}: document {shorten(document_id)} is ranked a second time for query "
                         f"{shorten(query_id)}; each may occur once")
        else:
            scores[document_id] = score
    return run


def read_qrels(path: Path, problems: Problems) -> dict[str, dict[str, int]]:
    """{query_id: {document_id: grade}} in file order; what is wrong with the file is added to `problems`."""
    qrels: dict[str, dict[str, int]] = {}
    for number, (query_id, _, document_id, text) in _read_columns(path, QRELS_COLUMNS, problems):
        grades = qrels.setdefault(query_id, {})
        grade = _parse_grade(text)
        if grade is None:
            problems.add(f"{path}:{number}: grade {shorten(text)} is not a whole number; expected one such as 0 or 2")
        elif document_id in grades:
            problems.add(f"{path}:{number}: document {shorten(document_id)} is judged a second time for query "
                         f"{shorten(query_id)} (grade {grade}, before that {grades[document_id]}); each may occur once")
        else:
            grades[document_id] = grade
    return qrels
