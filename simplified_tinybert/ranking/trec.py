"""Read TREC runs and relevance judgements (qrels), and rank documents by trec_eval's rule.

Run:    query_id Q0 document_id rank score run_tag      columns separated by white space
Qrels:  query_id 0 document_id grade                    the grade is an integer
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

from simplified_tinybert.common.files import Problems, check_input_file, shorten, warn
from simplified_tinybert.common.text import read_lines

RUN_COLUMNS = ("query_id", "Q0", "document_id", "rank", "score", "run_tag")
QRELS_COLUMNS = ("query_id", "0", "document_id", "grade")
GRADES = range(-10 ** 9, 10 ** 4 + 1)   # trec_eval counts documents by grade: at 100,000, nDCG takes 13 s per query
NO_RANK = -1

Qrels = dict[str, dict[str, int]]  # query id → document id → grade
Run = dict[str, dict[str, float]]  # query id → document id → score


def rank(scores: Mapping[str, float]) -> list[str]:
    """Sort documents by descending score in double precision and equal scores by descending id, as trec_eval does.

    Ids are compared as strings: "D9" ranks above "D10". The order of the lines and the rank column are ignored.
    """
    return sorted(scores, key=lambda document_id: (scores[document_id], document_id), reverse=True)


def float32_ties(scores: Collection[float]) -> int:
    """Count the neighbouring pairs of different scores that become equal in single precision."""
    different = np.unique(np.fromiter(scores, dtype=np.float64, count=len(scores)))
    with np.errstate(over="ignore"):    # scores beyond 3.4e38 all become infinite, and tie
        single = different.astype(np.float32)
    return int(np.count_nonzero(single[1:] == single[:-1]))


def warn_of_float32_ties(ties: int, source: str = "") -> None:
    """Warn if trec_eval, which stores scores as C floats, would order `ties` pairs by id instead of by score."""
    if ties:
        warn(f"{source}{ties} pair(s) of different scores are equal in single precision; trec_eval orders them by "
             f"document id, and its results may differ. Scores from reranker.py --score log_odds lie further apart")


def sum_in_order(values: Iterable[float]) -> float:
    """Add from left to right. From Python 3.12 on, sum() compensates rounding, which gives different last digits."""
    return reduce(add, values, 0.0)


def split_passage_id(passage_id: str) -> tuple[str, str | None]:
    """Split at the last "_" into document id and suffix; without a "_" the suffix is None."""
    document_id, underscore, suffix = passage_id.rpartition("_")
    return (document_id, suffix) if underscore else (passage_id, None)


def parse_score(text: str) -> float:
    """Return the score, or NaN unless it is a finite number of ASCII digits without underscores."""
    try:
        score = float(text)
    except ValueError:
        return math.nan
    if "_" in text or not text.isascii() or not math.isfinite(score):
        return math.nan
    return score + 0.0  # -0.0 becomes 0.0, so that the printed score does not depend on the order of the lines


def parse_grade(text: str) -> int:
    """Raises ValueError with the reason unless the text is an integer that trec_eval can hold."""
    if not re.fullmatch(r"[+-]?[0-9]{1,1000}", text):
        raise ValueError(f"grade {shorten(text)}: expected an integer, for example 2")
    if int(text) not in GRADES:
        raise ValueError(f"grade {shorten(text)} is too large for trec_eval; expected {GRADES.start:,} to "
                         f"{GRADES.stop - 1:,}")
    return int(text)


def split_columns(line: str) -> list[str]:
    """Split at the white space of C's isspace(), as trec_eval does. A no-break space is part of an id."""
    return re.findall(r"[^ \t\v\f\r]+", line)


def read_columns(path: Path, problems: Problems, *layouts: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, columns). All lines must have the layout of the first one, which is one of `layouts`."""
    names: tuple[str, ...] = ()
    for number, line in read_lines(path, problems):
        columns = split_columns(line)
        names = names or next((layout for layout in layouts if len(layout) == len(columns)), layouts[0])
        if "\0" in line:                                # trec_eval would cut ids off there
            problems.add(f"{path}:{number}: holds a NUL byte ({shorten(line)}); remove it")
        elif len(columns) == len(names):
            yield number, columns
        else:
            others = "".join(f" (or in every line {' '.join(layout)})" for layout in layouts[1:] if names != layout)
            problems.add(f"{path}:{number}: found {len(columns)} columns ({shorten(line)}); "
                         f"expected {len(names)}: {' '.join(names)}{others}")


@dataclass
class RankCheck:
    """Check whether a run's rank column agrees with its scores. The scores decide the order.

    Call `add` for each line, `finish` for each query after the last line, then `warn`. Queries are skipped if a rank is
    not a number or if all ranks are equal.
    """
    source: str
    queries: int = 0
    differing: int = 0          # queries whose order by rank is different
    tied: int = 0               # those of them with differences only between equal scores
    first: str = ""             # description of the first difference
    lines: dict[str, tuple[array, array]] = field(default_factory=dict)    # query id → ranks, line numbers

    def add(self, number: int, query_id: str, rank_text: str) -> None:
        ranks, numbers = self.lines.setdefault(query_id, (array("q"), array("q")))
        ranks.append(int(rank_text) if re.fullmatch("[0-9]{1,15}", rank_text) else NO_RANK)
        numbers.append(number)

    def finish(self, query_id: str, scores: Mapping[str, float]) -> None:
        """Check a query. `scores` holds its documents in the order of their lines."""
        ranks, numbers = self.lines.pop(query_id)
        self.queries += 1
        if NO_RANK in ranks or len(ranks) != len(scores):
            return
        lines = sorted(zip(scores.values(), scores, ranks, numbers), reverse=True)     # the order of `rank`
        wrong = [(upper, lower) for upper, lower in pairwise(lines) if upper[2] > lower[2]]
        if wrong:
            (score, document_id, upper_rank, number), (lower_score, lower_id, lower_rank, _) = wrong[0]
            self.differing += 1
            self.tied += all(upper[0] == lower[0] for upper, lower in wrong)
            self.first = self.first or (
                f"{self.source}:{number}: query {shorten(query_id)}: document {shorten(document_id)} has rank "
                f"{upper_rank} and score {score!r}, document {shorten(lower_id)} has rank {lower_rank} and score "
                f"{lower_score!r}")

    def warn(self) -> None:
        if self.differing:
            tied = f", in {self.tied} of them only between equal scores" if self.tied else ""
            warn(f"{self.first}; rank and score disagree in {self.differing} of {self.queries} queries{tied}. "
                 f"Documents are sorted by score, equal scores by descending document id (trec_eval's rule)")


def read_run(path: Path, problems: Problems) -> Run:
    """Read a run in file order; warn if its ranks contradict its scores. Input errors are added to `problems`."""
    run, ranks, before = {}, RankCheck(str(path)), problems.count
    for number, (query_id, _, document_id, rank_text, text, _) in read_columns(path, problems, RUN_COLUMNS):
        scores = run.setdefault(query_id, {})
        score = parse_score(text)
        if math.isnan(score):
            problems.add(f"{path}:{number}: score {shorten(text)}: expected a finite number, for example 0.25")
        elif document_id in scores:
            problems.add(f"{path}:{number}: document {shorten(document_id)} is a duplicate for query "
                         f"{shorten(query_id)}; remove one")
        else:
            scores[document_id] = score
            ranks.add(number, query_id, rank_text)
    if problems.count == before:
        for query_id, scores in run.items():
            ranks.finish(query_id, scores)
        ranks.warn()
    return run


def read_qrels(path: Path, problems: Problems) -> Qrels:
    """Read judgements in file order. Input errors are added to `problems`."""
    qrels: Qrels = {}
    for number, (query_id, _, document_id, text) in read_columns(path, problems, QRELS_COLUMNS):
        grades = qrels.setdefault(query_id, {})
        try:
            grade = parse_grade(text)
        except ValueError as error:
            problems.add(f"{path}:{number}: {error}")
            continue
        if document_id in grades:
            problems.add(f"{path}:{number}: document {shorten(document_id)} is a duplicate for query "
                         f"{shorten(query_id)} (grade {grade}, first {grades[document_id]}); remove one")
        else:
            grades[document_id] = grade
    return qrels


def read_runs(qrels_path: Path, run_paths: Iterable[Path], problems: Problems) -> tuple[Qrels, dict[Path, Run]]:
    """Read judgements and runs, and check that they share queries. Input errors are added to `problems`."""
    qrels, runs, before = {}, {}, problems.count
    if check_input_file(qrels_path, problems, "relevance judgements"):
        qrels = read_qrels(qrels_path, problems)
    for path in dict.fromkeys(run_paths):
        if check_input_file(path, problems, "run"):
            runs[path] = read_run(path, problems)
    if problems.count == before:
        check_common_queries(qrels_path, qrels, runs, problems)
    return qrels, runs


def check_common_queries(qrels_path: Path, qrels: Qrels, runs: dict[Path, Run], problems: Problems) -> None:
    """Check that no file is empty and that each run has a judged query. Input errors are added to `problems`."""
    for path, content in ((qrels_path, qrels), *runs.items()):
        if not content:
            problems.add(f"{path}: is empty; there is nothing to evaluate")
    for path, run in runs.items():
        if qrels and run and not qrels.keys() & run.keys():
            problems.add(f"{path}: none of its queries ({first_ten(run)}) is judged in {qrels_path} "
                         f"({first_ten(qrels)}); do the two files belong together?")


def check_relevant(qrels_path: Path, qrels: Qrels, queries: Collection[str], problems: Problems) -> None:
    """Check that a query has a relevant document. Without one, all measures are 0 and choose nothing."""
    judged = [qrels[query_id] for query_id in queries if query_id in qrels]
    if judged and not any(grade >= 1 for grades in judged for grade in grades.values()):
        problems.add(f"{qrels_path}: has no document with a grade of 1 or more for any of the queries, so all measures "
                     f"are 0; expected judgements with relevant documents")


def first_ten(ids: Collection[str]) -> str:
    return ", ".join(list(ids)[:10]) + (", ..." if len(ids) > 10 else "")


def line_of_judgement(path: Path, query_id: str, document_id: str) -> int | None:
    """Find the line of a judgement by reading the qrels again; None for a pipe."""
    if not path.is_file():
        return None
    return next((number for number, columns in read_columns(path, Problems(), QRELS_COLUMNS)
                 if (columns[0], columns[2]) == (query_id, document_id)), None)
