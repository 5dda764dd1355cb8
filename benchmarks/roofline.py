"""Estimate the times of distillation steps and of re-ranking on GPUs that are not here. Writes estimates.md.

    python -m benchmarks.roofline

The real code runs on a pretended GPU (pretended_cuda.py), which records every operation with its shapes and types. An
operation takes the longest of three times: its bytes at the memory's rate, its FLOP at the rate of its products, and
the shortest time of a kernel. Starting the kernels takes the CPU a time of its own; a step takes the longer of both.
These are ESTIMATES from the rates below. The rates of an H100 were measured, in products and in the attention of a
profiled step. Those of the other cards are assumptions. Run the other benchmarks on a GPU to replace the estimates.
"""
import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cuda_guard

cuda_guard.load()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import BertConfig  # noqa: E402

from benchmarks import ours  # noqa: E402
from benchmarks.common import ROOT  # noqa: E402
from benchmarks.pretended_cuda import Watch, pretended_cuda  # noqa: E402
from simplified_tinybert.common.files import atomic_writer, run_main, say  # noqa: E402
from simplified_tinybert.data.features import Examples  # noqa: E402
from simplified_tinybert.model import bert  # noqa: E402
from simplified_tinybert.model.bert import CrossEncoder  # noqa: E402
from simplified_tinybert.model.pretrained import fit_projections  # noqa: E402
from simplified_tinybert.ranking import scoring  # noqa: E402
from simplified_tinybert.ranking.presentation import markdown, number  # noqa: E402


@dataclass(frozen=True)
class Gpu:
    """Rates of a card, in FLOP or bytes per second: what its kernels reach in practice, not the data sheet."""
    bf16: float
    tf32: float
    float32: float
    attention: float                                    # in half precision, with a mask: PyTorch's kernel for Ampere
    memory: float
    link: float                                         # to the other GPUs of the machine


GPUS = {"H100": Gpu(700e12, 356e12, 51.6e12, 68e12, 2.7e12, 300e9),
        "A100": Gpu(240e12, 120e12, 15e12, 40e12, 1.6e12, 200e9),
        "4090": Gpu(150e12, 75e12, 50e12, 45e12, 0.85e12, 20e9)}
SINGLE_ATTENTION = 0.5              # share of the rate of products that attention reaches in float32
PACKED_ATTENTION = 2.0              # FlashAttention without padding, compared with `attention`; not measured
KERNEL, LAUNCH = 2e-6, 7e-6         # seconds: the shortest kernel; starting one from Python
STARTS = 1.4                        # kernels that an operation starts, on average; an H100 started 940 in a step
TEACHER, STUDENTS, BATCH, LENGTH, PAIR_TOKENS = (12, 768), ((3, 384), (6, 768)), 64, 256, 210
PRECISIONS = {"float32": None, "TF32": None, "bf16": torch.bfloat16}
ONE, EIGHT = 1, 8                   # GPUs


class Operations(Watch):
    """Records bytes, FLOP, kind and kernels of each operation on the pretended GPU."""

    def __init__(self):
        super().__init__()
        self.rows: list[tuple[float, float, str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = self.kernels.total()
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if kernels := self.kernels.total() - before:
            given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
                           for tree in ((args, kwargs), result))
            flop, kind = flops(function._schema.name.split("::")[1], given, made)
            self.rows.append((sum(map(size, given + made)), flop, kind, kernels))
        return result


def size(tensor: torch.Tensor) -> int:
    """Bytes that a kernel reads or writes. An expanded tensor is read from the cache."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def flops(name: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> tuple[float, str]:
    """Return FLOP and kind of an operation: "bf16" or "float32" products, "attention", or "" for none."""
    half = "bf16" if given and given[0].dtype in (torch.bfloat16, torch.float16) else "float32"
    if name in ("mm", "bmm", "linear"):
        return 2.0 * made[0].numel() * given[0].shape[-1], half
    if name in ("addmm", "_addmm_activation"):
        return 2.0 * made[0].numel() * given[1].shape[-1], half
    if "efficient_attention" in name:
        query, key = given[1:3] if "backward" in name else given[:2]
        return (10.0 if "backward" in name else 4.0) * query.numel() * key.shape[2], f"attention {half}"
    if name == "_varlen_attn":                          # query (T, H, d), keys (T', H, d), ..., starts of B examples
        query, key, _, _, starts, *_ = given
        return 4.0 * query.numel() * len(key) / (len(starts) - 1), "attention packed"
    return 0.0, ""


def seconds(rows: list[tuple[float, float, str, int]], gpu: Gpu, precision: str) -> float:
    """Return the time of the kernels of all operations."""
    single = gpu.tf32 if precision != "float32" else gpu.float32
    rates = {"": 1.0, "bf16": gpu.bf16, "float32": single, "attention bf16": gpu.attention,
             "attention packed": PACKED_ATTENTION * gpu.attention, "attention float32": SINGLE_ATTENTION * single}
    return sum(max(moved / gpu.memory, flop / rates[kind], kernels * KERNEL) for moved, flop, kind, kernels in rows)


def model(shape: tuple[int, int]) -> CrossEncoder:
    layers, hidden_size = shape
    return CrossEncoder(BertConfig(num_hidden_layers=layers, hidden_size=hidden_size, num_attention_heads=12,
                                   intermediate_size=4 * hidden_size))


def examples(count: int, longest: int) -> Examples:
    """Pairs of `longest` tokens, except a shorter one, so that a padded batch has a mask."""
    lengths = np.full(count, longest, np.uint16)
    lengths[0] -= 1
    return Examples(np.ones(int(lengths.sum()), np.uint16), lengths, np.full(count, 12, np.uint16),
                    (np.arange(count) % 2).astype(np.int8), [f"q#d{index}" for index in range(count)])


def on_pretended_gpu(run: Callable[[torch.device], Operations]) -> list[tuple[float, float, str, int]]:
    with pretended_cuda() as device:
        return run(device).rows


def step_operations(student_shape: tuple[int, int], dtype: torch.dtype | None, batch_size: int) -> Operations:
    def run(device: torch.device) -> Operations:
        student, teacher = model(student_shape), model(TEACHER).eval()
        fit_projections(student, TEACHER[1], torch.Generator().manual_seed(0))
        step = ours.Step(student.to(device).train(), teacher.to(device), "reference", dtype)
        batch = examples(batch_size, LENGTH).batch(np.arange(batch_size), LENGTH, device)
        with Watch():
            step(batch)                                 # creates the optimizer's state
        with Operations() as seen:
            step(batch)
        return seen
    return on_pretended_gpu(run)


def scoring_operations(shape: tuple[int, int], dtype: torch.dtype | None) -> tuple[list, int]:
    """Return the operations of a batch of re-ranking, and its number of pairs."""
    count = scoring.BATCH_TOKENS["cuda"] // (-(-PAIR_TOKENS // 16) * 16)

    def run(device: torch.device) -> Operations:
        ranker = model(shape).eval().requires_grad_(False).to(device)
        scoring.prepare(ranker, dtype, int8=False)
        with Operations() as seen:
            scoring.score_chunk(ranker, examples(count, PAIR_TOKENS), [np.arange(count)])
        return seen
    return on_pretended_gpu(run), count


def step_table(student_shape: tuple[int, int]) -> str:
    rows, name = [], "/".join(map(str, student_shape))
    parameters = bert.count_parameters(model(student_shape))
    for precision, dtype in PRECISIONS.items():
        for gpus in (ONE, EIGHT):
            operations = step_operations(student_shape, dtype, BATCH // gpus)
            launches = round(STARTS * sum(kernels for *_, kernels in operations))
            cells = []
            for gpu in GPUS.values():
                exchange = 0.0 if gpus == ONE else 2 * 4 * parameters / gpu.link
                kernels = seconds(operations, gpu, precision)
                step = max(kernels + exchange, launches * LAUNCH)
                cells.append(f"{1000 * kernels:.1f} ms, {number(BATCH / step)} examples/s")
            rows.append([precision, str(gpus), f"{launches:,}", f"{1000 * launches * LAUNCH:.1f} ms", *cells])
    return (f"## A distillation step, student {name}, teacher {'/'.join(map(str, TEACHER))}: estimates\n\n"
            f"Batches of {BATCH} examples over all GPUs, padded to {LENGTH}.\n\n"
            + markdown(["precision", "GPUs", "kernels", "starting them", *(f"{gpu}: kernels, rate" for gpu in GPUS)],
                       rows))


def scoring_table() -> str:
    rows = []
    for shape in (*STUDENTS, TEACHER):
        for precision, dtype in PRECISIONS.items():
            operations, count = scoring_operations(shape, dtype)
            rows.append(["/".join(map(str, shape)), precision,
                         *(number(count / seconds(operations, gpu, precision)) for gpu in GPUS.values())])
    return (f"## Re-ranking, pairs of {PAIR_TOKENS} tokens, pairs/s of one GPU: estimates\n\n"
            + markdown(["model", "precision", *GPUS], rows))


def assumptions() -> str:
    rows = [[name, *(number(rate / 1e12) for rate in (gpu.bf16, gpu.tf32, gpu.float32, gpu.attention, gpu.memory)),
             number(gpu.link / 1e9)] for name, gpu in GPUS.items()]
    return (f"## Assumptions\n\nMeasured: the rates of the H100's products, and of its attention with padding. All "
            f"else is assumed. Attention without padding is {PACKED_ATTENTION:g} times as fast as with padding. In "
            f"float32, attention reaches {100 * SINGLE_ATTENTION:.0f} % of the products' rate. A kernel takes at least "
            f"{1e6 * KERNEL:.0f} µs, and the CPU {1e6 * LAUNCH:.0f} µs to start it.\n\n"
            + markdown(["GPU", "bf16, TFLOP/s", "TF32, TFLOP/s", "float32, TFLOP/s", "attention, TFLOP/s",
                        "memory, TB/s", "link, GB/s"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/estimates.md",
                        help="file for the tables (default: benchmarks/results/estimates.md)")
    args = parser.parse_args()
    parts = ["# GPUs: estimates, not measurements", "`python -m benchmarks.roofline`", assumptions(),
             *map(step_table, STUDENTS), scoring_table()]
    with atomic_writer(args.output) as handle:
        handle.write("\n\n".join(parts) + "\n")
    say(f"estimates    {args.output}")


if __name__ == "__main__":
    run_main(main)
