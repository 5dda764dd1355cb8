"""Evaluate a ranking: MRR, MRR@10, MRR@100 and any measure of ir_measures.

    python msmarco_mrr_eval.py qrels.txt run.trec
    python msmarco_mrr_eval.py qrels.txt run.trec --measures nDCG@10 AP R@100 --complete

QRELS, plain or .gz:  query_id 0 document_id grade                    white space between the columns
RUN, plain or .gz:    query_id Q0 document_id rank score run_tag      white space between the columns

Documents are ordered by descending score, equal scores by descending document id: trec_eval's rule, in double
precision. Neither the order of the lines nor the rank column is used. Every measure sees this one order, so that RR@10
can never exceed RR (ir_measures, asked directly, breaks ties for the two in opposite ways).

Averages are over the judged queries (at least one line in QRELS) that are in RUN, as in the paper's script. The
official MS MARCO script divides by the number of all judged queries: with --complete, so does this one, and a query
that is missing from RUN counts as 0. How many queries were averaged over, missing or not judged is told on stderr.

The figures go to stdout: between two rows of #, query_num (queries averaged over), then one "measure: average" a line.
With --per_query lines of query_id TAB measure TAB value come first.
"""
import argparse
from collections.abc import Collection
from pathlib import Path

from simplified_tinybert.files import Problems, UserError, check_input_file, run_main, say, warn
from simplified_tinybert.measures import Qrels, other_measures, parse_measures, reciprocal_ranks
from simplified_tinybert.trec import float32_ties, rank, read_qrels, read_run

ROW = "#####################"


def relevant_grade(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on; a document of grade 0 or less is "
                                         f"never relevant")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("qrels", type=Path, metavar="QRELS", help="relevance judgements")
    parser.add_argument("run", type=Path, metavar="RUN", help="TREC run to evaluate")
    parser.add_argument("--measures", nargs="+", default=[], metavar="M",
                        help="further measures in the notation of ir_measures, such as nDCG@10 AP 'AP(rel=2)@100'")
    parser.add_argument("--complete", action="store_true",
                        help="average over all judged queries, missing ones as 0 (default: over those in RUN)")
    parser.add_argument("--per_query", action="store_true", help="print the value of every query too")
    parser.add_argument("--relevance_level", type=relevant_grade, default=1, metavar="GRADE",
                        help="lowest grade that counts as relevant, for MRR and the binary measures of --measures "
                             "that do not name a rel of their own (default: %(default)s)")
    return parser.parse_args()


def first_ten(ids: Collection[str]) -> str:
    shown = ", ".join(list(ids)[:10])
    return f"{shown}, ..." if len(ids) > 10 else shown


def check_common_queries(args: argparse.Namespace, qrels: Qrels, run: dict[str, dict[str, float]]) -> None:
    for path, content in ((args.qrels, qrels), (args.run, run)):
        if not content:
            raise UserError(f"{path}: is empty; there is nothing to evaluate")
    if not qrels.keys() & run.keys():
        raise UserError(f"{args.run}: none of its queries ({first_ten(run)}) is judged in {args.qrels} "
                        f"({first_ten(qrels)}); do the two belong together?")


def tell_coverage(complete: bool, averaged: int, missing: list[str], not_judged: list[str]) -> None:
    say(f"averaged over {averaged} queries: {'all that are judged' if complete else 'judged and in the run'}")
    if missing:
        how = "counted as 0" if complete else "left out (--complete counts them as 0)"
        say(f"{len(missing)} judged queries are missing from the run, {how}: {first_ten(missing)}")
    if not_judged:
        say(f"{len(not_judged)} queries of the run are not judged, left out: {first_ten(not_judged)}")


def main() -> None:
    args, problems = parse_args(), Problems()
    measures = parse_measures(args.measures, args.relevance_level, problems) if args.measures else []
    files = ((args.qrels, "relevance judgements"), (args.run, "run"))
    if all([check_input_file(path, problems, what) for path, what in files]):  # a list: both are to be checked
        qrels, run = read_qrels(args.qrels, problems), read_run(args.run, problems)
    problems.raise_if_any()
    check_common_queries(args, qrels, run)

    missing = [query_id for query_id in qrels if query_id not in run]
    not_judged = [query_id for query_id in run if query_id not in qrels]
    rankings = {query_id: rank(scores) for query_id, scores in run.items() if query_id in qrels}
    ties = sum(float32_ties(run[query_id].values()) for query_id in rankings)
    if args.complete:
        rankings |= {query_id: [] for query_id in missing}

    results = [*reciprocal_ranks(qrels, rankings, args.relevance_level)]
    if measures:
        results += other_measures(measures, qrels, rankings)
    if args.per_query:
        for query_id in rankings:
            for name, values, _ in results:
                if query_id in values:
                    print(query_id, name, values[query_id], sep="\t")
    print(ROW, f"query_num: {len(rankings)}", *(f"{name}: {average}" for name, _, average in results), ROW, sep="\n")

    tell_coverage(args.complete, len(rankings), missing, not_judged)
    if ties:
        warn(f"{ties} pair(s) of differing scores are equal in single precision, as trec_eval reads them; "
             f"it orders these by document id, and its figures may differ")


if __name__ == "__main__":
    run_main(main)
