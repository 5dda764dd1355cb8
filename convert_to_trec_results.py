"""Aggregate passage scores into a ranking of documents, written as a TREC run.

    python convert_to_trec_results.py --scores_file scores.tsv --output_results_file run.trec --aggregation MaxP

Input, one line per passage, plain or .gz, as written by reranker.py:
    query_id TAB passage_id TAB score
The document id is the passage id up to its last "_": D301_4 and D301_passage-4 belong to D301, msmarco_doc_00_0_4 to
msmarco_doc_00_0. A passage id without "_" is a document with a single passage.

Output, one line per document:
    query_id TAB Q0 TAB document_id TAB rank TAB score TAB run_tag
Queries keep the order of the input. Documents are sorted by descending score, equal scores by descending document id
(trec_eval's rule). Ranks start at 1. Scores are printed in full precision.

Aggregations of the passage scores s_1 ... s_n of a document:
    MaxP         the best passage                   max s_i
    FirstP       the passage with the lowest number at the end of its id
    SumP         all passages                       s_1 + ... + s_n
    AvgP         their mean                         (s_1 + ... + s_n) / n
    k-Max&AvgP   the mean of the k best             k = 1, 2, 3, ...; of all n if n < k. The shell needs quotes around
                                                    the &; 2-Max_and_AvgP means the same

--interpolate bm25.txt adds the scores of a first stage: (1 - w) · ranker + w · first stage, with w from
--interpolation_weight. First, the scores of each ranking are scaled for each query, to mean 0 and standard deviation 1.
A document that is missing from one ranking gets the lowest score there. With --interpolation_qrels qrels.dev.txt, the
weight with the best nDCG@10 on these queries is chosen and printed; use it for the test queries.
"""
import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from simplified_tinybert.common.duplicates import DuplicateFinder
from simplified_tinybert.common.files import (
    Problems,
    UserError,
    atomic_writer,
    check_input_file,
    check_output_file,
    check_ranges,
    run_main,
    say,
    shorten,
)
from simplified_tinybert.common.records import record_file
from simplified_tinybert.common.text import argument_text, read_lines
from simplified_tinybert.ranking.aggregation import FIRST_P, NAMES, Aggregation, find_aggregation
from simplified_tinybert.ranking.interpolation import best_weight, count_missing, interpolate_run, values_by_weight
from simplified_tinybert.ranking.trec import (
    Run,
    check_common_queries,
    check_relevant,
    float32_ties,
    parse_score,
    rank,
    read_qrels,
    read_run,
    split_passage_id,
    warn_of_float32_ties,
)

States = dict[str, dict[str, Any]]      # query id → document id → state of the aggregation


def read_scores(path: Path, problems: Problems) -> Iterator[tuple[int, str, str, float]]:
    """Yield (line number, query id, passage id, score)."""
    for line, text in tqdm(read_lines(path, problems), unit=" lines", unit_scale=True, delay=2, disable=None):
        where, columns = f"{path}:{line}", text.split("\t")
        if len(columns) != 3:
            problems.add(f"{where}: found {len(columns)} columns ({shorten(text)}), "
                         f"expected 3: query_id TAB passage_id TAB score")
            continue
        *ids, score_text = columns
        score = parse_score(score_text)
        if math.isnan(score):
            problems.add(f"{where}: score {shorten(score_text)}: expected a finite number, for example 0.25")
        for kind, text_id in zip(("query id", "passage id"), ids):
            if text_id.split() != [text_id]:
                problems.add(f"{where}: {kind} {shorten(text_id)}: must not be empty or contain white space, which "
                             f"separates the columns of a TREC run")
        yield line, *ids, score


def passage_number(suffix: str | None) -> int | None:
    """Return the number at the end of a suffix ("12", "passage-12"): 0 without a suffix, None without a number."""
    if suffix is None:
        return 0
    digits = re.search(r"[0-9]+\Z", suffix)
    return int(digits[0]) if digits else None


def collect(path: Path, aggregation: Aggregation, problems: Problems) -> tuple[States, int, int]:
    """Aggregate the scores of a file. The file is read a second time if it may contain duplicates.

    Returns the states, the number of passages and the number of passage ids without "_".
    """
    queries, pairs, passages, without_underscore = {}, DuplicateFinder(), 0, 0
    for line, query_id, passage_id, score in read_scores(path, problems):
        document_id, suffix = split_passage_id(passage_id)
        number = passage_number(suffix) if aggregation is FIRST_P else 0
        if number is None:
            problems.add(f"{path}:{line}: passage id {shorten(passage_id)}: FirstP needs the passage number at the "
                         f"end, as in D301_0 or D301_passage-0")
            number = 0
        if passage_id and not document_id:
            problems.add(f"{path}:{line}: passage id {shorten(passage_id)}: no document id before the last _")
        pairs.add((query_id, passage_id))
        documents = queries.setdefault(query_id, {})
        documents[document_id] = aggregation.update(documents.get(document_id), score, number)
        passages += 1
        without_underscore += suffix is None
    # The first pass has reported all other errors.
    again = ((line, (query_id, passage_id)) for line, query_id, passage_id, _ in read_scores(path, Problems()))
    pairs.report(again, path, "query and passage", problems)
    return queries, passages, without_underscore


def parse_aggregation(name: str) -> Aggregation:
    if found := find_aggregation(name):
        return found
    raise argparse.ArgumentTypeError(f"{name!r}: expected {NAMES}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scores_file", type=Path, required=True, help="query_id TAB passage_id TAB score, plain or .gz")
    add("--output_results_file", type=Path, required=True, help="TREC run to write")
    add("--aggregation", type=parse_aggregation, default="MaxP",
        help="MaxP, FirstP, SumP, AvgP, or k-Max&AvgP with a number for k (default: %(default)s)")
    add("--interpolate", type=Path, metavar="RUN", help="TREC run of the first stage, to be interpolated")
    add("--interpolation_weight", type=float, metavar="W", help="weight of the first stage, 0 to 1")
    add("--interpolation_qrels", type=Path, metavar="QRELS", help="choose the weight by these judgements")
    add("--run_name", type=argument_text, help="run tag, the last column (default: bert_AGGREGATION)")
    return parser.parse_args()


def inputs_of(args: argparse.Namespace) -> list[Path]:
    return [path for path in (args.scores_file, args.interpolate, args.interpolation_qrels) if path]


def check_args(args: argparse.Namespace) -> None:
    problems = Problems()
    check_input_file(args.scores_file, problems, "scores", read_twice=True)
    check_output_file(args.output_results_file, problems, inputs=inputs_of(args))
    if args.run_name is not None and (args.run_name.split() != [args.run_name] or not args.run_name.isprintable()):
        problems.add(f"--run_name {shorten(args.run_name)}: expected one printable word without white space")
    weight, given = args.interpolation_weight, [name for name in ("interpolation_weight", "interpolation_qrels")
                                                if getattr(args, name) is not None]
    if args.interpolate and len(given) != 1:
        problems.add("--interpolate: add either --interpolation_weight, or --interpolation_qrels to choose it")
    for name in given if not args.interpolate else ():
        problems.add(f"--{name}: needs --interpolate")
    check_ranges(args, problems, [("interpolation_weight", weight is None or 0 <= weight <= 1, "0 to 1")])
    for name in ("interpolate", "interpolation_qrels"):
        if path := getattr(args, name):
            check_input_file(path, problems, "run" if name == "interpolate" else "judgements")
    problems.raise_if_any()


def aggregated(queries: dict[str, dict[str, Any]], aggregation: Aggregation, path: Path) -> Run:
    run, problems = {}, Problems()
    for query_id, states in queries.items():
        with np.errstate(over="ignore"):
            run[query_id] = {document_id: aggregation.score(state) for document_id, state in states.items()}
        for document_id, score in run[query_id].items():
            if not math.isfinite(score):
                problems.add(f"{path}: the scores of document {shorten(document_id)} for query {shorten(query_id)} add "
                             f"up to more than a double holds; use smaller scores, or --aggregation MaxP")
    problems.raise_if_any()
    return run


def interpolated(args: argparse.Namespace, ranker: Run) -> Run:
    """Return the ranker's run, interpolated with the first stage if --interpolate is given."""
    if not args.interpolate:
        return ranker
    problems = Problems()
    first_stage, qrels = read_run(args.interpolate, problems), {}
    if args.interpolation_qrels:
        qrels = read_qrels(args.interpolation_qrels, problems)
        check_common_queries(args.interpolation_qrels, qrels, {args.scores_file: ranker}, problems)
        check_relevant(args.interpolation_qrels, qrels, ranker, problems)
    if not problems.count and not ranker.keys() & first_stage.keys():
        problems.add(f"{args.interpolate}: has none of the queries in {args.scores_file}; do the two belong together?")
    problems.raise_if_any()
    if qrels:
        values = values_by_weight(ranker, first_stage, qrels)
        args.interpolation_weight = best_weight(values)
        say("weight       " + ", ".join(f"{weight:g}: {value:.4f}" for weight, value in values.items()))
    missing, absent = count_missing(ranker, first_stage), sum(query_id not in first_stage for query_id in ranker)
    say(f"interpolated with weight {args.interpolation_weight:g}; documents that only the first stage has: "
        f"{missing[0]:,}, that only the ranker has: {missing[1]:,}; queries without a first stage: {absent:,}")
    return interpolate_run(ranker, first_stage, args.interpolation_weight)


def main() -> None:
    args = parse_args()
    check_args(args)
    aggregation, problems = args.aggregation, Problems()
    queries, passages, without_underscore = collect(args.scores_file, aggregation, problems)
    problems.raise_if_any()
    if not passages:
        raise UserError(f"{args.scores_file}: is empty; expected lines of query_id TAB passage_id TAB score")

    run_name = f"bert_{aggregation.name}" if args.run_name is None else args.run_name
    document_count = ties = 0
    run = interpolated(args, aggregated(queries, aggregation, args.scores_file))
    with atomic_writer(args.output_results_file) as handle:
        for query_id, scores in run.items():
            for position, document_id in enumerate(rank(scores), start=1):
                handle.write(f"{query_id}\tQ0\t{document_id}\t{position}\t{scores[document_id]!r}\t{run_name}\n")
            document_count += len(scores)
            ties += float32_ties(scores.values())

    args.aggregation = aggregation.name                 # JSON cannot hold the functions
    record_file(args.output_results_file, args, inputs_of(args), queries=len(queries),
                documents=document_count, passages=passages)
    if without_underscore:
        say(f'{without_underscore} passage ids have no "_"; each counts as a document with one passage')
    if aggregation is FIRST_P:
        late = sum(number > 0 for documents in queries.values() for number, _ in documents.values())
        if late:
            say(f"{late} documents have no passage 0; the passage with the lowest number is used")
    warn_of_float32_ties(ties)
    say(f"{len(queries)} queries, {document_count} documents, {passages} passages, aggregation {aggregation.name}")


if __name__ == "__main__":
    run_main(main)
