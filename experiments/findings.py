"""Tables and pictures of a study, made from the results.json that replicate.py writes.

    python -m experiments.findings experiments/results/worldtree.json --output_dir experiments/results \\
        --document docs/replication.md

Out, in --output_dir, for each results file NAME.json:

    NAME.md            tables: effectiveness (mean ± standard deviation over the seeds), differences (95 % confidence
                       intervals over the queries), interpolation with BM25, learning rates tried, norms of gradients
    NAME.png           effectiveness against speed
    NAME-losses.png    each loss term and its gradient norm during training

--summary also writes the main figures of all studies to one JSON file (format: summary.py). --document also inserts the
tables into that file, between the lines <!-- NAME --> and <!-- end of NAME -->.
"""
import argparse
import statistics
from pathlib import Path

from experiments.pictures import TERMS, effectiveness_picture, losses_picture, title
from experiments.summary import write_summary
from simplified_tinybert.common.files import (
    Problems,
    UserError,
    atomic_writer,
    check_input_file,
    check_output_file,
    run_main,
    say,
)
from simplified_tinybert.common.text import read_json
from simplified_tinybert.ranking.presentation import markdown, number
from simplified_tinybert.ranking.significance import LEVEL

NONE, TEST, UNDECIDED = "–", "t-test", "not significant"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results files of one or more studies")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory for tables and pictures")
    parser.add_argument("--summary", type=Path, help="JSON file for the main figures of all studies")
    parser.add_argument("--document", type=Path, help="file to insert the tables into")
    return parser.parse_args()


def effectiveness_table(results: dict) -> str:
    """One row per system: speed; mean over the seeds, standard deviation and % of the teacher."""
    measures, systems = list(results["systems"][0]["seeds"]), results["systems"]
    teacher = next(system for system in systems if system["name"] == "teacher")
    headings = ["system", "shape", "pairs/s", "speed-up"]
    rows = [[title(results, system["method"]), system["shape"] or NONE,
             number(system["pairs_per_second"]) if system["shape"] else NONE,
             f"{number(system['speed_up'])} ×" if system["shape"] else NONE] for system in systems]
    for measure in measures:
        headings += [measure] + (["% of teacher"] if measure == measures[0] else [])
        teacher_mean = statistics.fmean(teacher["seeds"][measure])
        for system, row in zip(systems, rows):
            values = system["seeds"][measure]
            mean = statistics.fmean(values)
            daggers = "".join(dagger for dagger, reference in (("†", "teacher"), ("‡", "BM25"))
                              if differs(results["comparisons"][reference][measure].get(system["name"])))
            row.append(f"{mean:.4f}{daggers}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""))
            if measure == measures[0]:
                row.append(f"{100 * mean / teacher_mean:.1f}" if teacher_mean else NONE)
    return markdown(headings, rows)


def differs(comparison: dict | None) -> bool:
    return comparison is not None and verdict(comparison) != UNDECIDED


def differences_table(results: dict) -> str:
    """Every comparison of the three families on the first measure."""
    measure, rows = results["settings"]["measures"][0], []
    for reference, by_measure in results["comparisons"].items():
        for name, comparison in by_measure[measure].items():
            first, second = (name, reference) if reference in ("BM25", "teacher") else (reference, name)
            low, high = comparison["interval"]
            rows.append([title(results, first), f"minus {title(results, second)}",
                         f"{comparison['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}",
                         f"{comparison['wins']}/{comparison['ties']}/{comparison['losses']}",
                         p_value(comparison["holm"][TEST]), verdict(comparison)])
    return markdown(["system", "", measure, "95 % interval", "wins/ties/losses", "p (Holm)", ""], rows)


def interpolation_table(results: dict) -> str:
    """Each system with BM25's scores added: weight of BM25, first measure, difference from the system alone."""
    measure, rows = results["settings"]["measures"][0], []
    for name, system in results["interpolated"].items():
        comparison, mean = system["minus_alone"][measure], statistics.fmean(system["seeds"][measure])
        low, high = comparison["interval"]
        rows.append([f"{title(results, name)} + BM25", ", ".join(f"{weight:g}" for weight in system["weights"]),
                     f"{mean:.4f}", f"{comparison['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}",
                     p_value(comparison["holm"][TEST]), verdict(comparison)])
    return markdown(["system", "weight of BM25", measure, "minus the system alone", "95 % interval", "p (Holm)", ""],
                    rows)


def p_value(p: float | None) -> str:
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def verdict(comparison: dict) -> str:
    p = comparison["holm"][TEST]
    if p is None or p >= LEVEL:
        return UNDECIDED
    return "better" if comparison["difference"] > 0 else "worse"


def tuning_table(results: dict) -> str:
    """Each method's nDCG@10 on the dev queries at each learning rate, the chosen one in bold."""
    rows: dict[tuple[str, str], list[str]] = {}
    for run in results["tuned"]:
        value, rate = f"**{run['dev']:.4f}**" if run["chosen"] else f"{run['dev']:.4f}", f"{run['learning_rate']:g}"
        rows.setdefault((run["shape"], run["method"]), []).append(f"{value} ({rate})")
    return markdown(["method", "shape", "nDCG@10 (learning rate)"],
                    [[title(results, method), shape, ", ".join(cells)] for (shape, method), cells in rows.items()])


def gradients_table(results: dict) -> str:
    """Gradient norm of each loss term, first and last logged value. It shows which term dominates the training."""
    rows = []
    for curve in results["curves"]:
        cells = []
        for term in TERMS:
            norms = [row[f"{term}_grad"] for row in curve["rows"] if row.get(f"{term}_grad")]
            cells.append(f"{norms[0]:.2g} → {norms[-1]:.2g}" if norms else NONE)
        rows.append([title(results, curve["method"]), curve["shape"], *cells])
    return markdown(["method", "shape", *(name for name, _ in TERMS.values())], rows)


def report_text(results: dict) -> str:
    """The tables, with the explanations that a reader needs."""
    dev, settings = results["dev"], results["settings"]
    parts = [f"On the {dev['queries']} dev queries, re-ranking BM25's first {settings['dev_depth']} candidates:",
             markdown(["", "nDCG@10"], [[name, f"{value:.4f}"] for name, value in dev["nDCG@10"].items()])]
    if results["tuned"]:
        parts += ["Each method on the dev queries, by learning rate (first seed, chosen rate in bold):",
                  tuning_table(results), "Gradient norm of each loss term, first and last logged value (first "
                  "seed, chosen learning rate; attention and hidden include their weights):", gradients_table(results)]
    if "systems" not in results:
        return "\n\n".join(parts) + "\n"
    measure = settings["measures"][0]
    teacher_minus_bm25 = results["comparisons"]["BM25"][measure]["teacher"]
    if verdict(teacher_minus_bm25) == "worse":
        judgement = "**The teacher is worse than BM25, so a student that equals the teacher is no success.**"
    elif verdict(teacher_minus_bm25) == UNDECIDED:
        judgement = "The teacher is not significantly better than BM25 here, which limits what its students can show."
    else:
        judgement = "The teacher is significantly better than BM25."
    return "\n\n".join([
        f"{results['queries']:,} test queries, {seeds_note(results)}, re-ranking BM25's first {settings['test_depth']} "
        f"candidates{candidates_note(results)}. {judgement}",
        effectiveness_table(results), *teachers_note(results),
        f"{'± is the standard deviation over the seeds. ' if len(settings['seeds']) > 1 else ''}† marks a significant "
        f"difference from the teacher, ‡ from BM25: paired t-test over the queries, on each query's mean over the "
        f"seeds, p < {LEVEL} after Holm's correction for all rows of a measure. The speed-up is the median of the "
        f"rounds' ratios. Pairs per second: {results['speed_note']}",
        differences_table(results),
        "Intervals are over the queries, for these seeds, without correction. p and verdict are after Holm's "
        "correction for all comparisons with the same system. So an interval may exclude 0 although the difference is "
        "not significant.",
        *(["Interpolated with BM25. The weight was chosen for each model on the dev queries; p and verdict are after "
           "Holm's correction for all rows:", interpolation_table(results)] if results.get("interpolated") else []),
        *parts]) + "\n"


def seeds_note(results: dict) -> str:
    """Say with how many seeds the students were evaluated, and whether that is all."""
    seeds, measure = len(results["settings"]["seeds"]), results["settings"]["measures"][0]
    of_students = [len(system["seeds"][measure]) for system in results["systems"]
                   if system["name"] in results["comparisons"]["teacher"][measure]]
    found = of_students[0] if of_students else seeds
    return counted(found, "seed") if found == seeds else f"{found} of {counted(seeds, 'seed')}"


def candidates_note(results: dict) -> str:
    """Say if queries have fewer candidates than the depth, or none. Results of earlier versions do not say it."""
    notes, mean = [], results.get("candidates", results["settings"]["test_depth"])
    if f"{mean:.1f}" != f"{results['settings']['test_depth']:.1f}":
        notes.append(f"{mean:.1f} on average")
    if missing := results.get("without_candidates"):
        notes.append(f"judged queries without candidates, left out: {missing}")
    return f" ({'; '.join(notes)})" if notes else ""


def teachers_note(results: dict) -> list[str]:
    """Return a sentence with the value of each teacher, if there are several."""
    measure, seeds = results["settings"]["measures"][0], results.get("teacher_seeds", {})
    values = ", ".join(f"{averages[measure][0]:.4f} (seed {seed})" for seed, averages in seeds.items())
    return [f"{measure} of all teachers; the first one teaches the students: {values}."] if len(seeds) > 1 else []


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def write_all(results: dict, name: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_writer(directory / f"{name}.md") as handle:
        handle.write(report_text(results))
    if results["curves"]:
        losses_picture(results, directory / f"{name}-losses.png")
    if "systems" in results:
        effectiveness_picture(results, directory / f"{name}.png")
    say(f"tables       {directory / name}.md")


def insert_tables(document: str, name: str, tables: str) -> str:
    """Replace what is between a study's two markers. Raises ValueError unless each marker occurs exactly once."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"expected the lines {begin.strip()} and {end} exactly once each")
    before, _, rest = document.partition(begin)
    return f"{before}{begin}\n{tables}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    args, problems, studies = parse_args(), Problems(), {}
    document = args.document.read_text(encoding="utf-8") if args.document and check_input_file(
        args.document, problems, "document") else ""
    for path in args.results:
        if check_input_file(path, problems, "results"):
            if path.stem in studies:
                problems.add(f"{path}: another results file has the same name, which names the tables; rename one")
            with problems.collect():
                studies[path.stem] = read_json(path, "results.json of replicate.py")
    if args.summary:
        check_output_file(args.summary, problems)
    problems.raise_if_any()
    for name, results in studies.items():
        try:
            write_all(results, name, args.output_dir)
            document = insert_tables(document, name, report_text(results)) if args.document else ""
        except KeyError as error:
            raise UserError(f"{name}.json: key {error} is missing; expected a results.json of replicate.py") from None
        except ValueError as error:
            raise UserError(f"{args.document}: {error}") from None
    if args.summary:
        write_summary(list(studies.values()), args.summary)
    if args.document:
        with atomic_writer(args.document) as handle:
            handle.write(document)


if __name__ == "__main__":
    run_main(main)
