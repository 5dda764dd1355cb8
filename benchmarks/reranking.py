"""Re-ranking speed, compared with the original and sentence-transformers, with the same weights and scores.

    python -m benchmarks.reranking
    python -m benchmarks.reranking --models 3x384 12x768 --raw_data_file pairs.tsv --device 0

In: nothing, or your own pairs (query_id#passage_id <tab> query <tab> passage). Models have random weights.
Out, in --output_dir: reranking.md (tables), reranking.json (all timings), reranking.png. These are compared:

    original                 as the original scores features: eager attention, all positions of all layers, scores and
                             hidden states of all layers kept, batches of 100 padded to 256
    sentence-transformers    CrossEncoder.predict on texts, with the fastest of --st_batch_sizes; bf16: bfloat16 weights
    ..., ONNX, OpenVINO      its backends, in float32 and 8 bits; needs --backends_python (see peer_backends.py)
    ours                     reranker.py on features; bf16: with --bf16, int8: with --int8 (CPU)
    ours, from texts         the same, including the work of tokenize_to_features.py

bf16 is left out on CPUs that only emulate it.

--parts: ways (all of these on real pairs, for each model), lengths (the first model on pairs of equal length), budgets
(the first model in batches of more or fewer tokens), start (reranker.py on 10 pairs, in a separate process).
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
    ALL,
    ORIGINAL,
    OURS,
    OURS_BF16,
    OURS_INT8,
    PEER,
    PeerSettings,
    Sample,
    equal_sample,
    our_scorers,
    real_sample,
    ways,
)
from simplified_tinybert.common.files import run_main, say
from simplified_tinybert.model.pretrained import read_config
from simplified_tinybert.ranking.presentation import markdown, number
from simplified_tinybert.ranking.speed import machine

PAIRS = {"cpu": {"3x384": 200, "6x768": 32, "12x768": 24}, "cuda": {"3x384": 8192, "6x768": 4096, "12x768": 4096}}
LENGTHS, NONE = (64, 128, 256, 512), "–"
BUDGETS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (16384, 32768, 65536, 131072)}     # tokens of a batch
PARTS = ("ways", "lengths", "budgets", "start")

SENTENCE_TRANSFORMERS_SCRIPT = """
from sentence_transformers import CrossEncoder
pairs = [line.rstrip("\\n").split("\\t")[1:3] for line in open("ten.tsv", encoding="utf-8")]
print(CrossEncoder("{directory}", max_length=256).predict(pairs, apply_softmax=True))
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.common_arguments(parser)
    add = parser.add_argument
    add("--models", nargs="+", default=["3x384", "6x768", "12x768"],
        help="LAYERSxHIDDEN, the teacher last (default: 3x384 6x768 12x768)")
    add("--pairs", type=int, help="pairs to score (CPU: 200 for 3x384, 32 for 6x768, else 24; CUDA: thousands)")
    add("--rounds", type=int, default=3, help="how often each implementation runs (default: 3)")
    add("--st_batch_sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128],
        help="batch sizes to try for sentence-transformers (default: 8 16 32 64 128)")
    add("--backends_python", type=Path,
        help="Python interpreter of an environment with sentence-transformers' backends (default: leave them out)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    args = parser.parse_args()
    if args.backends_python and not args.backends_python.is_file():
        parser.error(f"--backends_python {args.backends_python}: no such file")
    if args.quick:
        args.models, args.pairs, args.rounds, args.st_batch_sizes = ["1x48", "2x96"], 10, 1, [8, 16]
    return args


def pairs_of(args: argparse.Namespace, name: str, device: torch.device) -> int:
    """Return how many pairs to score: fewer for large models on a CPU."""
    return args.pairs or PAIRS[device.type].get(name, 24)


def peer_of(args: argparse.Namespace) -> PeerSettings:
    return PeerSettings(args.st_batch_sizes, args.backends_python)


def measure_ways(args: argparse.Namespace, name: str, directory: Path, pairs: Sample, device: torch.device) -> dict:
    config, sample = read_config(directory), pairs.part(pairs_of(args, name, device))
    scores: dict[str, np.ndarray] = {}
    say(f"{name}: {len(sample.lines)} pairs, {sample.examples.lengths.mean():.1f} tokens on average")

    def keep(way: str, run: Callable[[], np.ndarray]) -> None:
        scores[way] = run()
    compared = {way: partial(keep, way, run)
                for way, run in ways(directory, sample, device, peer_of(args), ALL).items()}
    if device.type == "cuda" or args.backends_python:   # the first calls are much slower there
        common.interleave(compared, 1, device)
    rates = [common.best_rates(device, config.hidden_size, args.quick)]
    times, lengths = common.interleave(compared, args.rounds, device), sample.examples.lengths
    rates.append(common.best_rates(device, config.hidden_size, args.quick))
    return {"pairs": len(lengths), "mean_length": float(lengths.mean()), "flops": common.forward_flops(config, lengths),
            "rates": {kind: max(rate[kind] for rate in rates) for kind in rates[0]}, "times": times,
            "scores_spread": float(np.std(scores[ORIGINAL])),
            "difference": {way: float(np.abs(values - scores[ORIGINAL]).max()) for way, values in scores.items()},
            "correlation": {way: correlation(values, scores[ORIGINAL]) for way, values in scores.items()}}


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation; 0 if one of them is constant."""
    return float(np.corrcoef(first, second)[0, 1]) if first.std() and second.std() else 0.0


def ways_table(name: str, measured: dict) -> str:
    rows, times = [], measured["times"]
    for way, spent in times.items():
        rate = measured["flops"] / statistics.median(spent)
        best = measured["rates"]["bf16" if "bf16" in way else "float32"]
        rows.append([way, common.spread([measured["pairs"] / value for value in spent]),
                     common.ratio(times[ORIGINAL], spent), common.ratio(times[PEER], spent) if PEER in times else NONE,
                     f"{rate / 1e9:,.0f}", NONE if "int8" in way else f"{100 * rate / best:.0f} %",
                     f"{measured['difference'][way]:.1e}", f"{measured['correlation'][way]:.4f}"])
    return (f"## {name}: {measured['pairs']} pairs, {measured['mean_length']:.0f} tokens on average\n\n"
            f"Matrix products on this machine at this hidden size: {common.describe_rates(measured['rates'])}. A pair "
            f"needs {measured['flops'] / measured['pairs'] / 1e9:.2f} GFLOP. Standard deviation of the scores: "
            f"{measured['scores_spread']:.2f}.\n\n"
            + markdown(["way", "pairs/s", "× original", "× sentence-transformers", "GFLOP/s", "of the rate",
                        "largest score difference", "correlation of scores"], rows))


def pairs_per_second(measured: dict) -> dict[str, float]:
    """Median over the rounds, for each implementation."""
    return {way: measured["pairs"] / statistics.median(spent) for way, spent in measured["times"].items()}


def teacher_table(measured: dict[str, dict]) -> str:
    """How many times faster each student is than the teacher, for each implementation."""
    *students, teacher = measured
    rates, rows = {name: pairs_per_second(result) for name, result in measured.items()}, []
    for way in (ORIGINAL, PEER, OURS, OURS_BF16, OURS_INT8):
        if teacher_rate := rates[teacher].get(way):
            rows.append([way, number(teacher_rate),
                         *(f"{rates[student][way] / teacher_rate:.1f} ×" for student in students)])
    rows.append(["the paper", NONE, *("15 ×" if student == "3x384" else NONE for student in students)])
    return f"## Students against the teacher {teacher}\n\n" + markdown(
        ["way", "teacher, pairs/s", *(f"{student} is faster by" for student in students)], rows)


def measure_lengths(args: argparse.Namespace, directory: Path, pairs: Sample,
                    device: torch.device) -> dict[str, dict[int, float]]:
    """Return pairs per second: {way: {length: rate}}."""
    rates: dict[str, dict[int, float]] = {}
    tokens = args.pairs * 64 if args.pairs else {"cpu": 8192, "cuda": 2 ** 20}[device.type]
    for length in LENGTHS[:2] if args.quick else LENGTHS:
        sample = equal_sample(pairs, directory, length, max(2, tokens // length))
        compared = ways(directory, sample, device, peer_of(args), (ORIGINAL, PEER, OURS, OURS_BF16))
        say(f"{length} tokens, {len(sample.lines)} pairs")
        for way, spent in common.interleave(compared, args.rounds, device).items():
            rates.setdefault(way, {})[length] = len(sample.lines) / statistics.median(spent)
    return rates


def measure_budgets(args: argparse.Namespace, directory: Path, pairs: Sample,
                    device: torch.device) -> dict[str, dict[int, float]]:
    """Return pairs per second of reranker.py: {precision: {tokens of a batch: rate}}."""
    sample, budgets = pairs.part(pairs_of(args, args.models[0], device)), BUDGETS[device.type]
    models = our_scorers(directory, device)
    times = common.interleave({f"{way}, {tokens} tokens": partial(ours.score, model, sample.examples, tokens)
                               for way, model in models.items() for tokens in budgets}, args.rounds, device)
    return {way: {tokens: len(sample.lines) / statistics.median(times[f"{way}, {tokens} tokens"])
                  for tokens in budgets} for way in models}


def rates_table(title: str, rates: dict[str, dict[int, float]]) -> str:
    """Pairs per second by number of tokens."""
    return f"## {title}\n\n" + markdown(
        ["tokens", *map(str, next(iter(rates.values())))],
        [[way, *map(number, by_tokens.values())] for way, by_tokens in rates.items()])


def measure_start(args: argparse.Namespace, directory: Path, pairs: Sample, device: torch.device,
                  scratch: Path) -> dict[str, list[float]]:
    """Return the seconds of each part of re-ranking 10 pairs, from starting Python to the finished file."""
    samples.write_lines(scratch / "ten.tsv", pairs.lines[:10])
    command = ours.tokenize_command("test", scratch / "ten.tsv", scratch / "ten.pkl", directory, pairs.max_length)
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    times: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        start = time.perf_counter()
        parts = ours.start_up(directory, scratch / "ten.pkl", scratch / "ten.scores.tsv", device)
        whole = time.perf_counter() - start
        rest = whole - parts["imports"] - parts["model"] - parts["scoring"]
        for part, spent in (*parts.items(), ("rest", rest), ("whole", whole)):
            times.setdefault(part, []).append(spent)
        for part, code in (("torch", "import torch"),
                           ("peer", SENTENCE_TRANSFORMERS_SCRIPT.format(directory=directory))):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], cwd=scratch, capture_output=True)
            times.setdefault(part, []).append(time.perf_counter() - start if done.returncode == 0 else float("nan"))
    return times


def start_table(name: str, times: dict[str, list[float]]) -> str:
    rows = [("imports", "imports"), ("loading the model", "model"), ("scoring and writing 10 pairs", "scoring"),
            ("Python start-up, checks, the rest", "rest"), ("**whole command**", "whole"),
            ("for comparison: `python -c \"import torch\"`", "torch"),
            ("for comparison: sentence-transformers, whole command", "peer")]
    return f"## reranker.py from start to end, 10 pairs, {name}\n\n" + markdown(
        ["part", "seconds"], [[title, common.spread(times[part])] for title, part in rows])


def draw(path: Path, measured: dict[str, dict], lengths: dict[str, dict[int, float]], name: str) -> None:
    panels = []
    if lengths:
        panels.append(pictures.Panel(f"Throughput against length, {name}", "pairs per second", "tokens of a pair",
                                     lines=lengths))
    if measured:
        shown = (ORIGINAL, PEER, OURS, OURS_BF16)
        bars = {model: {way: rate for way, rate in pairs_per_second(result).items() if way in shown}
                for model, result in measured.items()}
        panels.append(pictures.Panel("Students and teacher, real pairs", "pairs per second", bars=bars))
    if panels:
        pictures.draw(path, panels)


def main() -> None:
    args = parse_args()
    device = common.set_up(args)
    hardware = machine(device) | common.packing(device)
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = ours.vocabulary_directory(Path(scratch) / "vocabulary", args.vocab_file)
        pairs = real_sample(args.raw_data_file, vocabulary, max(pairs_of(args, name, device) for name in args.models))
        directories = {name: ours.make_model(Path(scratch) / name, name, vocabulary, pairs.examples)
                       for name in args.models}
        first, sections = args.models[0], []
        found: dict[str, dict] = {part: {} for part in PARTS}

        def keep(section: str) -> None:
            sections.append(section)
            common.write_results("Re-ranking", hardware, sections, args, found)
        for name, directory in directories.items() if "ways" in args.parts else ():
            found["ways"][name] = measure_ways(args, name, directory, pairs, device)
            keep(ways_table(name, found["ways"][name]))
        if "ways" in args.parts:
            keep(teacher_table(found["ways"]))
        if "lengths" in args.parts:
            found["lengths"] = measure_lengths(args, directories[first], pairs, device)
            keep(rates_table(f"{first}: pairs per second at equal lengths", found["lengths"]))
        if "budgets" in args.parts:
            found["budgets"] = measure_budgets(args, directories[first], pairs, device)
            keep(rates_table(f"{first}: pairs per second in batches of this many tokens", found["budgets"]))
        if "start" in args.parts:
            found["start"] = measure_start(args, directories[first], pairs, device, Path(scratch))
            keep(start_table(first, found["start"]))
    common.print_results(args)
    draw(args.output_dir / "reranking.png", found["ways"], found["lengths"], first)


if __name__ == "__main__":
    run_main(main)
