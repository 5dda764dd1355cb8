"""The table at the end of the embedded example: several runs on the same queries, side by side.

    python examples/compare.py --qrels qrels.txt --output_table table.md --runs BM25=bm25.txt student=student.trec

In: qrels and TREC runs, each as NAME=FILE. Where NAME's scores were written by reranker.py (the run's file name with
.tsv for .trec, and its .run.json), the table also has the model's parameters and the speed of that re-ranking.
Out, to stdout and as Markdown to --output_table: MRR@10 and nDCG@10 averaged over all judged queries (a query that is
missing from a run counts as 0), pairs scored per second, parameters.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simplified_tinybert.files import Problems, UserError, atomic_writer, run_main
from simplified_tinybert.measures import other_measures, parse_measures, reciprocal_rank
from simplified_tinybert.trec import rank, read_qrels, read_run

HEADINGS = ("", "MRR@10", "nDCG@10", "pairs/s", "parameters")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qrels", type=Path, required=True, help="relevance judgements")
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=FILE", help="TREC runs, a row each")
    parser.add_argument("--output_table", type=Path, required=True, help="the table as Markdown")
    return parser.parse_args()


def measure(qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]]) -> tuple[float, float]:
    """MRR@10 and nDCG@10 over all judged queries."""
    rankings = {query_id: rank(run.get(query_id, {})) for query_id in qrels}
    relevant = {query_id: {docid for docid, grade in grades.items() if grade > 0} for query_id, grades in qrels.items()}
    mrr = sum(reciprocal_rank(ranking, relevant[query_id], 10) for query_id, ranking in rankings.items()) / len(qrels)
    (_, _, ndcg), = other_measures(parse_measures(["nDCG@10"], 1, Problems()), qrels, rankings)
    return mrr, ndcg


def cost(run_file: Path) -> tuple[str, str]:
    """Pairs per second and parameters as reranker.py recorded them, or dashes."""
    recorded = run_file.with_suffix(".tsv.run.json")
    if not recorded.is_file():
        return "–", "–"
    facts = json.loads(recorded.read_text(encoding="utf-8"))
    return f"{facts['pairs_per_second']:,.0f}", f"{facts['parameters']:,}"


def main() -> None:
    args, problems = parse_args(), Problems()
    qrels, rows = read_qrels(args.qrels, problems), []
    for name, _, file in (item.partition("=") for item in args.runs):
        if not Path(file).is_file():
            raise UserError(f"--runs {name}={file}: no such file; expected NAME=FILE")
        mrr, ndcg = measure(qrels, read_run(Path(file), problems))
        rows.append((name, f"{mrr:.4f}", f"{ndcg:.4f}", *cost(Path(file))))
    problems.raise_if_any()

    widths = [max(len(row[column]) for row in [HEADINGS, *rows]) for column in range(len(HEADINGS))]
    lines = ["| " + " | ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(row, widths))) + " |"
             for row in [HEADINGS, *rows]]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ("-" if column == 0 else ":")
                                   for column, width in enumerate(widths)) + "|")
    with atomic_writer(args.output_table) as handle:
        handle.write("\n".join(lines) + "\n")
    print(f"{len(qrels)} test queries, {args.output_table}:", *lines, sep="\n")


if __name__ == "__main__":
    run_main(main)
