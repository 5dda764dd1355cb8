"""What a study found, as tables and pictures: from the results.json alone that replicate.py writes.

    python -m experiments.findings experiments/results/nfcorpus.json --output_dir experiments/results \\
        --document docs/replication.md

Out, in --output_dir, for each results file NAME.json: NAME.md, tables of effectiveness (means over the seeds ± their
standard deviation), of differences with 95 % intervals over the queries, of what was tuned on the dev queries, of the
size of gradients; NAME.png, effectiveness against speed; NAME-losses.png, size and gradient of each loss term while the
students learn.
With --summary also a file of the studies' figures in short; summary.py tells its form. With --document the tables are
also put into that file, between the lines <!-- NAME --> and <!-- end of NAME -->.
"""
import argparse
import json
import statistics
from pathlib import Path

from experiments.pictures import TERMS, effectiveness_picture, losses_picture, title
from experiments.summary import write_summary
from simplified_tinybert.common.files import Problems, UserError, atomic_writer, check_input_file, run_main, say
from simplified_tinybert.ranking.significance import LEVEL
from simplified_tinybert.ranking.tables import markdown, number

NONE, TEST, UNDECIDED = "–", "t-test", "cannot be told apart"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results of one study or several")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory for tables and pictures")
    parser.add_argument("--summary", type=Path, help="file (JSON) for the figures of all these studies in short")
    parser.add_argument("--document", type=Path, help="file to put the tables into")
    return parser.parse_args()


def effectiveness_table(results: dict) -> str:
    """A row for each system: means over the seeds, ± standard deviation, in % of the teacher's, speed."""
    measures, systems = list(results["systems"][0]["seeds"]), results["systems"]
    teacher = next(system for system in systems if system["name"] == "teacher")
    headings = ["system", "shape", "pairs/s", "speed-up"]
    rows = [[title(results, system["method"]), system["shape"] or NONE,
             number(system["pairs_per_second"]) if system["shape"] else NONE,
             f"{number(system['speed_up'])} ×" if system["shape"] else NONE] for system in systems]
    for measure in measures:
        headings += [measure] + (["% of teacher"] if measure == measures[0] else [])
        whole = statistics.fmean(teacher["seeds"][measure])
        for system, row in zip(systems, rows):
            values = system["seeds"][measure]
            mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
            marks = "".join(mark for mark, reference in (("†", "teacher"), ("‡", "BM25"))
                            if differs(results, reference, measure, system["name"]))
            row.append(f"{mean:.4f}{marks}" + (f" ± {spread:.4f}" if spread is not None else ""))
            if measure == measures[0]:
                row.append(f"{100 * mean / whole:.1f}" if whole else NONE)
    return markdown(headings, rows)


def differs(results: dict, reference: str, measure: str, name: str) -> bool:
    found = results["comparisons"][reference][measure].get(name)
    return bool(found) and verdict(found) != UNDECIDED


def differences_table(results: dict) -> str:
    """Every comparison of the three families, by the first measure."""
    measure, rows = results["settings"]["measures"][0], []
    for reference, by_measure in results["comparisons"].items():
        for name, found in by_measure[measure].items():
            first, second = (name, reference) if reference in ("BM25", "teacher") else (reference, name)
            low, high = found["interval"]
            rows.append([title(results, first), f"less {title(results, second)}",
                         f"{found['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}",
                         f"{found['wins']}/{found['ties']}/{found['losses']}", p_value(found["holm"][TEST]),
                         verdict(found)])
    return markdown(["system", "", measure, "95 % interval", "wins/ties/losses", "p (Holm)", ""], rows)


def p_value(p: float | None) -> str:
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def verdict(found: dict) -> str:
    p = found["holm"][TEST]
    if p is None or p >= LEVEL:
        return UNDECIDED
    return "better" if found["difference"] > 0 else "worse"


def tuning_table(results: dict) -> str:
    """nDCG@10 of each method at each learning rate on the dev queries, the chosen one in bold."""
    rows: dict[tuple[str, str], list[str]] = {}
    for run in results["tuned"]:
        value, rate = f"**{run['dev']:.4f}**" if run["chosen"] else f"{run['dev']:.4f}", f"{run['learning_rate']:g}"
        rows.setdefault((run["shape"], run["method"]), []).append(f"{value} ({rate})")
    return markdown(["method", "shape", "nDCG@10 (learning rate)"],
                    [[title(results, method), shape, ", ".join(cells)] for (shape, method), cells in rows.items()])


def gradients_table(results: dict) -> str:
    """Norm of each loss term's gradient, as first and as last logged: which term a student listens to."""
    rows = []
    for curve in results["curves"]:
        cells = []
        for term in TERMS:
            norms = [row[f"{term}_grad"] for row in curve["rows"] if row.get(f"{term}_grad")]
            cells.append(f"{norms[0]:.2g} → {norms[-1]:.2g}" if norms else NONE)
        rows.append([title(results, curve["method"]), curve["shape"], *cells])
    return markdown(["method", "shape", *(name for name, _ in TERMS.values())], rows)


def text(results: dict) -> str:
    """The tables, and what a reader must know to judge them."""
    dev, settings = results["dev"], results["settings"]
    parts = [f"On the {dev['queries']} dev queries, candidates: BM25's first {settings['dev_depth']}:",
             markdown(["", "nDCG@10"], [[name, f"{value:.4f}"] for name, value in dev["nDCG@10"].items()])]
    if results["tuned"]:
        parts += ["Each method there, by learning rate (first seed, chosen in bold):", tuning_table(results),
                  "Norm of the gradient of each loss term by itself, without its weight, as first and as last logged "
                  "(first seed, chosen learning rate):", gradients_table(results)]
    if "systems" not in results:
        return "\n\n".join(parts) + "\n"
    measure = settings["measures"][0]
    against = results["comparisons"]["BM25"][measure]["teacher"]
    if against["difference"] <= 0:
        judged = "**The teacher is worse than BM25: whatever its students retain of it, this is no success.**"
    elif verdict(against) == UNDECIDED:
        judged = "The teacher is not significantly better than BM25 here, which bounds what its students can show."
    else:
        judged = "The teacher is significantly better than BM25."
    return "\n\n".join([
        f"{results['queries']} test queries, {len(settings['seeds'])} seeds, candidates: BM25's first "
        f"{settings['test_depth']}. {judged}",
        effectiveness_table(results),
        f"± standard deviation over the seeds. † differs from the teacher, ‡ from BM25: paired t-test over the queries "
        f"of the means over the seeds, p < {LEVEL} after Holm's correction over all rows by measure. Pairs per second, "
        f"and the speed-up round by round: {results['speed_note']}",
        differences_table(results),
        "Intervals are over the queries, for these seeds, and each by itself; p and verdict after Holm's correction "
        "over the comparisons with the same system: an interval may leave out 0 where the two cannot be told apart.",
        *parts]) + "\n"


def write_all(results: dict, name: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_writer(directory / f"{name}.md") as handle:
        handle.write(text(results))
    if results["curves"]:
        losses_picture(results, directory / f"{name}-losses.png")
    if "systems" in results:
        effectiveness_picture(results, directory / f"{name}.png")
    say(f"tables       {directory / name}.md")


def filled(document: str, name: str, tables: str) -> str:
    """The document with these tables between the marks of a study. Raises ValueError if they are not there once."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"expected the lines {begin.strip()} and {end} once each")
    before, _, rest = document.partition(begin)
    return f"{before}{begin}\n{tables}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    args, problems, studies = parse_args(), Problems(), {}
    document = args.document.read_text(encoding="utf-8") if args.document and check_input_file(
        args.document, problems, "document") else ""
    for path in args.results:
        if check_input_file(path, problems, "results"):
            if path.stem in studies:
                problems.add(f"{path}: is called as another results file; rename one, tables are named after them")
            try:
                studies[path.stem] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                problems.add(f"{path}: is not JSON ({error}); name a results.json of replicate.py")
    problems.raise_if_any()
    for name, results in studies.items():
        try:
            write_all(results, name, args.output_dir)
            document = filled(document, name, text(results)) if args.document else ""
        except KeyError as error:
            raise UserError(f"{name}.json: has no {error}; name a results.json of replicate.py") from None
        except ValueError as error:
            raise UserError(f"{args.document}: {error}") from None
    if args.summary:
        write_summary(list(studies.values()), args.summary)
    if args.document:
        with atomic_writer(args.document) as handle:
            handle.write(document)


if __name__ == "__main__":
    run_main(main)
