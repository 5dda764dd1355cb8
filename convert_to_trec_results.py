"""Turn the scores of passages into a ranking of documents, as a TREC run.

    python convert_to_trec_results.py --scores_file scores.tsv --output_results_file run.trec --aggregation MaxP

Input, one line per passage, plain or .gz (what reranker.py writes):
    query_id TAB passage_id TAB score
A passage belongs to the document that its id names up to the last "_": D301_4 and D301_passage-4 to D301,
msmarco_doc_00_0_4 to msmarco_doc_00_0. An id without "_" is a document of its own, with a single passage.

Output, one line per document:
    query_id TAB Q0 TAB document_id TAB rank TAB score TAB run_tag
Queries stand in the order of their first line in the input; documents by descending score, equal scores by descending
document id (trec_eval's rule). Ranks start from 1. Scores are printed in full.

Aggregations, for a document with passage scores s_1 ... s_n:
    MaxP         the best passage                   max s_i
    FirstP       the passage with the lowest number at the end of its id
    SumP         all passages                       s_1 + ... + s_n
    AvgP         their mean                         (s_1 + ... + s_n) / n
    k-Max&AvgP   the mean of the k best             k = 1, 2, 3 ...; of all n if n < k. The shell needs quotes around &;
                                                    2-Max_and_AvgP is the same without
"""
import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from simplified_tinybert.common.duplicates import DuplicateFinder
from simplified_tinybert.common.files import (
    Problems,
    UserError,
    atomic_writer,
    check_input_file,
    check_output_file,
    run_main,
    say,
    shorten,
    warn,
)
from simplified_tinybert.common.records import record_file
from simplified_tinybert.common.text import argument_text, read_lines
from simplified_tinybert.ranking.aggregation import FIRST_P, Aggregation, aggregation
from simplified_tinybert.ranking.trec import float32_ties, parse_score, rank, split_passage_id


class Passage(NamedTuple):
    line: int
    query_id: str
    passage_id: str
    score: float


def read_scores(path: Path, problems: Problems) -> Iterator[Passage]:
    for line, text in tqdm(read_lines(path, problems), unit=" lines", unit_scale=True, delay=2, disable=None):
        where, columns = f"{path}:{line}", text.split("\t")
        if len(columns) != 3:
            problems.add(f"{where}: found {len(columns)} columns ({shorten(text)}), "
                         f"expected 3: query_id TAB passage_id TAB score")
            continue
        *ids, score_text = columns
        score = parse_score(score_text)
        if score is None:
            problems.add(f"{where}: score {shorten(score_text)} is not a finite number; expected one such as 0.25")
        for what, text_id in zip(("query id", "passage id"), ids):
            if text_id.split() != [text_id]:
                problems.add(f"{where}: {what} {shorten(text_id)} is empty or has white space in it, "
                             f"which would break the columns of a TREC run")
        yield Passage(line, *ids, 0.0 if score is None else score)


def passage_number(suffix: str | None) -> int | None:
    """The digits at the end of a suffix: 12 of "12", "passage-12"; 0 for the only passage of a document; else None."""
    if suffix is None:
        return 0
    digits = re.search(r"[0-9]+\Z", suffix)
    return int(digits[0]) if digits else None


class Collected(NamedTuple):
    queries: dict[str, dict[str, Any]]  # query id → document id → what the aggregation keeps of it
    passages: int
    without_underscore: int


def collect(path: Path, how: Aggregation, problems: Problems) -> Collected:
    """Read the scores once (twice if a passage may occur twice) and keep of them what the aggregation needs."""
    queries: dict[str, dict[str, Any]] = {}
    passages = without_underscore = 0
    pairs = DuplicateFinder()
    for line, query_id, passage_id, score in read_scores(path, problems):
        document_id, suffix = split_passage_id(passage_id)
        number = passage_number(suffix) if how is FIRST_P else 0
        if number is None:
            problems.add(f"{path}:{line}: passage id {shorten(passage_id)} does not end in digits; FirstP needs the "
                         f"number of the passage there, such as D301_0 or D301_passage-0")
            number = 0
        if passage_id and not document_id:
            problems.add(f"{path}:{line}: passage id {shorten(passage_id)} has no document id before its last _")
        pairs.add((query_id, passage_id))
        documents = queries.setdefault(query_id, {})
        documents[document_id] = how.keep(documents.get(document_id), score, number)
        passages += 1
        without_underscore += suffix is None
    # The second pass complains to a Problems of its own: lines that are wrong were counted in the first.
    again = ((passage.line, passage[1:3]) for passage in read_scores(path, Problems()))
    pairs.report(again, path, "query and passage", problems)
    return Collected(queries, passages, without_underscore)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores_file", type=Path, required=True,
                        help="query_id TAB passage_id TAB score, plain or .gz")
    parser.add_argument("--output_results_file", type=Path, required=True, help="the TREC run to write")
    parser.add_argument("--aggregation", type=aggregation, default="MaxP",
                        help="MaxP, FirstP, SumP, AvgP, or k-Max&AvgP with a number for k (default: %(default)s)")
    parser.add_argument("--run_name", type=argument_text,
                        help="run tag, the last column of the run (default: bert_AGGREGATION)")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    problems = Problems()
    check_input_file(args.scores_file, problems, "scores", read_twice=True)
    check_output_file(args.output_results_file, problems, inputs=[args.scores_file])
    if args.run_name is not None and (args.run_name.split() != [args.run_name] or not args.run_name.isprintable()):
        problems.add(f"--run_name {shorten(args.run_name)}: must be one printable word, the last column of the run")
    problems.raise_if_any()


def run_lines(query_id: str, scores: dict[str, float], run_name: str) -> Iterator[str]:
    for position, document_id in enumerate(rank(scores), start=1):
        yield f"{query_id}\tQ0\t{document_id}\t{position}\t{scores[document_id]!r}\t{run_name}\n"


def main() -> None:
    args = parse_args()
    check_args(args)
    how, problems = args.aggregation, Problems()
    collected = collect(args.scores_file, how, problems)
    problems.raise_if_any()
    if not collected.passages:
        raise UserError(f"{args.scores_file}: is empty; expected lines of query_id TAB passage_id TAB score")

    run_name = f"bert_{how.name}" if args.run_name is None else args.run_name
    documents = ties = 0
    with atomic_writer(args.output_results_file) as handle:
        for query_id, kept_documents in collected.queries.items():
            scores = {document_id: how.score(kept) for document_id, kept in kept_documents.items()}
            handle.writelines(run_lines(query_id, scores, run_name))
            documents += len(scores)
            ties += float32_ties(scores.values())

    args.aggregation = how.name                         # what a record can hold
    record_file(args.output_results_file, args, [args.scores_file], queries=len(collected.queries),
                documents=documents, passages=collected.passages)
    if collected.without_underscore:
        say(f'{collected.without_underscore} passage ids have no "_"; each was taken for a document of its own')
    if how is FIRST_P:
        late = sum(kept[0] > 0 for kept_documents in collected.queries.values() for kept in kept_documents.values())
        if late:
            say(f"{late} documents have no passage 0; their score is that of the lowest number they have")
    if ties:
        warn(f"{ties} pair(s) of differing scores are equal in single precision, as trec_eval reads them; "
             f"it will order these by document id. Way out: scores that lie apart, from reranker.py --score log_odds")
    say(f"{len(collected.queries)} queries, {documents} documents, {collected.passages} passages, "
        f"aggregation {how.name}")


if __name__ == "__main__":
    run_main(main)
