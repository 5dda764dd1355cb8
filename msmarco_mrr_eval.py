"""Evaluate a ranking by MRR, MRR@10, MRR@100 and any measure of ir_measures, and compare it with other rankings.

    python msmarco_mrr_eval.py qrels.txt run.trec
    python msmarco_mrr_eval.py qrels.txt run.trec --measures nDCG@10 AP R@100 --complete
    python msmarco_mrr_eval.py qrels.txt student.trec --measures nDCG@10 AP --compare teacher.trec bm25.txt

QRELS, plain or .gz:  query_id 0 document_id grade                    columns separated by white space
RUN, plain or .gz:    query_id Q0 document_id rank score run_tag      columns separated by white space

Documents are sorted by descending score, equal scores by descending document id: trec_eval's rule, in double precision.
The order of the lines and the rank column are ignored. All measures use this one order, so RR@10 never exceeds RR.
(ir_measures alone breaks ties for these two in opposite ways.)

Averages are over the judged queries (those with a line in QRELS) that are in RUN, as in the paper's script. The
official MS MARCO script divides by the number of all judged queries. So does --complete: a query that RUN lacks counts
as 0. Messages on stderr say how many queries are averaged over, missing or not judged.

Results go to stdout. Two rows of # enclose query_num (the number of averaged queries) and one line "measure: average"
for each measure. Before them, --per_query prints lines of query_id TAB measure TAB value. With --compare, it does so
for all runs, and the run's file is a fourth column.

--compare adds a table. Runs are compared on the queries they share. For each measure and other run, the table shows
both means, their difference, and the number of queries on which RUN is better, equal and worse. It also shows the
p-values of two two-sided tests: the paired t-test and Fisher's randomization test. The latter is
exact for up to 16 queries with a difference; otherwise it draws --permutations random sign assignments. With several
other runs, Holm's method corrects the p-values of each measure for their number; * marks a corrected p below 0.05.
"""
import argparse
from collections.abc import Iterator
from pathlib import Path

from simplified_tinybert.common.files import Problems, check_ranges, run_main, say, warn
from simplified_tinybert.ranking.measures import Evaluation, check_grades, evaluate, parse_measures, say_gaps
from simplified_tinybert.ranking.presentation import markdown
from simplified_tinybert.ranking.significance import EXACT_QUERIES, LEVEL, PERMUTATIONS, TESTS, compare_pairs
from simplified_tinybert.ranking.trec import first_ten, read_runs

ROW = "#####################"
COLUMNS = ("measure", "other run", "queries", "RUN", "other", "difference", "wins/ties/losses",
           *(heading for test in TESTS for heading in (f"{test} p", "Holm")))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("qrels", type=Path, metavar="QRELS", help="relevance judgements")
    add("run", type=Path, metavar="RUN", help="TREC run to evaluate")
    add("--measures", nargs="+", default=[], metavar="M",
        help="further measures in the notation of ir_measures, such as nDCG@10 AP 'AP(rel=2)@100'")
    add("--complete", action="store_true",
        help="average over all judged queries; missing ones count as 0 (default: over those in RUN)")
    add("--per_query", action="store_true", help="also print the value of every query")
    add("--relevance_level", type=int, default=1, metavar="GRADE",
        help="lowest grade that counts as relevant, for MRR and for binary --measures that do not set rel themselves "
             "(default: %(default)s)")
    add("--compare", type=Path, nargs="+", default=[], metavar="OTHER_RUN",
        help="other runs of the same queries, to compare RUN with")
    add("--permutations", type=int, default=PERMUTATIONS, metavar="N",
        help="random sign assignments of the randomization test (default: %(default)s)")
    add("--seed", type=int, default=42, help="random seed of the randomization test (default: %(default)s)")
    return parser.parse_args()


def check_flags(args: argparse.Namespace, problems: Problems) -> None:
    check_ranges(args, problems, [("permutations", args.permutations >= 1, "1 or more"),
                                  ("seed", args.seed >= 0, "0 or more"),
                                  ("relevance_level", args.relevance_level >= 1, "1 or more; lower grades are never "
                                                                                 "relevant")])
    for path in {path for path in args.compare if args.compare.count(path) > 1}:
        problems.add(f"--compare: {path} is given more than once; give it once, because p is corrected for the "
                     f"number of runs")


def report_coverage(complete: bool, evaluation: Evaluation, prefix: str) -> None:
    """Print which queries are averaged over and which are left out. Each line begins with `prefix`."""
    missing, not_judged = evaluation.missing, evaluation.not_judged
    say(f"{prefix}averaged over {len(evaluation.queries)} queries: "
        f"{'all judged ones' if complete else 'judged and in the run'}")
    if missing:
        how = "counted as 0" if complete else "left out (--complete counts them as 0)"
        say(f"{prefix}{len(missing)} judged queries are missing from the run, {how}: {first_ten(missing)}")
    if not_judged:
        say(f"{prefix}{len(not_judged)} queries of the run are not judged, left out: {first_ten(not_judged)}")
    say_gaps(evaluation, prefix)


def per_query_lines(evaluation: Evaluation, *more_columns: object) -> Iterator[str]:
    """Yield lines of query_id, measure, value and `more_columns`, separated by tabs."""
    for query_id in evaluation.queries:
        for name, (values, _) in evaluation.results.items():
            if query_id in values:
                yield "\t".join(map(str, (query_id, name, values[query_id], *more_columns)))


def comparison_rows(run: Evaluation, others: dict[Path, Evaluation], permutations: int, seed: int) \
        -> Iterator[list[str]]:
    """Yield a table row for each measure and other run. Holm's correction covers the other runs of one measure."""
    for name, (values, _) in run.results.items():
        family = compare_pairs({path: (values, other.results[name].values) for path, other in others.items()},
                               permutations, seed)
        for path in others:
            if path not in family:
                yield [name, str(path), "0", *["-"] * (len(COLUMNS) - 3)]
                continue
            found, tests = family[path], []
            for test in TESTS:
                tests += [format_p(found.p[test]), format_p(found.holm[test]) + "*" * found.significant(test)]
            yield [name, str(path), str(found.queries), *(f"{mean:.4f}" for mean in found.means),
                   f"{found.difference:+.4f}", f"{found.wins}/{found.ties}/{found.losses}", *tests]


def format_p(p: float | None) -> str:
    return "-" if p is None else f"{p:.4f}" if p >= 0.0001 or p == 0 else f"{p:.1e}"


def explanation(args: argparse.Namespace) -> list[str]:
    """Return the lines below the table."""
    several = f"p corrected over the {len(args.compare)} other runs of a measure"
    family = several if len(args.compare) > 1 else "only one other run, nothing to correct"
    return [f"RUN: {args.run}. Means and difference (RUN minus other) are over the queries with a value in both runs.",
            f"Holm: {family}. *: below {LEVEL}. '-': not defined (the t-test needs two queries).",
            f"randomization: exact for up to {EXACT_QUERIES} queries with a difference, otherwise "
            f"{args.permutations:,} random sign assignments, seed {args.seed}."]


def check_shared_queries(run_path: Path, run: Evaluation, others: dict[Path, Evaluation], problems: Problems) -> None:
    """Print how many queries each other run shares with the run. Add a problem if it shares none."""
    for path, other in others.items():
        shared = len(set(run.queries) & set(other.queries))
        if not shared:
            problems.add(f"{path}: none of its judged queries ({first_ten(other.queries)}) is in {run_path} "
                         f"({first_ten(run.queries)}); compare runs of the same queries, or use --complete")
        say(f"{path}: compared on {shared} queries; left out: {len(run.queries) - shared} only in {run_path}, "
            f"{len(other.queries) - shared} only in the other")


def main() -> None:
    args, problems = parse_args(), Problems()
    measures = parse_measures(args.measures, args.relevance_level, problems)
    check_flags(args, problems)
    qrels, runs = read_runs(args.qrels, [args.run, *args.compare], problems)
    check_grades(measures, args.qrels, qrels, runs, args.complete, problems)
    problems.raise_if_any()

    evaluations = {path: evaluate(qrels, run, measures, args.relevance_level, args.complete)
                   for path, run in runs.items()}
    main_run, others = evaluations[args.run], {path: evaluations[path] for path in args.compare}
    for path, evaluation in evaluations.items():
        report_coverage(args.complete, evaluation, f"{path}: " if others else "")
    check_shared_queries(args.run, main_run, others, problems)
    problems.raise_if_any()
    if not any(grade >= args.relevance_level for query_id in main_run.queries for grade in qrels[query_id].values()):
        warn(f"{args.qrels}: none of these queries has a document with a grade of {args.relevance_level} or more, so "
             f"MRR is 0")

    if args.per_query:
        for path, evaluation in evaluations.items():
            for line in per_query_lines(evaluation, *([path] if others else [])):
                print(line)
    averages = (f"{name}: {average}" for name, (_, average) in main_run.results.items())
    print(ROW, f"query_num: {len(main_run.queries)}", *averages, ROW, sep="\n")
    if others:
        rows = list(comparison_rows(main_run, others, args.permutations, args.seed))
        print(markdown(COLUMNS, rows), *explanation(args), sep="\n")


if __name__ == "__main__":
    run_main(main)
