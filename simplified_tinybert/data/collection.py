"""Queries, judgements, candidates and documents, from files or from an ir_datasets dataset."""
import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from simplified_tinybert.common.files import Problems, shorten
from simplified_tinybert.common.text import read_lines
from simplified_tinybert.data.documents import Document, open_documents
from simplified_tinybert.ranking.trec import RUN_COLUMNS, RankCheck, parse_score, rank, read_columns, read_qrels

FLAGS = {"docs": "--docs", "queries": "--queries", "qrels": "--qrels", "scoreddocs": "--candidates"}
SHORT_RUN_COLUMNS = ("query_id", "document_id", "rank")                 # MS MARCO's format
Row = tuple[int, str, str, float, str]              # line, query id, document id, score, rank of a TREC run or ""


class Documents(Protocol):
    def get(self, document_id: str) -> Document | None: ...


@dataclass
class Collection:
    """The inputs that examples are made from. Each call of `candidates(problems)` reads the candidates again, by query.

    `check_ranks=True` warns if the rank column contradicts the scores.
    """
    queries: dict[str, str]                                             # query id → text without tabs and line ends
    grades: dict[str, dict[str, int]]                                   # query id → document id → grade
    candidates: Callable[..., Iterator[tuple[str, list[str]]]]          # (query id, document ids by rank)
    documents: Documents


def open_collection(args: argparse.Namespace, dataset: Documents | None, problems: Problems) -> Collection:
    """Open the inputs that the flags name; a file replaces the corresponding part of --dataset.

    Input errors are added to `problems`. Candidates are checked only when they are read.
    """
    queries = read_queries(args.queries, problems) if args.queries else dataset.queries(problems)
    grades = {}
    if args.qrels:
        grades = read_qrels(args.qrels, problems)
    elif args.set_name == "train":
        grades = dataset.grades(problems)

    def candidates(problems: Problems, check_ranks: bool = False) -> Iterator[tuple[str, list[str]]]:
        rows = read_rows(args.candidates, problems) if args.candidates else dataset.candidates()
        source = str(args.candidates or f"--dataset {args.dataset}, candidate")
        return by_query(rows, source, args.depth, problems, check_ranks)

    documents = open_documents(args.docs, args.cache_file_dir, problems) if args.docs else dataset
    return Collection(queries, grades, candidates, documents)


def read_queries(path: Path, problems: Problems) -> dict[str, str]:
    """Return {query id: text}, white space reduced to single spaces. Empty texts are kept."""
    queries, lines, before = {}, {}, problems.count
    for number, line in read_lines(path, problems):
        query_id, tab, text = line.partition("\t")
        if not tab or "\t" in text:
            problems.add(f"{path}:{number}: found {line.count(chr(9)) + 1} tab-separated columns ({shorten(line)}); "
                         f"expected query_id, query")
        elif query_id in queries:
            problems.add(f"{path}:{number}: query {shorten(query_id)} is a duplicate of line {lines[query_id]}; "
                         f"remove one")
        else:
            if error := query_id_error(query_id):
                problems.add(f"{path}:{number}: {error}")
            queries[query_id], lines[query_id] = " ".join(text.split()), number
    if not queries and problems.count == before:
        problems.add(f"{path}: contains no queries; expected one per line: query_id, query")
    return queries


def query_id_error(query_id: str) -> str | None:
    if query_id.split() == [query_id] and "#" not in query_id:
        return None
    return (f"found query id {shorten(query_id)}; expected an id without white space and without '#', which separates "
            f"query and passage in the ids of pairs")


def read_rows(path: Path, problems: Problems) -> Iterator[Row]:
    """Yield the lines of a TREC run, or of a file of SHORT_RUN_COLUMNS with the negated rank as score."""
    for number, columns in read_columns(path, problems, RUN_COLUMNS, SHORT_RUN_COLUMNS):
        short = len(columns) == len(SHORT_RUN_COLUMNS)
        name, text = ("rank", columns[2]) if short else ("score", columns[4])
        score = parse_score(text)
        if math.isnan(score):
            problems.add(f"{path}:{number}: {name} {shorten(text)} is not a finite number; is this a header line? Then "
                         f"remove it")
        elif short and (score < 0 or score != int(score)):
            problems.add(f"{path}:{number}: rank {shorten(text)} is not an integer of 0 or more; if it is a score, "
                         f"write a TREC run: {' '.join(RUN_COLUMNS)}")
        elif short:
            yield number, *columns[:2], -score, ""
        else:
            yield number, columns[0], columns[2], score, columns[3]


def by_query(rows: Iterable[Row], source: str, depth: int | None, problems: Problems,
             check_ranks: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yield (query id, ids of its `depth` best documents in the order of `trec.rank`).

    The rows of a query must be contiguous, because memory holds all query ids but the documents of only one query.
    With `check_ranks`, warn if the ranks of a TREC run contradict the scores.
    """
    first_lines, ranks, before = {}, RankCheck(source), problems.count
    for query_id, query_rows in groupby(rows, itemgetter(1)):
        scores = {}
        for number, _, document_id, score, rank_text in query_rows:
            if not scores:
                if error := query_id_error(query_id):
                    problems.add(f"{source}:{number}: {error}")
                if query_id in first_lines:
                    problems.add(f"{source}:{number}: query {shorten(query_id)} also starts in line "
                                 f"{first_lines[query_id]}; the lines of a query must be contiguous. "
                                 f"{sort_hint(source)}")
                first_lines.setdefault(query_id, number)
            if not math.isfinite(score):
                problems.add(f"{source}:{number}: the score of document {shorten(document_id)} for query "
                             f"{shorten(query_id)} is not a finite number")
            if document_id in scores:
                problems.add(f"{source}:{number}: document {shorten(document_id)} is a duplicate for query "
                             f"{shorten(query_id)}; remove one")
            elif document_id.split() != [document_id]:
                problems.add(f"{source}:{number}: found document id {shorten(document_id)}; expected an id without "
                             f"white space")
            scores[document_id] = score
            if check_ranks:
                ranks.add(number, query_id, rank_text)
        if check_ranks:
            ranks.finish(query_id, scores)
        yield query_id, rank(scores)[:depth]
    if not first_lines and problems.count == before:
        problems.add(f"{source}: contains no candidates; expected lines of {' '.join(RUN_COLUMNS)}")
    if problems.count == before:
        ranks.warn()


def sort_hint(source: str) -> str:
    if source.startswith("--dataset"):
        name = source.split()[1].rstrip(",")
        return (f"Run: ir_datasets export {name} scoreddocs | LC_ALL=C sort -s -k1,1 > run.txt; then use --candidates "
                f"run.txt")
    return f"Run: LC_ALL=C sort -s -k1,1 {source} > sorted.txt (unpack a .gz file first)"


def count_candidates(collection: Collection, problems: Problems) -> dict[str, int]:
    """Read and check all candidates. Returns {query id: number of candidates}."""
    candidates = collection.candidates(problems, check_ranks=True)
    return {query_id: len(documents) for query_id, documents in
            tqdm(candidates, desc="checking candidates", unit=" queries", unit_scale=True)}
