"""Shared by the benchmarks: flags, interleaved timing, the machine's peak speed, result files. Not a command.

Times are wall-clock seconds. The compared implementations run in turn (A B C A B C ...), so that other load on the
machine affects all of them. A ratio is taken within each round; its median is reported with (smallest – largest).
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

from simplified_tinybert.common.device import (
    M_MMAP_MAX,
    M_TRIM_THRESHOLD,
    keep_freed_memory,
    prepare_device,
    select_device,
)
from simplified_tinybert.common.files import atomic_writer, say
from simplified_tinybert.ranking.presentation import number
from simplified_tinybert.ranking.speed import seconds

ROOT = Path(__file__).resolve().parent.parent
M_MMAP_THRESHOLD = -3       # from glibc's malloc.h
RATE_TOKENS = {"cpu": 2048, "cuda": 65536}      # rows of the matrix products that measure the machine's peak
GPU_REPEATS = 20            # products between two waits for the GPU


def common_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, or a CUDA index (default: auto)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--vocab_file", type=Path, default=ROOT / "tests/data/bert-base-uncased-vocab.txt",
        help="vocabulary, one token per line (default: BERT-Base, uncased)")
    add("--raw_data_file", type=Path, help="your own pairs, as for tokenize_to_features.py (default: generated)")
    add("--output_dir", type=Path, default=ROOT / "benchmarks/results", help="directory for the results")
    add("--quick", action="store_true", help="tiny sizes, to check that the command works; the figures mean nothing")


def set_up(args: argparse.Namespace) -> torch.device:
    """Set the number of threads and return the device."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = select_device(args.device)
    prepare_device(device)
    return device


def set_process(way: str, device: torch.device, tf32: bool = False) -> None:
    """Set for a way what our scripts set for the process: TF32, cuDNN's attention, and whether malloc keeps memory.

    The other ways get the defaults of PyTorch and glibc.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cuda.enable_cudnn_sdp(not way.startswith("ours"))
    elif way.startswith("ours"):
        keep_freed_memory()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc itself raises its limits to these values when large tensors are freed
        for parameter, value in ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 2 ** 25), (M_TRIM_THRESHOLD, 2 ** 26)):
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def interleave(ways: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return each implementation's seconds in each round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, run in ways.items():
            set_process(name, device)
            times[name].append(seconds(run, device))
        say(f"  round {turn + 1}: " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items()))
    return times


def ratio(slow: list[float], fast: list[float]) -> str:
    """Return how many times faster: median (smallest – largest) of the ratios in each round."""
    return spread([slower / faster for slower, faster in zip(slow, fast)], "× ")


def spread(values: list[float], unit: str = "") -> str:
    """Return median (smallest – largest), with three significant digits."""
    return f"{number(statistics.median(values))} {unit}({number(min(values))} – {number(max(values))})"


def why_not_packed(dtype: torch.dtype) -> str | None:
    """Return why oneDNN cannot pack weights of this type on this machine, or None if it can."""
    try:
        values = torch.ones(16, 16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(values, len(values))
        torch.ops.mkldnn._linear_pointwise(values, packed, values[0], "none", [], "")
    except (AttributeError, RuntimeError) as error:     # only oneDNN knows which types need which instructions
        return str(error).splitlines()[0]
    return None


def packing(device: torch.device) -> dict[str, str]:
    """Return a line of the machine's description: for which types oneDNN packs weights, and why not for the others."""
    if device.type != "cpu":
        return {}
    reasons = {"float32": why_not_packed(torch.float32), "bf16": why_not_packed(torch.bfloat16)}
    return {"weights packed by oneDNN": ", ".join(f"{kind}: {f'no ({why})' if why else 'yes'}"
                                                  for kind, why in reasons.items())}


def matrix_rates(device: torch.device, dtype: torch.dtype, hidden_size: int, quick: bool) -> dict[str, float]:
    """FLOP per second of the matrix products in a transformer layer, as PyTorch computes them.

    On a CPU also with weights packed by oneDNN, if it can pack this type. The largest figure is the machine's peak.
    """
    rates, wide = {}, 4 * hidden_size
    packs = device.type == "cpu" and not why_not_packed(dtype)
    with torch.inference_mode():
        for rows, columns in ((hidden_size, hidden_size), (hidden_size, wide), (wide, hidden_size)):
            tokens = RATE_TOKENS["cpu" if quick else device.type]
            inputs = torch.randn(tokens, rows, device=device, dtype=dtype)
            weight, bias = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((columns, rows), (columns,)))
            flops, shape = 2 * tokens * rows * columns, f"{tokens}×{rows}×{columns}"
            rates[shape] = flops / _repeat(lambda: F.linear(inputs, weight, bias), device, quick)  # noqa: B023
            if packs:
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
                rates[f"{shape} packed"] = flops / _repeat(lambda: torch.ops.mkldnn._linear_pointwise(
                    inputs, packed, bias, "none", [], ""), device, quick)  # noqa: B023
    return rates


def best_rates(device: torch.device, hidden_size: int, quick: bool) -> dict[str, float]:
    """FLOP per second of the fastest matrix product, by type. For float32 also without packed weights, or with TF32."""
    torch.set_float32_matmul_precision("highest")       # an earlier way may have set TF32
    single = matrix_rates(device, torch.float32, hidden_size, quick)
    rates = {"float32": max(single.values()), "bf16": max(matrix_rates(device, torch.bfloat16, hidden_size,
                                                                       quick).values())}
    if device.type == "cpu":
        return rates | {"float32 without packed weights": max(rate for shape, rate in single.items()
                                                              if "packed" not in shape)}
    torch.set_float32_matmul_precision("high")
    rates["TF32"] = max(matrix_rates(device, torch.float32, hidden_size, quick).values())
    torch.set_float32_matmul_precision("highest")
    return rates


def describe_rates(rates: dict[str, float]) -> str:
    return ", ".join(f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in rates.items())


def _repeat(run: Callable[[], object], device: torch.device, quick: bool) -> float:
    """Median seconds over repeated runs."""
    if device.type == "cuda":                           # waiting for the GPU after each product would be measured too
        def repeated() -> None:
            for _ in range(GPU_REPEATS):
                run()
        return min(seconds(repeated, device) for _ in range(3)) / GPU_REPEATS
    once = min(seconds(run, device) for _ in range(3))
    return statistics.median(seconds(run, device) for _ in range(max(5, int((0.01 if quick else 0.15) / once))))


def forward_flops(config: BertConfig, lengths: Iterable[int], cls_only: bool = True) -> float:
    """Count the FLOP of the matrix products that a forward pass over pairs of these lengths needs.

    With `cls_only` (enough for scores), the last layer computes only keys and values for all positions.
    """
    hidden, inner, total = config.hidden_size, config.intermediate_size, 0.0
    for length in map(int, lengths):
        layer = 2 * length * (4 * hidden * hidden + 2 * hidden * inner) + 4 * length * length * hidden
        last = 4 * length * hidden * hidden + 4 * hidden * hidden + 4 * hidden * inner + 4 * length * hidden
        head = 2 * hidden * hidden + 2 * hidden * config.num_labels
        total += (config.num_hidden_layers - 1) * layer + (last if cls_only else layer) + head
    return total


def step_flops(student: BertConfig, teacher: BertConfig, lengths: Iterable[int]) -> float:
    """Count the FLOP of a distillation step: teacher once, student and projections three times (forward, backward)."""
    lengths = list(map(int, lengths))
    projections = 2 * (student.num_hidden_layers + 1) * student.hidden_size * teacher.hidden_size * sum(lengths)
    return (forward_flops(teacher, lengths, cls_only=False)
            + 3 * (forward_flops(student, lengths, cls_only=False) + projections))


def write_results(title: str, hardware: dict[str, str], sections: list[str], args: argparse.Namespace,
                  raw: dict) -> None:
    """Write NAME.md (tables) and NAME.json (all timings), where NAME is the running benchmark's.

    Benchmarks call it after each part, so that an interruption does not lose the parts before.
    """
    name = Path(sys.argv[0]).stem
    command = f"python -m benchmarks.{name} {' '.join(portable(Path(word)) for word in sys.argv[1:])}".strip()
    hardware_line = "; ".join(f"{key}: {value}" for key, value in hardware.items())
    text = "\n\n".join([f"# {title}", f"`{command}`", hardware_line, *sections]) + "\n"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_writer(args.output_dir / f"{name}.md") as handle:
        handle.write(text)
    with atomic_writer(args.output_dir / f"{name}.json") as handle:
        json.dump({"machine": hardware, "arguments": vars(args), **raw}, handle, indent=1, default=portable)
        handle.write("\n")


def portable(path: Path) -> str:
    """A path without this machine's directories: relative to the repository if it is inside, else only the name."""
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return path.name if path.is_absolute() else str(path)


def print_results(args: argparse.Namespace) -> None:
    """Print the tables that `write_results` wrote."""
    print((args.output_dir / f"{Path(sys.argv[0]).stem}.md").read_text(encoding="utf-8"))
