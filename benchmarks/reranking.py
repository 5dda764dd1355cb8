"""Re-ranking speed beside what a user would otherwise run, with the same weights and the same scores.

    python -m benchmarks.reranking
    python -m benchmarks.reranking --models 3x384 12x768 --raw_data_file pairs.tsv --device 0

In: nothing, or own pairs (query_id#passage_id <tab> query <tab> passage); models have random weights.
Out, in --output_dir: reranking.md (tables), reranking.json (every single time), reranking.png. Compared are

    original                 as the original scores features: eager attention, all positions of all layers, scores and
                             hidden states of all layers kept until the last, batches of 100 padded to 256
    sentence-transformers    CrossEncoder.predict on texts, with the fastest of --st_batch_sizes; bf16: bfloat16 weights
    ours                     what reranker.py does with features; bf16: with --bf16, int8: with --int8 (CPU)
    ours, from texts         with what tokenize_to_features.py does before that

Parts (--parts): ways (all of them on real pairs, for each model), lengths (the first model at equal lengths), start
(reranker.py on 10 pairs, in a process of its own).
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import common, ours, pictures, samples
from benchmarks.ways import (
    ORIGINAL,
    OURS,
    OURS_BF16,
    OURS_INT8,
    OURS_TEXTS,
    PEER,
    PEER_BF16,
    Sample,
    equal_sample,
    real_sample,
    ways,
)
from simplified_tinybert.common.device import select_device
from simplified_tinybert.common.files import run_main, say
from simplified_tinybert.model.pretrained import read_config
from simplified_tinybert.ranking.speed import machine
from simplified_tinybert.ranking.tables import markdown, number

PAIRS = {"cpu": {"3x384": 200, "6x768": 32, "12x768": 24}, "cuda": {"3x384": 8192, "6x768": 4096, "12x768": 4096}}
ALL = (ORIGINAL, PEER, PEER_BF16, OURS, OURS_TEXTS, OURS_BF16, OURS_INT8)
LENGTHS = (64, 128, 256, 512)

PEER_SCRIPT = """
from sentence_transformers import CrossEncoder
pairs = [line.rstrip("\\n").split("\\t")[1:3] for line in open("ten.tsv", encoding="utf-8")]
print(CrossEncoder("{directory}", max_length=256).predict(pairs, apply_softmax=True))
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.common_arguments(parser)
    add = parser.add_argument
    add("--models", nargs="+", default=["3x384", "6x768", "12x768"],
        help="LAYERSxWIDTH, the teacher last (default: 3x384 6x768 12x768)")
    add("--pairs", type=int, help="pairs of a measurement (CPU: 200 for 3x384, 32 for 6x768, else 24; CUDA: thousands)")
    add("--rounds", type=int, default=3, help="how often each way runs, in turn (default: 3)")
    add("--st_batch_sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="tried for sentence-transformers")
    add("--parts", nargs="+", choices=("ways", "lengths", "start"), default=["ways", "lengths", "start"],
        help="what to measure (default: all)")
    args = parser.parse_args()
    if args.quick:
        args.models, args.pairs, args.rounds, args.st_batch_sizes = ["1x48", "2x96"], 10, 1, [8, 16]
    return args


def pairs_of(args: argparse.Namespace, name: str, device: torch.device) -> int:
    """Pairs of a measurement: fewer for large models on a CPU, which take long."""
    return args.pairs or PAIRS[device.type].get(name, 24)


def measure_ways(args: argparse.Namespace, name: str, directory: Path, pairs: Sample, device: torch.device) -> dict:
    config, sample = read_config(directory), pairs.part(pairs_of(args, name, device))
    scores: dict[str, np.ndarray] = {}
    say(f"{name}: {len(sample.lines)} pairs, {sample.examples.lengths.mean():.1f} tokens on average")

    def keep(way: str, run: Callable[[], np.ndarray]) -> None:
        scores[way] = run()
    compared = {way: partial(keep, way, run)
                for way, run in ways(directory, sample, device, args.st_batch_sizes, ALL).items()}
    if device.type == "cuda":                           # where the first call is much slower than the others
        common.interleave(compared, 1, device)
    rates = [common.best_rates(device, config.hidden_size, args.quick)]
    times, lengths = common.interleave(compared, args.rounds, device), sample.examples.lengths
    rates.append(common.best_rates(device, config.hidden_size, args.quick))
    return {"pairs": len(lengths), "mean_length": float(lengths.mean()), "flops": common.forward_flops(config, lengths),
            "rates": {kind: max(rate[kind] for rate in rates) for kind in rates[0]}, "times": times,
            "scores_spread": float(np.std(scores[ORIGINAL])),
            "difference": {way: float(np.abs(values - scores[ORIGINAL]).max()) for way, values in scores.items()}}


def ways_table(name: str, found: dict) -> str:
    rows, times = [], found["times"]
    for way, spent in times.items():
        rate = found["flops"] / statistics.median(spent)
        best = found["rates"]["bf16" if "bf16" in way else "float32"]
        rows.append([way, common.spread([found["pairs"] / value for value in spent]),
                     common.ratio(times[ORIGINAL], spent), common.ratio(times[PEER], spent) if PEER in times else "–",
                     f"{rate / 1e9:,.0f}", f"{100 * rate / best:.0f} %", f"{found['difference'][way]:.1e}"])
    title = (f"## {name}: {found['pairs']} pairs, {found['mean_length']:.0f} tokens on average\n\n"
             f"Matrix products on this machine at this width: {common.describe_rates(found['rates'])}. A pair needs "
             f"{found['flops'] / found['pairs'] / 1e9:.2f} GFLOP. Standard deviation of the scores: "
             f"{found['scores_spread']:.2f}.\n\n")
    return title + markdown(["way", "pairs/s", "× original", "× sentence-transformers", "GFLOP/s", "of the rate",
                                 "largest score difference"], rows)


def medians(found: dict) -> dict[str, float]:
    """Pairs per second of each way."""
    return {way: found["pairs"] / statistics.median(spent) for way, spent in found["times"].items()}


def teacher_table(measured: dict[str, dict]) -> str:
    """How many times faster than the teacher each student is, each way for itself."""
    *students, teacher = measured
    rows = []
    for way in (ORIGINAL, PEER, OURS, OURS_BF16):
        if way in measured[teacher]["times"]:
            base = medians(measured[teacher])[way]
            rows.append([way, number(base), *(f"{medians(measured[student])[way] / base:.1f} ×"
                                                     for student in students)])
    rows.append(["the paper", "–", *("15 ×" if student == "3x384" else "–" for student in students)])
    return f"## Students against the teacher {teacher}\n\n" + markdown(
        ["way", "teacher, pairs/s", *(f"{student} is faster by" for student in students)], rows)


def measure_lengths(args: argparse.Namespace, directory: Path, pairs: Sample,
                    device: torch.device) -> dict[str, dict[int, float]]:
    """Pairs per second of each way at each length: {way: {length: rate}}."""
    found: dict[str, dict[int, float]] = {}
    tokens = args.pairs * 64 if args.pairs else {"cpu": 8192, "cuda": 2 ** 20}[device.type]
    for length in LENGTHS[:2] if args.quick else LENGTHS:
        sample = equal_sample(pairs, directory, length, max(2, tokens // length))
        compared = ways(directory, sample, device, args.st_batch_sizes, (ORIGINAL, PEER, OURS, OURS_BF16))
        say(f"{length} tokens, {len(sample.lines)} pairs")
        for way, spent in common.interleave(compared, args.rounds, device).items():
            found.setdefault(way, {})[length] = len(sample.lines) / statistics.median(spent)
    return found


def lengths_table(name: str, found: dict[str, dict[int, float]]) -> str:
    lengths = list(next(iter(found.values())))
    return f"## {name}: pairs per second at equal lengths\n\n" + markdown(
        ["tokens", *map(str, lengths)],
        [[way, *(number(rate) for rate in rates.values())] for way, rates in found.items()])


def measure_start(args: argparse.Namespace, directory: Path, pairs: Sample, device: torch.device,
                  scratch: Path) -> dict[str, list[float]]:
    """Seconds of the parts of re-ranking 10 pairs, from starting Python to having the file."""
    samples.write_lines(scratch / "ten.tsv", pairs.lines[:10])
    command = ours.tokenize_command("test", scratch / "ten.tsv", scratch / "ten.pkl", directory, pairs.width)
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    found: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        start = time.perf_counter()
        parts = ours.start_up(directory, scratch / "ten.pkl", scratch / "ten.scores.tsv", device)
        whole = time.perf_counter() - start
        rest = whole - parts["imports"] - parts["model"] - parts["scoring"]
        for part, spent in (*parts.items(), ("rest", rest), ("whole", whole)):
            found.setdefault(part, []).append(spent)
        for part, code in (("torch", "import torch"), ("peer", PEER_SCRIPT.format(directory=directory))):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], cwd=scratch, capture_output=True)
            found.setdefault(part, []).append(time.perf_counter() - start if done.returncode == 0 else float("nan"))
    return found


def start_table(name: str, found: dict[str, list[float]]) -> str:
    rows = [("imports", "imports"), ("loading the model", "model"), ("scoring and writing 10 pairs", "scoring"),
            ("Python itself, checks, the rest", "rest"), ("**whole command**", "whole"),
            ("for comparison: `python -c \"import torch\"`", "torch"),
            ("for comparison: sentence-transformers, all of it", "peer")]
    return f"## reranker.py from start to end, 10 pairs, {name}\n\n" + markdown(
        ["part", "seconds"], [[title, common.spread(found[part])] for title, part in rows])


def draw(path: Path, measured: dict[str, dict], lengths: dict[str, dict[int, float]], name: str) -> None:
    panels = []
    if lengths:
        panels.append(pictures.Panel(f"Throughput against length, {name}", "pairs per second", "tokens of a pair",
                                     lines=lengths))
    if measured:
        shown = (ORIGINAL, PEER, OURS, OURS_BF16)
        bars = {model: {way: rate for way, rate in medians(found).items() if way in shown}
                for model, found in measured.items()}
        panels.append(pictures.Panel("Students and teacher, real pairs", "pairs per second", bars=bars))
    if panels:
        pictures.draw(path, panels)


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = select_device(args.device)
    facts = machine(device) | common.packing(device)
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = ours.vocabulary_directory(Path(scratch) / "vocabulary", args.vocab_file)
        pairs = real_sample(args.raw_data_file, vocabulary, max(pairs_of(args, name, device) for name in args.models))
        directories = {name: ours.make_model(Path(scratch) / name, *map(int, name.split("x")), vocabulary, pairs.examples)
                   for name in args.models}
        first, sections = args.models[0], []
        measured, lengths, start = {}, {}, {}
        if "ways" in args.parts:
            measured = {name: measure_ways(args, name, directory, pairs, device)
                        for name, directory in directories.items()}
            sections += [ways_table(name, found) for name, found in measured.items()] + [teacher_table(measured)]
        if "lengths" in args.parts:
            lengths = measure_lengths(args, directories[first], pairs, device)
            sections.append(lengths_table(first, lengths))
        if "start" in args.parts:
            start = measure_start(args, directories[first], pairs, device, Path(scratch))
            sections.append(start_table(first, start))
    common.write_results(args.output_dir, "reranking", "Re-ranking", facts, sections, args,
                         {"ways": measured, "lengths": lengths, "start": start})
    draw(args.output_dir / "reranking.png", measured, lengths, first)


if __name__ == "__main__":
    run_main(main)
