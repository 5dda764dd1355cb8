"""One table and one picture of several rankers: effectiveness, size, speed, and what students retain of their teacher.

    python report.py --qrels qrels.txt --system BM25 bm25.txt --system teacher runs/teacher.trec teacher_dir \\
        --system "student 3/384" runs/student.trec student_dir --baseline BM25 \\
        --measures nDCG@10 RR@10 AP --features_file test.pkl --output_dir report

In: --system NAME RUN [MODEL] for each row: what to call it, its TREC run (query_id Q0 document_id rank score run_tag)
and, for rankers that are BERT models, the model (directory or Hugging Face hub id); --qrels (query_id 0 document_id
grade); --features_file, pairs to measure speed on (tokenize_to_features.py --set_name test).
Out, in --output_dir: table.md (printed too), table.tex (LaTeX, package booktabs), effectiveness.png (the first measure
against speed), report.json (all figures: every round, every p, arguments, versions, machine, reranker.py's records).

Columns: layers/width and parameters of the model; pairs per second, and how many times the teacher's; each measure, and
in % of the teacher's. The teacher is the first system with a model, or --teacher NAME.

Averages are over the judged queries that are in all runs; with --complete over all judged queries, those missing from a
run as 0. Daggers mark what differs from the teacher, double daggers what differs from the --baseline: two-sided paired
t-test, or randomization test (--test), over the queries; p < 0.05 after Holm's correction over all systems that are
compared with the same one by the same measure. See also msmarco_mrr_eval.py --compare.

With --features_file speed is measured here: --speed_pairs pairs at equal distances in the file, scored by all models in
turn, --speed_rounds times; median. Without it, it is what reranker.py recorded beside the scores (student.tsv.run.json
for student.trec, scores.tsv.run.json for run.trec): of another moment, maybe of another machine.
"""
import argparse
import datetime
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from simplified_tinybert.common.checks import check_model_fits
from simplified_tinybert.common.device import keep_freed_memory, select_device
from simplified_tinybert.common.files import (
    Problems,
    atomic_writer,
    check_input_file,
    check_output_files,
    run_main,
    say,
)
from simplified_tinybert.common.records import plain
from simplified_tinybert.common.text import argument_text
from simplified_tinybert.data.features import Examples, FeatureSummary, summarise
from simplified_tinybert.model.precision import select_precision, warn_if_emulated
from simplified_tinybert.ranking import significance as statistics
from simplified_tinybert.ranking.measures import Qrels, Run, check_common_queries, check_grades
from simplified_tinybert.ranking.plots import Point, effectiveness_figure, save
from simplified_tinybert.ranking.significance import LEVEL, TESTS, Comparison
from simplified_tinybert.ranking.speed import machine, sample_pairs
from simplified_tinybert.ranking.systems import System, choose_measures, evaluate_systems, find_systems, measure_systems
from simplified_tinybert.ranking.tables import latex, markdown, number
from simplified_tinybert.ranking.trec import read_qrels, read_run

SPEED_PAIRS = {"cpu": 256, "cuda": 16384}
NONE = "–"
OUTPUTS = ("table.md", "table.tex", "effectiveness.png", "report.json")
MARKS = {"teacher": "†", "baseline": "‡"}
TEST_NAMES = {"t-test": "paired t-test", "randomization": "paired randomization test"}

Comparisons = dict[str, dict[str, dict[str, Comparison]]]       # teacher or baseline → measure → system


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--qrels", type=Path, required=True, help="relevance judgements")
    add("--system", nargs="+", action="append", required=True, metavar=("NAME RUN", "MODEL"),
        help="a row: name, TREC run and, if there is one, model; once for each system, in the order of the table")
    add("--teacher", type=argument_text, metavar="NAME",
        help="what the others are compared with (default: the first system with a model)")
    add("--baseline", type=argument_text, metavar="NAME",
        help="another system to compare all others with, such as BM25")
    add("--output_dir", type=Path, required=True, help="directory for the results; a report in it is replaced")
    add("--measures", nargs="+", default=["nDCG@10", "RR@10", "AP"], metavar="M",
        help="MRR, MRR@10, MRR@100 or measures of ir_measures; the first is drawn (default: nDCG@10 RR@10 AP)")
    add("--relevance_level", type=int, default=1, help="lowest grade that counts as relevant (default: 1)")
    add("--complete", action="store_true", help="average over all judged queries, missing ones as 0")
    add("--test", choices=TESTS, default="t-test", help="whose p the marks follow (default: t-test)")
    add("--permutations", type=int, default=statistics.PERMUTATIONS, help="of the randomization test (default: 100000)")
    add("--seed", type=int, default=42, help="of the randomization test (default: 42)")
    add("--features_file", type=Path, nargs="+", default=[], help="pairs to measure speed on; without, recorded speeds")
    add("--speed_pairs", type=int, help="pairs to score (default: 256 on a CPU, 16384 on CUDA)")
    add("--speed_rounds", type=int, default=5, help="times that each model scores them (default: 5)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, or a CUDA index such as 0 (default: auto)")
    add("--fp16", action="store_true", help="measure speed in float16 (CUDA)")
    add("--bf16", action="store_true", help="measure speed in bfloat16")
    add("--int8", action="store_true", help="measure speed with 8-bit matrix products (CPU)")
    return parser.parse_args()


def check_flags(args: argparse.Namespace, systems: list[System], device: torch.device, problems: Problems) -> None:
    """Complain about numbers and names that cannot be; fill in the teacher's name."""
    rules = [("relevance_level", 1), ("permutations", 1), ("seed", 0), ("speed_rounds", 1), ("speed_pairs", 1)]
    for name, least in rules:
        if getattr(args, name) is not None and getattr(args, name) < least:
            problems.add(f"--{name} {getattr(args, name)}: expected {least} or more")
    if args.int8 and (args.fp16 or args.bf16 or device.type != "cpu"):
        problems.add("--int8: runs on a CPU alone and not with --fp16 or --bf16; add --device cpu, or leave it out")
    names = [system.name for system in systems]
    for flag in ("teacher", "baseline"):
        if getattr(args, flag) not in (None, *names):
            problems.add(f"--{flag} {getattr(args, flag)!r}: is none of the systems ({', '.join(names)})")
    args.teacher = args.teacher or next((system.name for system in systems if system.model), None)
    if not args.teacher:
        problems.add("no system has a model, so none can be taken for the teacher; name it: --teacher NAME")
    elif args.baseline == args.teacher:
        problems.add(f"--baseline {args.baseline!r}: is the teacher; name another system, or leave it out")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        problems.add(f"{args.output_dir}: is a file; name a directory")
    elif args.output_dir.is_dir():
        check_output_files([args.output_dir / name for name in OUTPUTS], problems)


def read_inputs(args: argparse.Namespace, systems: list[System], problems: Problems) \
        -> tuple[Qrels, dict[Path, Run], FeatureSummary | None]:
    """Judgements, runs by file, and the features if there are any; all that is wrong with them is added to `problems`.

    Nothing is worth using if there was a problem.
    """
    qrels, runs, summary = {}, {}, None
    if check_input_file(args.qrels, problems, "relevance judgements"):
        qrels = read_qrels(args.qrels, problems)
    for path in dict.fromkeys(system.run for system in systems):
        if check_input_file(path, problems, "run"):
            runs[path] = read_run(path, problems)
    if not problems.count:
        check_common_queries(args.qrels, qrels, runs, problems)
    if args.features_file:
        summary = summarise(args.features_file, problems)
        for system in systems:
            if summary and system.directory:
                check_model_fits(system.name, system.directory, system.config, summary, summary.header["max_seq_length"],
                                 problems)
        if not any(system.model for system in systems):
            problems.add("--features_file: no system has a model whose speed could be measured; leave it out, or name "
                         "models: --system NAME RUN MODEL")
    return qrels, runs, summary


def compare_systems(args: argparse.Namespace, systems: list[System], measures: list[str]) -> Comparisons:
    """Every other system less the teacher, and less the baseline, with Holm's correction over the systems."""
    found = {}
    for role in MARKS:
        reference = next((system for system in systems if system.name == getattr(args, role)), None)
        for measure in measures if reference else []:
            family = {}
            for system in systems:
                values, others = system.values[measure], reference.values[measure]
                if system is not reference and values.keys() & others.keys():
                    family[system.name] = statistics.compare(values, others, args.permutations, args.seed)
            statistics.apply_holm(list(family.values()))
            found.setdefault(role, {})[measure] = family
    return found


def cells(systems: list[System], teacher: System, measures: list[str], compared: Comparisons, test: str) \
        -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table."""
    headings = ["system", "layers/width", "parameters", "pairs/s", "speed-up"]
    rows = []
    for system in systems:
        rate, faster, config = system.speed(), system.speed_up(teacher), system.config
        rows.append([system.name, f"{config.num_hidden_layers}/{config.hidden_size}" if config else NONE,
                     f"{system.parameters:,}" if system.parameters else NONE, number(rate) if rate else NONE,
                     f"{number(faster)} ×" if faster else NONE])
    for measure in measures:
        headings += [measure, "% of teacher"]
        for system, row in zip(systems, rows):
            average, share = system.averages[measure], system.retained(teacher, measure)
            row += [NONE if average is None else f"{average:.4f}{marks(system.name, measure, compared, test)}",
                    NONE if share is None else f"{100 * share:.1f}"]
    return headings, rows


def marks(name: str, measure: str, compared: Comparisons, test: str) -> str:
    """The signs of those from which this system differs significantly."""
    found = [(role, families[measure].get(name)) for role, families in compared.items()]
    p_values = [(role, comparison.holm[test]) for role, comparison in found if comparison]
    return "".join(MARKS[role] for role, p in p_values if p is not None and p < LEVEL)


def notes(args: argparse.Namespace, systems: list[System], queries: list[str], pairs: Examples | None,
          facts: dict[str, str]) -> list[str]:
    """What a reader must know to judge the table."""
    how = "all judged ones, those missing from a run as 0" if args.complete else "judged and in all runs"
    sentences = [f"Averages over {len(queries)} queries ({how})."]
    if len(systems) > 1:
        signs = ", ".join(f"{MARKS[role]} from {getattr(args, role)}" for role in MARKS if getattr(args, role))
        sentences.append(f"Differs significantly {signs}: two-sided {TEST_NAMES[args.test]}, p < {LEVEL} after Holm's "
                         f"correction over the {len(systems) - 1} systems compared with the same one by the same "
                         f"measure.")
    timed = [system for system in systems if system.rates]
    return sentences + [speed_note(timed, pairs, facts)] if timed else sentences


def speed_note(timed: list[System], pairs: Examples | None, facts: dict[str, str]) -> str:
    """Where the speeds come from, and how far they can be trusted."""
    if pairs:
        spread = "; ".join(f"{system.name} {number(min(system.rates))} – {number(max(system.rates))}"
                           for system in timed)
        device = facts["GPU"] if facts["GPU"] != "none used" else f"{facts['CPU']}, cores {facts['cores']}"
        return (f"Pairs per second: {timed[0].where} ({device}), median of {len(timed[0].rates)} rounds in turn over "
                f"the same {len(pairs):,} pairs of {pairs.lengths.mean():.0f} tokens on average; slowest and "
                f"fastest round: {spread}.")
    alike = len({system.where for system in timed}) == 1
    places = timed[0].where if alike else "; ".join(f"{system.name}: {system.where}" for system in timed)
    return (f"Pairs per second as reranker.py recorded them when it made the runs ({places}), one pass each, not side "
            f"by side.")


def write_report(args: argparse.Namespace, systems: list[System], measures: list[str], queries: list[str],
                 compared: Comparisons, pairs: Examples | None, facts: dict[str, str]) -> None:
    """All four files; the table goes to stdout too."""
    teacher = next(system for system in systems if system.name == args.teacher)
    headings, rows = cells(systems, teacher, measures, compared, args.test)
    under = notes(args, systems, queries, pairs, facts)
    table = "\n\n".join([markdown(headings, rows), *under]) + "\n"
    content = {"date": datetime.datetime.now().isoformat(timespec="seconds"),
               "arguments": {name: plain(value) for name, value in vars(args).items()},
               "versions": {"python": platform.python_version(), "torch": torch.__version__,
                            "transformers": transformers.__version__},
               "machine": facts, "queries": queries, "notes": under,
               "speed_pairs": len(pairs) if pairs else None,
               "systems": [as_json(system, teacher, measures) for system in systems],
               "comparisons": {role: {measure: {name: asdict(found) for name, found in family.items()}
                                      for measure, family in families.items()} for role, families in compared.items()}}
    picture = args.output_dir / "effectiveness.png"
    for name, text in (("table.md", table), ("table.tex", latex(headings, rows, "Effectiveness and cost.", under)),
                       ("report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")):
        with atomic_writer(args.output_dir / name) as handle:
            handle.write(text)
    points = [Point(system.name, system.averages[measures[0]], system.speed(), system is teacher)
              for system in systems if system.averages[measures[0]] is not None]
    if any(point.speed for point in points):
        save(effectiveness_figure(points, measures[0], f"{measures[0]} over {len(queries)} queries"), picture)
    else:
        picture.unlink(missing_ok=True)                 # of another report
        say("no speeds are known, so no picture is drawn; name --features_file to measure them")
    print(f"{args.output_dir / 'table.md'}:", table, sep="\n", end="")


def as_json(system: System, teacher: System, measures: list[str]) -> dict:
    config = system.config
    return {"name": system.name, "run": str(system.run), "model": system.model,
            "layers": config.num_hidden_layers if config else None, "width": config.hidden_size if config else None,
            "parameters": system.parameters, "pairs_per_second": system.speed(), "rounds": system.rates,
            "speed_of": system.where, "speed_up": system.speed_up(teacher),
            "averages": {measure: system.averages[measure] for measure in measures},
            "retained": {measure: system.retained(teacher, measure) for measure in measures},
            "values": {measure: system.values[measure] for measure in measures}, "record": system.record or None}


def main() -> None:
    args, problems = parse_args(), Problems()
    device = select_device(args.device)
    keep_freed_memory(device)
    dtype = select_precision(args.fp16, args.bf16, device, problems)
    systems = find_systems(args.system, problems)
    check_flags(args, systems, device, problems)
    measures, others = choose_measures(args.measures, args.relevance_level, problems)
    qrels, runs, summary = read_inputs(args, systems, problems)
    check_grades(others, args.qrels, qrels, runs, args.complete, problems)
    problems.raise_if_any()
    if summary:
        warn_if_emulated(dtype, device, "leave the flag out, or use --int8")

    queries = evaluate_systems(systems, qrels, runs, others, args.relevance_level, args.complete)
    args.output_dir.mkdir(parents=True, exist_ok=True)          # fails now if at all, not after minutes
    compared, pairs, facts = compare_systems(args, systems, measures), None, machine(device)
    if summary:
        pairs = sample_pairs(args.features_file, summary.examples, args.speed_pairs or SPEED_PAIRS[device.type])
        measure_systems(systems, pairs, device, dtype, args.int8, args.speed_rounds)
    write_report(args, systems, measures, queries, compared, pairs, facts)


if __name__ == "__main__":
    run_main(main)
