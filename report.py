"""Compare rankers in one table and one figure: effectiveness, size, speed, share of the teacher's effectiveness.

    python report.py --qrels qrels.txt --system BM25 bm25.txt --system teacher runs/teacher.trec teacher_dir \\
        --system "student 3/384" runs/student.trec student_dir --baseline BM25 \\
        --measures nDCG@10 RR@10 AP --features_file test.pkl --output_dir report

In: --system NAME RUN [MODEL], once for each row: a name, a TREC run (query_id Q0 document_id rank score run_tag) and,
for BERT rankers, the model (directory or Hugging Face hub id); --qrels (query_id 0 document_id grade); --features_file,
pairs on which speed is measured (tokenize_to_features.py --set_name test).
Out, in --output_dir: table.md (also printed), table.tex (LaTeX, package booktabs), effectiveness.png (the first measure
against speed), report.json (all numbers: every round, every p, arguments, versions, machine, records of reranker.py).

Columns: layers, hidden size and parameters of the model; pairs per second and speed-up over the teacher; each measure
and its percentage of the teacher's. The teacher is --teacher NAME, by default the first system with a model.

Averages are over the judged queries that are in all runs. With --complete, they are over all judged queries, and a
query that a run lacks counts as 0. A dagger marks a significant difference from the teacher, a double dagger one from
the --baseline: p < 0.05 after Holm's correction, in a two-sided paired t-test or randomization test (--test) over the
queries. The correction covers all systems that are compared with the same system by the same measure. See also
msmarco_mrr_eval.py --compare.

With --features_file, the models take turns: each scores the same --speed_pairs pairs of the file, evenly spaced,
--speed_rounds times. The table shows the median. Without it, speeds are those that reranker.py recorded with the scores
(student.tsv.run.json for student.trec, scores.tsv.run.json for run.trec), possibly on different days and machines.
"""
import argparse
import datetime
from dataclasses import asdict, dataclass
from pathlib import Path

from simplified_tinybert.checks.compatibility import check_model_fits
from simplified_tinybert.common.device import explain_full_memory, prepare_device, select_device
from simplified_tinybert.common.files import Problems, atomic_writer, check_output_files, check_ranges, run_main, say
from simplified_tinybert.common.records import record
from simplified_tinybert.common.text import argument_text
from simplified_tinybert.data.features import Examples, FeatureSummary, summarise
from simplified_tinybert.model.precision import select_precision, warn_if_slow
from simplified_tinybert.ranking.measures import check_grades, choose_measures
from simplified_tinybert.ranking.presentation import Point, effectiveness_figure, latex, markdown, number, save
from simplified_tinybert.ranking.significance import LEVEL, PERMUTATIONS, TESTS, Comparison, compare_pairs
from simplified_tinybert.ranking.speed import SPEED_PAIRS, machine, sample_pairs
from simplified_tinybert.ranking.systems import System, evaluate_systems, find_systems, measure_systems
from simplified_tinybert.ranking.trec import read_runs

NONE = "–"
OUTPUTS = ("table.md", "table.tex", "effectiveness.png", "report.json")
MARKS = {"teacher": "†", "baseline": "‡"}
TEST_NAMES = {"t-test": "paired t-test", "randomization": "paired randomization test"}

Comparisons = dict[str, dict[str, dict[str, Comparison]]]       # teacher or baseline → measure → system


@dataclass(frozen=True)
class Report:
    """The content of all output files."""
    systems: list[System]
    teacher: System
    measures: list[str]
    queries: list[str]                  # the averaged queries
    comparisons: Comparisons
    pairs: Examples | None              # that speed was measured on; None: speeds were recorded by reranker.py
    machine: dict[str, str]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--qrels", type=Path, required=True, help="relevance judgements")
    add("--system", nargs="+", action="append", required=True, metavar=("NAME RUN", "MODEL"),
        help="a row: name, TREC run and optionally a model; once for each system, in the order of the table")
    add("--teacher", type=argument_text, metavar="NAME",
        help="system to compare the others with (default: the first system with a model)")
    add("--baseline", type=argument_text, metavar="NAME", help="second system to compare the others with, e.g. BM25")
    add("--output_dir", type=Path, required=True, help="output directory; an earlier report there is replaced")
    add("--measures", nargs="+", default=["nDCG@10", "RR@10", "AP"], metavar="M",
        help="MRR, MRR@10, MRR@100 or measures of ir_measures; the first is plotted (default: nDCG@10 RR@10 AP)")
    add("--relevance_level", type=int, default=1, help="lowest grade that counts as relevant (default: 1)")
    add("--complete", action="store_true", help="average over all judged queries; missing ones count as 0")
    add("--test", choices=TESTS, default="t-test", help="test that decides the daggers (default: t-test)")
    add("--permutations", type=int, default=PERMUTATIONS,
        help="random sign assignments of the randomization test (default: %(default)s)")
    add("--seed", type=int, default=42, help="random seed of the randomization test (default: 42)")
    add("--features_file", type=Path, nargs="+", default=[], help="pairs to measure speed on (else: recorded speeds)")
    add("--speed_pairs", type=int, help="pairs to score (default: 256 on a CPU, 16384 on CUDA)")
    add("--speed_rounds", type=int, default=5, help="how often each model scores them (default: 5)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, or a CUDA index such as 0 (default: auto)")
    add("--fp16", action="store_true", help="measure speed in float16 (CUDA)")
    add("--bf16", action="store_true", help="measure speed in bfloat16")
    add("--int8", action="store_true", help="measure speed with 8-bit matrix products (CPU)")
    return parser.parse_args()


def check_flags(args: argparse.Namespace, systems: list[System], problems: Problems) -> None:
    """Check values and names, and set args.teacher. Input errors are added to `problems`."""
    minimums = {"relevance_level": 1, "permutations": 1, "seed": 0, "speed_rounds": 1, "speed_pairs": 1}
    check_ranges(args, problems, [(name, getattr(args, name) is None or getattr(args, name) >= minimum,
                                   f"{minimum} or more") for name, minimum in minimums.items()])
    for flag in ("fp16", "bf16", "int8", "speed_pairs"):
        if getattr(args, flag) and not args.features_file:
            problems.add(f"--{flag}: is for measuring speed; add --features_file, or leave the flag out")
    names = [system.name for system in systems]
    for flag in ("teacher", "baseline"):
        if getattr(args, flag) not in (None, *names):
            problems.add(f"--{flag} {getattr(args, flag)!r}: unknown system; expected one of {', '.join(names)}")
    args.teacher = args.teacher or next((system.name for system in systems if system.model), None)
    if not args.teacher:
        problems.add("no system has a model, so the teacher is unknown; set it with --teacher NAME")
    elif args.baseline == args.teacher:
        problems.add(f"--baseline {args.baseline!r}: is the teacher; choose another system, or leave it out")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        problems.add(f"{args.output_dir}: is a file; expected a directory")
    elif args.output_dir.is_dir():
        check_output_files([args.output_dir / name for name in OUTPUTS], problems)


def check_features(paths: list[Path], systems: list[System], problems: Problems) -> FeatureSummary | None:
    """Check that the models can read the features. Input errors are added to `problems`."""
    summary = summarise(paths, problems)
    for system in systems:
        if summary and system.directory:
            length = summary.header["max_seq_length"]
            check_model_fits(system.name, system.directory, system.config, summary, length, problems)
    if not any(system.model for system in systems):
        problems.add("--features_file: no system has a model whose speed could be measured; leave it out, or add "
                     "models: --system NAME RUN MODEL")
    return summary


def compare_systems(args: argparse.Namespace, systems: list[System], measures: list[str]) -> Comparisons:
    """Compare every other system with the teacher and with the baseline."""
    references = {role: system for role in MARKS for system in systems if system.name == getattr(args, role)}
    return {role: {measure: compare_pairs({system.name: (system.values[measure], reference.values[measure])
                                           for system in systems if system is not reference},
                                          args.permutations, args.seed) for measure in measures}
            for role, reference in references.items()}


def table_cells(report: Report, test: str) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the table."""
    headings = ["system", "layers/hidden size", "parameters", "pairs/s", "speed-up"]
    rows = []
    for system in report.systems:
        speed, speed_up, config = system.speed(), system.speed_up(report.teacher), system.config
        rows.append([system.name, f"{config.num_hidden_layers}/{config.hidden_size}" if config else NONE,
                     f"{system.parameters:,}" if system.parameters else NONE, number(speed) if speed else NONE,
                     f"{number(speed_up)} ×" if speed_up else NONE])
    for measure in report.measures:
        headings += [measure, "% of teacher"]
        for system, row in zip(report.systems, rows):
            average, share = system.averages[measure], system.retained(report.teacher, measure)
            marks = significance_marks(system.name, measure, report.comparisons, test)
            row += [NONE if average is None else f"{average:.4f}{marks}",
                    NONE if share is None else f"{100 * share:.1f}"]
    return headings, rows


def significance_marks(name: str, measure: str, comparisons: Comparisons, test: str) -> str:
    """Return the daggers of a system."""
    return "".join(MARKS[role] for role, families in comparisons.items()
                   if name in families[measure] and families[measure][name].significant(test))


def notes(args: argparse.Namespace, report: Report) -> list[str]:
    """Return the notes below the table."""
    which = "all judged ones, missing ones count as 0" if args.complete else "judged and in all runs"
    sentences = [f"Averages over {len(report.queries)} queries ({which})."]
    if len(report.systems) > 1:
        marks = ", ".join(f"{MARKS[role]} from {getattr(args, role)}" for role in MARKS if getattr(args, role))
        sentences.append(f"Significant difference {marks}: two-sided {TEST_NAMES[args.test]}, p < "
                         f"{LEVEL} after Holm's correction over the {len(report.systems) - 1} systems compared with "
                         f"the same system by the same measure.")
    timed = [system for system in report.systems if system.rates]
    return sentences + [speed_note(timed, report)] if timed else sentences


def speed_note(timed: list[System], report: Report) -> str:
    """Describe how the speeds were measured."""
    if report.pairs:
        ranges = "; ".join(f"{system.name} {number(min(system.rates))} – {number(max(system.rates))}"
                           for system in timed)
        device = report.machine["GPU"]
        if device == "none used":
            device = f"{report.machine['CPU']}, cores {report.machine['cores']}"
        return (f"Pairs per second: {timed[0].where} ({device}), median of {len(timed[0].rates)} rounds in turn over "
                f"the same {len(report.pairs):,} pairs with an average of {report.pairs.lengths.mean():.0f} tokens; "
                f"slowest and fastest round: {ranges}.")
    same = len({system.where for system in timed}) == 1
    where = timed[0].where if same else "; ".join(f"{system.name}: {system.where}" for system in timed)
    return f"Pairs per second: recorded by reranker.py in one pass per run ({where}), not side by side."


def write_report(args: argparse.Namespace, report: Report) -> None:
    """Write all four files, and print the table."""
    headings, rows = table_cells(report, args.test)
    footnotes = notes(args, report)
    table = "\n\n".join([markdown(headings, rows), *footnotes]) + "\n"
    content = {"date": datetime.datetime.now().isoformat(timespec="seconds"),
               "machine": report.machine, "queries": report.queries, "notes": footnotes,
               "speed_pairs": len(report.pairs) if report.pairs else None,
               "systems": [system.as_json(report.teacher, report.measures) for system in report.systems],
               "comparisons": {role: {measure: {name: asdict(comparison) for name, comparison in family.items()}
                                      for measure, family in families.items()}
                               for role, families in report.comparisons.items()}}
    record(args.output_dir / "report.json", args, **content)
    for name, text in (("table.md", table), ("table.tex", latex(headings, rows, "Effectiveness and cost.", footnotes))):
        with atomic_writer(args.output_dir / name) as handle:
            handle.write(text)
    figure, measure = args.output_dir / "effectiveness.png", report.measures[0]
    points = [Point(system.name, system.averages[measure], system.speed(), system is report.teacher)
              for system in report.systems if system.averages[measure] is not None]
    if any(point.speed for point in points):
        save(effectiveness_figure(points, measure, f"{measure} over {len(report.queries)} queries"), figure)
    else:
        figure.unlink(missing_ok=True)                  # it belongs to an earlier report
        say("no speeds are known, so no figure is drawn; use --features_file to measure them")
    print(f"{args.output_dir / 'table.md'}:", table, sep="\n", end="")


def main() -> None:
    args, problems = parse_args(), Problems()
    device = select_device(args.device)
    prepare_device(device)
    dtype = select_precision(args, device, problems)
    systems = find_systems(args.system, problems)
    check_flags(args, systems, problems)
    measures, others = choose_measures(args.measures, args.relevance_level, problems)
    qrels, runs = read_runs(args.qrels, [system.run for system in systems], problems)
    summary = check_features(args.features_file, systems, problems) if args.features_file else None
    check_grades(others, args.qrels, qrels, runs, args.complete, problems)
    problems.raise_if_any()
    if summary:
        warn_if_slow(dtype, device, "leave the flag out, or use --int8")

    queries = evaluate_systems(systems, qrels, runs, others, args.relevance_level, args.complete)
    args.output_dir.mkdir(parents=True, exist_ok=True)          # fail here rather than after minutes of measuring
    comparisons, pairs, hardware = compare_systems(args, systems, measures), None, machine(device)
    if summary:
        pairs = sample_pairs(args.features_file, summary.examples, args.speed_pairs or SPEED_PAIRS[device.type])
        with explain_full_memory("compare fewer systems, or use --device cpu"):
            measure_systems(systems, pairs, device, dtype, args.int8, args.speed_rounds)
    teacher = next(system for system in systems if system.name == args.teacher)
    write_report(args, Report(systems, teacher, measures, queries, comparisons, pairs, hardware))


if __name__ == "__main__":
    run_main(main)
