"""What the benchmarks share: their flags, ways in turn, the machine's speed, their results. Not a command.

Times are wall-clock seconds. Ways that are compared run in turn (A B C A B C ...), so that whatever else the machine
does meets all of them; a ratio is the median over the rounds of the ratio within a round (smallest – largest).
"""
import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BertConfig

from simplified_tinybert.common.device import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory
from simplified_tinybert.common.files import atomic_writer, say
from simplified_tinybert.common.records import plain
from simplified_tinybert.ranking.speed import seconds
from simplified_tinybert.ranking.tables import number

ROOT = Path(__file__).resolve().parent.parent
M_MMAP_THRESHOLD = -3       # of glibc's malloc.h
RATE_TOKENS = 2048          # rows of the products that measure the machine
RATE_TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
RATE_SECONDS = {True: 0.01, False: 0.15}       # how long each of them is repeated, with and without --quick


def common_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, or a CUDA index (default: auto)")
    add("--threads", type=int, help="CPU threads (default: as PyTorch chooses)")
    add("--vocab_file", type=Path, default=ROOT / "tests/data/bert-base-uncased-vocab.txt",
        help="tokens, one a line (default: BERT-Base's, uncased)")
    add("--raw_data_file", type=Path, help="own pairs, as tokenize_to_features.py reads them (default: generated)")
    add("--output_dir", type=Path, default=ROOT / "benchmarks/results", help="directory for the results")
    add("--quick", action="store_true", help="tiny sizes, to see that the command works; the figures mean nothing")


def set_memory(way: str, device: torch.device) -> None:
    """The C library's handling of freed memory as each way has it: ours keeps it, others leave everything as usual."""
    if way.startswith("ours"):
        keep_freed_memory(device)
    elif device.type == "cpu" and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        library = ctypes.CDLL(None)
        # The limits at which glibc arrives by itself, which moves them up as large tensors are freed
        for parameter, value in ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 2 ** 25), (M_TRIM_THRESHOLD, 2 ** 26)):
            library.mallopt(parameter, value)
        library.malloc_trim(0)


def interleave(ways: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way in each round; the ways of a round run one after the other."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, run in ways.items():
            set_memory(name, device)
            times[name].append(seconds(run, device))
        say(f"  round {turn + 1}: " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items()))
    return times


def ratio(slow: list[float], fast: list[float]) -> str:
    """How many times faster, round by round: median (smallest – largest)."""
    values = [one / other for one, other in zip(slow, fast)]
    return spread(values, "× ")


def spread(values: list[float], unit: str = "") -> str:
    """Median and range, with three significant digits."""
    low, high = (number(value) for value in (min(values), max(values)))
    return f"{number(statistics.median(values))} {unit}({low} – {high})"


def why_not_packed(dtype: torch.dtype) -> str | None:
    """Why oneDNN does not bring weights of this type into its own layout on this machine; None if it does."""
    try:
        values = torch.ones(16, 16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(values, len(values))
        torch.ops.mkldnn._linear_pointwise(values, packed, values[0], "none", [], "")
    except (AttributeError, RuntimeError) as error:     # which types need which instructions, oneDNN alone knows
        return str(error).splitlines()[0]
    return None


def packing(device: torch.device) -> dict[str, str]:
    """A line for the machine's description: of which types oneDNN packs weights, and why not of the others."""
    if device.type != "cpu":
        return {}
    reasons = {kind: why_not_packed(dtype) for kind, dtype in RATE_TYPES.items()}
    return {"weights packed by oneDNN": ", ".join(f"{kind}: {f'no ({why})' if why else 'yes'}"
                                                  for kind, why in reasons.items())}


def matrix_rates(device: torch.device, dtype: torch.dtype, width: int, quick: bool) -> dict[str, float]:
    """FLOP per second of the products of a transformer layer of this width, as PyTorch computes them.

    On a CPU also by oneDNN with weights that were brought into its own layout beforehand, where it does that for this
    type: what the hardware can do is the largest of these figures.
    """
    rates = {}
    packs = device.type == "cpu" and not why_not_packed(dtype)
    with torch.inference_mode():
        for rows, columns in ((width, width), (width, 4 * width), (4 * width, width)):
            inputs = torch.randn(RATE_TOKENS, rows, device=device, dtype=dtype)
            weight, bias = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((columns, rows), (columns,)))
            work, shape = 2 * RATE_TOKENS * rows * columns, f"{RATE_TOKENS}×{rows}×{columns}"
            rates[shape] = work / _repeat(lambda: F.linear(inputs, weight, bias), device, quick)  # noqa: B023
            if packs:
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, RATE_TOKENS)
                rates[f"{shape} packed"] = work / _repeat(lambda: torch.ops.mkldnn._linear_pointwise(
                    inputs, packed, bias, "none", [], ""), device, quick)  # noqa: B023
    return rates


def best_rates(device: torch.device, width: int, quick: bool) -> dict[str, float]:
    """FLOP per second of the fastest product: float32 as PyTorch computes it, float32 at its best, bf16."""
    single = matrix_rates(device, torch.float32, width, quick)
    return {"float32": max(single.values()),
            "float32 without packed weights": max(rate for shape, rate in single.items() if "packed" not in shape),
            "bf16": max(matrix_rates(device, torch.bfloat16, width, quick).values())}


def describe_rates(rates: dict[str, float]) -> str:
    return ", ".join(f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in rates.items())


def _repeat(run: Callable[[], object], device: torch.device, quick: bool) -> float:
    """Median seconds of repeated runs."""
    once = min(seconds(run, device) for _ in range(3))
    return statistics.median(seconds(run, device) for _ in range(max(5, int(RATE_SECONDS[quick] / once))))


def forward_flops(config: BertConfig, lengths: Iterable[int], cls_only: bool = True) -> float:
    """Floating-point operations of the matrix products that a forward pass over pairs of these lengths needs.

    With `cls_only`, for scores, the last layer's keys and values are needed for all positions, the rest for the first.
    """
    width, inner, total = config.hidden_size, config.intermediate_size, 0.0
    for length in map(int, lengths):
        layer = 2 * length * (4 * width * width + 2 * width * inner) + 4 * length * length * width
        last = 4 * length * width * width + 4 * width * width + 4 * width * inner + 4 * length * width
        head = 2 * width * width + 2 * width * config.num_labels
        total += (config.num_hidden_layers - 1) * layer + (last if cls_only else layer) + head
    return total


def step_flops(student: BertConfig, teacher: BertConfig, lengths: Iterable[int]) -> float:
    """The same for a distillation step: teacher once, student and its projections three times (forward, backward)."""
    lengths = list(map(int, lengths))
    projections = 2 * (student.num_hidden_layers + 1) * student.hidden_size * teacher.hidden_size * sum(lengths)
    return (forward_flops(teacher, lengths, cls_only=False)
            + 3 * (forward_flops(student, lengths, cls_only=False) + projections))


def write_results(directory: Path, name: str, title: str, facts: dict[str, str], sections: list[str],
                  args: argparse.Namespace, raw: dict) -> None:
    """<name>.md for people, <name>.json with every single time; the former also to stdout."""
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip()
    machine_line = "; ".join(f"{key}: {value}" for key, value in facts.items())
    text = "\n\n".join([f"# {title}", f"`{command}`", machine_line, *sections]) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_writer(directory / f"{name}.md") as handle:
        handle.write(text)
    arguments = {key: plain(value) for key, value in vars(args).items()}
    with atomic_writer(directory / f"{name}.json") as handle:
        json.dump({"machine": facts, "arguments": arguments, **raw}, handle, indent=1)
        handle.write("\n")
    print(text)
