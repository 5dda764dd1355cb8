"""Evaluate a ranking: MRR, MRR@10, MRR@100 and any measure of ir_measures; is it better than another one?

    python msmarco_mrr_eval.py qrels.txt run.trec
    python msmarco_mrr_eval.py qrels.txt run.trec --measures nDCG@10 AP R@100 --complete
    python msmarco_mrr_eval.py qrels.txt student.trec --measures nDCG@10 AP --compare teacher.trec bm25.txt

QRELS, plain or .gz:  query_id 0 document_id grade                    white space between the columns
RUN, plain or .gz:    query_id Q0 document_id rank score run_tag      white space between the columns

Documents are ordered by descending score, equal scores by descending document id: trec_eval's rule, in double
precision. Neither the order of the lines nor the rank column is used. Every measure sees this one order, so that RR@10
can never exceed RR (ir_measures, asked directly, breaks ties for the two in opposite ways).

Averages are over the judged queries (at least one line in QRELS) that are in RUN, as in the paper's script. The
official MS MARCO script divides by the number of all judged queries: with --complete, so does this one, and a query
that is missing from RUN counts as 0. How many queries were averaged over, missing or not judged is told on stderr.

The figures go to stdout: between two rows of #, query_num (queries averaged over), then one "measure: average" a line.
With --per_query lines of query_id TAB measure TAB value come first, with --compare of all runs and with a fourth
column, the run's file.

With --compare a table follows: for each measure and other run the means of both on the queries that both are averaged
over, their difference, on how many of the queries RUN is better, equal, worse, and how likely such a difference is by
chance: the paired t-test (the paper's) and Fisher's randomization test, both two-sided. The randomization test is exact
for up to 16 queries that differ, else it draws --permutations assignments of signs. Where there are several other runs,
p is corrected by Holm's method over these (the family: one measure, all other runs); * marks a corrected p below 0.05.
"""
import argparse
from collections.abc import Iterator
from pathlib import Path

from simplified_tinybert.common.files import Problems, check_input_file, run_main, say, warn
from simplified_tinybert.ranking import significance as statistics
from simplified_tinybert.ranking.measures import (
    Evaluation,
    check_common_queries,
    check_grades,
    evaluate,
    first_ten,
    parse_measures,
)
from simplified_tinybert.ranking.significance import EXACT_QUERIES, LEVEL, PERMUTATIONS, TESTS, Comparison
from simplified_tinybert.ranking.tables import markdown
from simplified_tinybert.ranking.trec import read_qrels, read_run

ROW = "#####################"
COLUMNS = ("measure", "other run", "queries", "RUN", "other", "difference", "wins/ties/losses",
           *(heading for test in TESTS for heading in (f"{test} p", "Holm")))


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
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="OTHER_RUN",
                        help="other runs of the same queries, to compare RUN with")
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS, metavar="N",
                        help="assignments of signs that the randomization test draws (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the randomization test (default: %(default)s)")
    return parser.parse_args()


def check_flags(args: argparse.Namespace, problems: Problems) -> None:
    if args.permutations < 1 or args.seed < 0:
        problems.add(f"--permutations {args.permutations} --seed {args.seed}: expected 1 or more, and 0 or more")
    for path in {path for path in args.compare if args.compare.count(path) > 1}:
        problems.add(f"--compare names {path} more than once; name it once, for p is corrected for the number of runs")


def tell_coverage(complete: bool, evaluation: Evaluation, start: str = "") -> None:
    """Say what was averaged over and what was left out; `start` names the run where there are several."""
    averaged, missing, not_judged = len(evaluation.queries), evaluation.missing, evaluation.not_judged
    for name, values, _ in evaluation.results:
        if len(values) < averaged:
            say(f"{start}{name} is defined for {len(values)} of the queries only; its average is over these")
    say(f"{start}averaged over {averaged} queries: {'all that are judged' if complete else 'judged and in the run'}")
    if missing:
        how = "counted as 0" if complete else "left out (--complete counts them as 0)"
        say(f"{start}{len(missing)} judged queries are missing from the run, {how}: {first_ten(missing)}")
    if not_judged:
        say(f"{start}{len(not_judged)} queries of the run are not judged, left out: {first_ten(not_judged)}")
    if evaluation.float32_ties:
        warn(f"{start}{evaluation.float32_ties} pair(s) of differing scores are equal in single precision, as "
             f"trec_eval reads them; it orders these by document id, and its figures may differ")


def per_query_lines(evaluation: Evaluation, *last: object) -> Iterator[str]:
    """query_id, measure, value and the columns of `last`, tabs between them."""
    for query_id in evaluation.queries:
        for name, values, _ in evaluation.results:
            if query_id in values:
                yield "\t".join(map(str, (query_id, name, values[query_id], *last)))


def compare_all(run: Evaluation, others: dict[Path, Evaluation], permutations: int, seed: int) \
        -> Iterator[tuple[str, Path, Comparison | None]]:
    """(measure, other run, comparison) with Holm's correction; None where no query has a value in both runs."""
    for number, (name, values, _) in enumerate(run.results):
        compared = {}
        for path, other in others.items():
            other_values = other.results[number][1]
            common = values.keys() & other_values.keys()
            compared[path] = statistics.compare(values, other_values, permutations, seed) if common else None
        statistics.apply_holm([comparison for comparison in compared.values() if comparison])
        for path, comparison in compared.items():
            yield name, path, comparison


def format_p(p: float | None) -> str:
    return "-" if p is None else f"{p:.4f}" if p >= 0.0001 or p == 0 else f"{p:.1e}"


def comparison_row(name: str, path: Path, found: Comparison | None) -> list[str]:
    if found is None:
        return [name, str(path), "0", *["-"] * (len(COLUMNS) - 3)]
    tests = []
    for test in TESTS:
        corrected = found.holm[test]
        tests += [format_p(found.p[test]), format_p(corrected) + "*" * (corrected is not None and corrected < LEVEL)]
    return [name, str(path), str(found.queries), *(f"{mean:.4f}" for mean in found.means), f"{found.difference:+.4f}",
            f"{found.wins}/{found.ties}/{found.losses}", *tests]


def explanation(args: argparse.Namespace) -> list[str]:
    """The lines under the table."""
    several = f"p corrected over the {len(args.compare)} other runs of a measure"
    family = several if len(args.compare) > 1 else "one other run, nothing to correct"
    return [f"RUN: {args.run}. Means and difference (RUN less the other) over the queries on which both have a value.",
            f"Holm: {family}. *: below {LEVEL}. '-': not defined (the t-test needs two queries).",
            f"randomization: exact up to {EXACT_QUERIES} differing queries, else {args.permutations:,} random "
            f"assignments of signs, seed {args.seed}."]


def check_pairs(run_path: Path, run: Evaluation, others: dict[Path, Evaluation], problems: Problems) -> None:
    """Complain about runs that share no query with the one they are to be compared with; say what is left out."""
    for path, other in others.items():
        common = len(set(run.queries) & set(other.queries))
        if not common:
            problems.add(f"{path}: none of its judged queries ({first_ten(other.queries)}) is in {run_path} "
                         f"({first_ten(run.queries)}); compare runs of the same queries, or with --complete")
        alone = f"{len(run.queries) - common} of {run_path} alone, {len(other.queries) - common} of the other alone"
        say(f"{path}: compared on {common} queries; left out: {alone}")


def main() -> None:
    args, problems = parse_args(), Problems()
    measures = parse_measures(args.measures, args.relevance_level, problems) if args.measures else []
    check_flags(args, problems)
    paths = list(dict.fromkeys([args.run, *args.compare]))
    files = [(args.qrels, "relevance judgements"), *((path, "run") for path in paths)]
    if all([check_input_file(path, problems, what) for path, what in files]):  # a list: all are to be checked
        qrels, runs = read_qrels(args.qrels, problems), {path: read_run(path, problems) for path in paths}
    problems.raise_if_any()
    check_common_queries(args.qrels, qrels, runs, problems)
    check_grades(measures, args.qrels, qrels, runs, args.complete, problems)
    problems.raise_if_any()

    evaluations = {path: evaluate(qrels, run, measures, args.relevance_level, args.complete)
                   for path, run in runs.items()}
    main_run, others = evaluations[args.run], {path: evaluations[path] for path in args.compare}
    for path, evaluation in evaluations.items():
        tell_coverage(args.complete, evaluation, f"{path}: " if others else "")
    check_pairs(args.run, main_run, others, problems)
    problems.raise_if_any()

    if args.per_query:
        for path, evaluation in evaluations.items():
            for line in per_query_lines(evaluation, *([path] if others else [])):
                print(line)
    averages = (f"{name}: {average}" for name, _, average in main_run.results)
    print(ROW, f"query_num: {len(main_run.queries)}", *averages, ROW, sep="\n")
    if others:
        compared = compare_all(main_run, others, args.permutations, args.seed)
        print(markdown(COLUMNS, [comparison_row(*each) for each in compared]), *explanation(args), sep="\n")


if __name__ == "__main__":
    run_main(main)
