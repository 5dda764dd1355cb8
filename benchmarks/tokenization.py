"""Speed, memory and output size of tokenize_to_features.py, compared with the original's tokenizer in pure Python.

    python -m benchmarks.tokenization
    python -m benchmarks.tokenization --pairs 1000000 --rounds 1
    python -m benchmarks.tokenization --raw_data_file pairs.tsv --set_name test

In: nothing, or your own pairs.
Out, in --output_dir: tokenization.md (tables), tokenization.json (all timings), tokenization.png. Both commands are
timed from start to end, in turn, and their tokens are compared:

    original    benchmarks/original_tokenizer.py on the first --sample pairs
    ours        tokenize_to_features.py on all --pairs

In re-ranking pairs, a query has 100 candidates, and a passage is a candidate for --repeats queries on average. In
training pairs, every passage occurs once. Rates "without start" exclude the time that 10 pairs take.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks import common, ours, pictures, samples
from simplified_tinybert.common.device import select_device
from simplified_tinybert.common.files import UserError, run_main, say
from simplified_tinybert.data.features import read_chunks
from simplified_tinybert.ranking.presentation import markdown
from simplified_tinybert.ranking.speed import machine

FEW_PAIRS = 10          # take little longer than the start-up
WAYS = ("original", "ours")

# Runs a command from a small process, because the peak memory of a process starts from that of its parent
MEASURE = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.common_arguments(parser)
    add = parser.add_argument
    add("--pairs", type=int, default=100_000, help="pairs for tokenize_to_features.py (default: 100,000)")
    add("--sample", type=int, default=3000, help="pairs for the original's tokenizer (default: 3,000)")
    add("--repeats", type=float, default=4, help="queries that share a passage in re-ranking pairs (default: 4)")
    add("--rounds", type=int, default=3, help="how often each command runs (default: 3)")
    add("--max_seq_length", type=int, default=256, help="tokens of a pair (default: 256)")
    add("--kinds", nargs="+", choices=("re-ranking", "training"), default=["re-ranking", "training"],
        help="pairs to generate (default: both)")
    add("--set_name", choices=("train", "dev", "test"), default="test", help="kind of --raw_data_file (default: test)")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.sample, args.rounds = 300, 100, 1
    return args


def run(command: list[object]) -> tuple[float, float]:
    """Run a command. Return its seconds, and the peak memory in MiB of its largest process."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, command)], capture_output=True, text=True,
                          cwd=common.ROOT)
    if done.returncode:
        raise UserError(f"{command[1]} failed:\n{done.stderr[-2000:]}")
    spent, peak = map(float, done.stdout.splitlines()[-1].split())
    return spent, peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def write_pairs(args: argparse.Namespace, kind: str, path: Path, scratch: Path) -> tuple[int, Path, Path]:
    """Write all pairs to `path`. Return their number, a file with the sample and a file with a few pairs."""
    if args.raw_data_file:
        lines = samples.read_pairs(args.raw_data_file, args.pairs)
    else:
        texts = samples.Texts()
        lines = islice(texts.training_lines(), args.pairs) if kind == "training" else \
            texts.pair_lines(args.pairs, args.repeats)
    samples.write_lines(path, lines)
    with open(path, encoding="utf-8", newline="\n") as handle:
        start = list(islice(handle, args.sample))
        total = len(start) + sum(1 for _ in handle)
    sample, few = scratch / f"{kind}.sample.tsv", scratch / f"{kind}.few.tsv"
    for file, size in ((sample, args.sample), (few, FEW_PAIRS)):
        samples.write_lines(file, (line.rstrip("\n") for line in start[:size]))
    return total, sample, few


def measure(args: argparse.Namespace, kind: str, scratch: Path) -> dict:
    vocabulary = ours.vocabulary_directory(scratch / f"{kind}-vocabulary", args.vocab_file)
    set_name = args.set_name if args.raw_data_file else "train" if kind == "training" else "test"
    total, sample, few = write_pairs(args, kind, scratch / f"{kind}.tsv", scratch)
    files = {"ours": (scratch / f"{kind}.tsv", total), "original": (sample, min(args.sample, total))}

    def command(way: str, pairs: Path, output: Path) -> list[object]:
        if way == "original":
            return [sys.executable, "benchmarks/original_tokenizer.py", pairs, output, args.vocab_file,
                    args.max_seq_length]
        return [sys.executable, *ours.tokenize_command(set_name, pairs, output, vocabulary, args.max_seq_length)]

    measured = {way: {"pairs": files[way][1], "seconds": [], "start": [], "MiB": []} for way in WAYS}
    for number in range(args.rounds):
        for way, result in measured.items():
            result["start"].append(run(command(way, few, scratch / "few"))[0])
            spent, memory = run(command(way, files[way][0], scratch / f"{kind}.{way}"))
            result["seconds"].append(spent)
            result["MiB"].append(memory)
            result["bytes"] = (scratch / f"{kind}.{way}").stat().st_size / result["pairs"]
        say(f"  {kind}, round {number + 1}: " + ", ".join(
            f"{way} {result['seconds'][-1]:.1f} s for {result['pairs']:,}" for way, result in measured.items()))
    different, mean = compare(scratch / f"{kind}.original", scratch / f"{kind}.ours")
    return {"ways": measured, "different": different, "mean_length": mean,
            "input_bytes": files["ours"][0].stat().st_size}


def compare(rows: Path, feature_file: Path) -> tuple[int, float]:
    """Return how many of the original's rows differ in tokens or segments from our features, and our mean length."""
    different, tokens, examples = 0, 0, 0
    with open(rows, encoding="utf-8") as handle:
        for chunk in read_chunks(feature_file):
            for index, row in enumerate(islice(handle, len(chunk))):
                ids, mask, segments = np.array(row.split(",")[2:], dtype=np.int64).reshape(3, -1)
                own, length = chunk.tokens[chunk.offsets[index]:chunk.offsets[index + 1]], int(chunk.lengths[index])
                different += not (mask.sum() == length and np.array_equal(ids[:length], own)
                                  and np.argmax(segments) == chunk.query_lengths[index])
            tokens, examples = tokens + len(chunk.tokens), examples + len(chunk)
    return different, tokens / examples


def rates(result: dict) -> list[float]:
    """Pairs per second in each round, without the start-up."""
    start = statistics.median(result["start"])
    return [(result["pairs"] - FEW_PAIRS) / (spent - start) for spent in result["seconds"]]


def kind_table(kind: str, measured: dict, args: argparse.Namespace) -> str:
    ways, rows = measured["ways"], []
    for way, result in ways.items():
        whole = [result["pairs"] / spent for spent in result["seconds"]]
        rows.append([way, f"{result['pairs']:,}", common.spread(whole), common.spread(rates(result)),
                     common.ratio(rates(result), rates(ways["original"])), common.spread(result["start"]),
                     f"{max(result['MiB']):,.0f}", f"{result['bytes']:,.0f}"])
    shared = f" Each passage occurs {args.repeats:g} times on average." if kind == "re-ranking" else ""
    return (f"## {kind} pairs\n\n{measured['mean_length']:.0f} tokens on average of at most {args.max_seq_length}; "
            f"{measured['input_bytes'] / ways['ours']['pairs']:,.0f} bytes of text each.{shared} Pairs of the "
            f"original's sample that have different tokens here: {measured['different']}.\n\n"
            + markdown(["way", "pairs", "pairs/s, whole command", "pairs/s without start", "× original",
                        "start, s", "peak memory of a process, MiB", "bytes per pair"], rows))


def main() -> None:
    args = parse_args()
    hardware = machine(select_device("cpu"))
    kinds = [args.set_name] if args.raw_data_file else args.kinds
    with tempfile.TemporaryDirectory() as scratch:
        measured = {kind: measure(args, kind, Path(scratch)) for kind in kinds}
    sections = [kind_table(kind, result, args) for kind, result in measured.items()]
    common.write_results("Tokenization", hardware, sections, args, measured)
    common.print_results(args)
    speed = {f"{kind}\npairs": {way: statistics.median(rates(result["ways"][way])) for way in WAYS}
             for kind, result in measured.items()}
    size = {f"{kind}\npairs": {way: result["ways"][way]["bytes"] for way in WAYS} for kind, result in measured.items()}
    pictures.draw(args.output_dir / "tokenization.png",
                  [pictures.Panel("Tokenization speed", "pairs per second, without start-up", bars=speed),
                   pictures.Panel("Size of the features", "bytes per pair", bars=size)])


if __name__ == "__main__":
    run_main(main)
