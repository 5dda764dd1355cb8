"""Queries, judgements, candidates and documents, from files or from a dataset of the ir_datasets package."""
import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from simplified_tinybert.common.files import Problems, shorten
from simplified_tinybert.common.text import read_lines
from simplified_tinybert.data.documents import Document, open_documents
from simplified_tinybert.ranking.trec import RUN_COLUMNS, RankCheck, parse_score, rank, read_qrels, split_columns

FLAGS = {"docs": "--docs", "queries": "--queries", "qrels": "--qrels", "scoreddocs": "--candidates"}
SHORT_RUN_COLUMNS = ("query_id", "document_id", "rank")                 # of MS MARCO's submissions
Row = tuple[int, str, str, float]                                       # line, query id, document id, score


class Documents(Protocol):
    def get(self, document_id: str) -> Document | None: ...


@dataclass
class Collection:
    """What examples are made of. `candidates(problems)` goes through the candidates once more, a query at a time.

    With `check_ranks=True` a warning follows if their rank column tells of another order than their scores.
    """
    queries: dict[str, str]                                             # query id → text without tabs and line ends
    grades: dict[str, dict[str, int]]                                   # query id → document id → grade
    candidates: Callable[..., Iterator[tuple[str, list[str]]]]          # (query id, document ids, best first)
    documents: Documents


def open_collection(args: argparse.Namespace, dataset: Documents | None, problems: Problems) -> Collection:
    """Everything that --dataset and the file flags name; a file takes the place of the dataset's part.

    What is wrong is added to `problems`; candidates are only checked when they are gone through.
    """
    queries = read_queries(args.queries, problems) if args.queries else dataset.queries(problems)
    grades = {}
    if args.set_name == "train":
        grades = read_qrels(args.qrels, problems) if args.qrels else dataset.grades(problems)

    def candidates(problems: Problems, check_ranks: bool = False) -> Iterator[tuple[str, list[str]]]:
        if args.candidates:
            return by_query(read_rows(args.candidates, problems, check_ranks), str(args.candidates), args.depth,
                            problems)
        return by_query(dataset.candidates(), f"--dataset {args.dataset}, candidate", args.depth, problems)

    documents = open_documents(args.docs, args.cache_file_dir, problems) if args.docs else dataset
    return Collection(queries, grades, candidates, documents)


def read_queries(path: Path, problems: Problems) -> dict[str, str]:
    """{query id: text}; texts with single blanks for all white space. Empty texts are kept."""
    queries, lines, before = {}, {}, problems.count
    for number, line in read_lines(path, problems):
        query_id, tab, text = line.partition("\t")
        if not tab or "\t" in text:
            problems.add(f"{path}:{number}: found {line.count(chr(9)) + 1} tab-separated columns ({shorten(line)}); "
                         f"expected query_id, query")
        elif query_id in queries:
            problems.add(f"{path}:{number}: query {shorten(query_id)} stands already in line {lines[query_id]}; each "
                         f"may occur once")
        else:
            if complaint := wrong_query_id(query_id):
                problems.add(f"{path}:{number}: {complaint}")
            queries[query_id], lines[query_id] = " ".join(text.split()), number
    if not queries and problems.count == before:
        problems.add(f"{path}: holds no queries; expected one a line: query_id, query")
    return queries


def wrong_query_id(query_id: str) -> str | None:
    if query_id.split() == [query_id] and "#" not in query_id:
        return None
    return (f"found query id {shorten(query_id)}; expected one without white space and without '#', which stands "
            f"between query and passage in the ids of pairs")


def read_rows(path: Path, problems: Problems, check_ranks: bool = False) -> Iterator[Row]:
    """The lines of a TREC run, or of one of three columns, whose rank becomes a score.

    With `check_ranks` a warning follows if the rank column of a TREC run tells of another order than the scores.
    """
    layout, ranks, before = None, RankCheck(str(path)), problems.count
    query_id, scores = None, {}
    for number, line in read_lines(path, problems):
        columns = split_columns(line)
        layout = layout or (SHORT_RUN_COLUMNS if len(columns) == 3 else RUN_COLUMNS)
        if len(columns) != len(layout):
            problems.add(f"{path}:{number}: found {len(columns)} columns ({shorten(line)}); expected {len(layout)}: "
                         f"{' '.join(layout)}" + (f"; or in all lines three: {' '.join(SHORT_RUN_COLUMNS)}"
                                                  if layout is RUN_COLUMNS else ""))
            continue
        text = columns[4] if layout is RUN_COLUMNS else columns[2]
        score = parse_score(text)
        if score is None:
            problems.add(f"{path}:{number}: {'score' if layout is RUN_COLUMNS else 'rank'} {shorten(text)} is not a "
                         f"finite number")
            continue
        if layout is RUN_COLUMNS and check_ranks:
            if columns[0] != query_id:
                if scores:
                    ranks.finish(query_id, scores)
                query_id, scores = columns[0], {}
            ranks.add(number, query_id, columns[3])
            scores[columns[2]] = score
        yield (number, columns[0], columns[2], score) if layout is RUN_COLUMNS else (number, *columns[:2], -score)
    if scores and problems.count == before:
        ranks.finish(query_id, scores)
        ranks.warn()


def by_query(rows: Iterable[Row], source: str, depth: int | None, problems: Problems) \
        -> Iterator[tuple[str, list[str]]]:
    """(query id, ids of its `depth` best documents, best first), a query at a time: lines of one must stand together.

    Order: `trec.rank`. Memory: the ids of the queries and the documents of one of them.
    """
    first_lines, query_id, scores, before = {}, None, {}, problems.count
    for number, row_query, document_id, score in rows:
        if row_query != query_id:
            if scores:
                yield query_id, rank(scores)[:depth]
            query_id, scores = row_query, {}
            if complaint := wrong_query_id(query_id):
                problems.add(f"{source}:{number}: {complaint}")
            if query_id in first_lines:
                problems.add(f"{source}:{number}: query {shorten(query_id)} comes again, after others, since line "
                             f"{first_lines[query_id]}; the lines of a query must stand together. {way_out(source)}")
            first_lines.setdefault(query_id, number)
        if not math.isfinite(score):
            problems.add(f"{source}:{number}: the score of document {shorten(document_id)} for query "
                         f"{shorten(query_id)} is not a finite number")
        if document_id in scores:
            problems.add(f"{source}:{number}: document {shorten(document_id)} is ranked a second time for query "
                         f"{shorten(query_id)}; each may occur once")
        elif document_id.split() != [document_id]:
            problems.add(f"{source}:{number}: found document id {shorten(document_id)}; expected one without white "
                         f"space")
        scores[document_id] = score
    if scores:
        yield query_id, rank(scores)[:depth]
    elif not first_lines and problems.count == before:
        problems.add(f"{source}: holds no candidates; expected lines of {' '.join(RUN_COLUMNS)}")


def way_out(source: str) -> str:
    if source.startswith("--dataset"):
        name = source.split()[1].rstrip(",")
        return f"Do: ir_datasets export {name} scoreddocs | LC_ALL=C sort -s -k1,1 > run.txt; then --candidates run.txt"
    return f"Do: LC_ALL=C sort -s -k1,1 {source} > sorted.txt (a .gz file by zcat first)"


def count_candidates(collection: Collection, problems: Problems) -> dict[str, int]:
    """{query id: number of its candidates}: goes through all of them, which checks them."""
    candidates = collection.candidates(problems, check_ranks=True)
    return {query_id: len(documents) for query_id, documents in
            tqdm(candidates, desc="checking candidates", unit=" queries", unit_scale=True)}
