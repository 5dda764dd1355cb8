"""Time and memory of a distillation step with the simplified objective: distill.py against the original, same weights.

    python -m benchmarks.distillation
    python -m benchmarks.distillation --students 6x768 --raw_data_file train.tsv --device 0

In: nothing, or your own labelled pairs (index <tab> query <tab> passage <tab> label). Models have random weights.
Out, in --output_dir: distillation.md (tables), distillation.json (all timings), distillation.png. These run in turn:

    original         eager attention in teacher and student, scores and hidden states of all layers kept, losses on the
                     L×L score matrices, an optimizer that loops over the parameters; padded to 256
    ours             distill.py --padding reference: the same losses, padded to 256
    ours, masked     distill.py --padding masked: pairs of similar length share a batch; padded to the longest
    ours, bf16; ours, masked, bf16      with --bf16 (always on CUDA; on a CPU with --bf16)

Pairs of similar length share a batch. In each round, `masked` uses two batches, equally far above and below the median
length. The other implementations use one of them, because their cost does not depend on length. Dropout is 0.1, as in
the published students; losses are compared without it. Batches should be about as large as in real training (64): on a
CPU, malloc requests score matrices above 32 MiB from the system each time, but reuses smaller ones, which is cheaper.
--parts: steps (time) and memory (the peak that one step adds, in a separate process for each length).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from benchmarks import common, ours, pictures, samples
from benchmarks.original import OriginalAdam, OriginalBert, original_losses
from simplified_tinybert.common.device import padded_length
from simplified_tinybert.common.files import run_main, say
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.precision import warn_if_slow
from simplified_tinybert.model.pretrained import read_config
from simplified_tinybert.ranking.presentation import markdown
from simplified_tinybert.ranking.speed import machine, seconds

BATCH = {"cpu": {384: 32, 768: 16}, "cuda": {384: 64, 768: 64}}
STEPS = {"cpu": 1, "cuda": 10}          # that are timed together
PADDED_LENGTH, LENGTHS = 256, (128, 256, 512)
ORIGINAL, OURS, MASKED, BF16 = "original", "ours", "ours, masked", ", bf16"
RETURN_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.common_arguments(parser)
    add = parser.add_argument
    add("--teacher", default="12x768", help="LAYERSxHIDDEN (default: 12x768)")
    add("--students", nargs="+", default=["3x384", "6x768"], help="LAYERSxHIDDEN (default: 3x384 6x768)")
    add("--batch_size", type=int, help="examples per step (CPU: 32 at hidden size 384, 16 above; CUDA: 64)")
    add("--memory_pairs", type=int, default=8, help="examples per step when memory is measured (default: 8)")
    add("--rounds", type=int, default=3, help="rounds of one step, or of two with masked padding (default: 3)")
    add("--pool", type=int, default=64, help="batches that are sorted by length together (default: 64, as distill.py)")
    add("--dropout", type=float, default=0.1, help="dropout of the student in training (default: 0.1)")
    add("--bf16", action="store_true", help="measure bfloat16 on a CPU too")
    add("--parts", nargs="+", choices=("steps", "memory"), default=["steps", "memory"],
        help="what to measure (default: both)")
    args = parser.parse_args()
    if args.quick:
        args.teacher, args.students, args.batch_size, args.rounds, args.pool = "2x48", ["1x24"], 2, 1, 4
        args.memory_pairs = 2
    return args


def sample_rounds(args: argparse.Namespace, vocabulary: Path, size: int) -> tuple[Examples, list[list[np.ndarray]]]:
    """Return examples, and for each round two batches, equally far above and below the median length."""
    total = args.pool * size
    lines = samples.read_pairs(args.raw_data_file, total) if args.raw_data_file else \
        list(islice(samples.Texts().training_lines(), total))
    examples = ours.tokenizer(vocabulary)(lines, PADDED_LENGTH)
    batches = [batch for batch in ours.bucketed_batches(examples, size) if len(batch) == size]
    batches.sort(key=lambda batch: examples.lengths[batch].max())
    quantiles = ((np.arange(2 * args.rounds) + 0.5) / (2 * args.rounds) * len(batches)).astype(np.int64)
    return examples, [[batches[quantiles[number]], batches[quantiles[-1 - number]]] for number in range(args.rounds)]


def original_step(student: OriginalBert, teacher: OriginalBert) -> Callable[[Batch], None]:
    optimizer = OriginalAdam(student, 5e-5, lambda step: 1.0)

    def step(batch: Batch) -> None:
        original_losses(student, teacher, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def make_steps(student: Path, teacher: Path, device: torch.device, bf16: bool) -> dict[str, Callable[[Batch], None]]:
    """Return for each implementation a function that runs one optimizer step. Each has its own student."""
    old_student, old_teacher = (OriginalBert(directory).to(device) for directory in (student, teacher))
    old_teacher.eval().requires_grad_(False)
    steps = {ORIGINAL: original_step(old_student.train(), old_teacher)}
    for suffix, dtype in (("", None), (BF16, torch.bfloat16))[:2 if bf16 else 1]:
        new_teacher = ours.load_model(teacher, device)                      # loaded again: float32 packs its weights
        for name, padding in ((OURS, "reference"), (MASKED, "masked")):
            steps[name + suffix] = ours.Step(ours.load_model(student, device).train(), new_teacher, padding, dtype)
    return steps


def loss_difference(student: Path, teacher: Path, batch: Batch, device: torch.device) -> float:
    """Relative difference of the total loss, without dropout."""
    old = original_losses(OriginalBert(student).eval().to(device), OriginalBert(teacher).eval().to(device), batch)
    new = ours.Step(ours.load_model(student, device), ours.load_model(teacher, device), "reference").losses(batch)
    return abs(new["loss"].item() / old["loss"].item() - 1)


def masked_batch(examples: Examples, chosen: np.ndarray, device: torch.device) -> Batch:
    """Pad to the longest pair of a batch, on a GPU to a multiple of 16, as distill.py does."""
    longest = int(examples.lengths[chosen].max())
    return examples.batch(chosen, padded_length(longest, device, PADDED_LENGTH), device)


def repeat(step: Callable[[Batch], None], batch: Batch, device: torch.device) -> None:
    """Make several steps without waiting for a GPU between them, as in training."""
    for _ in range(STEPS[device.type]):
        step(batch)


def measure_steps(args: argparse.Namespace, name: str, student: Path, teacher: Path, vocabulary: Path,
                  device: torch.device) -> dict:
    size = args.batch_size or BATCH[device.type].get(int(name.split("x")[1]), 16)
    examples, rounds = sample_rounds(args, vocabulary, size)
    small_batch = examples.batch(rounds[0][0][:4], PADDED_LENGTH).to(device)
    difference = loss_difference(student, teacher, small_batch, device)
    steps = make_steps(student, teacher, device, args.bf16 or device.type == "cuda")
    times: dict[str, list[float]] = {way: [] for way in steps}
    say(f"{name}: batches of {size}")
    for way, step in steps.items():                                         # warm-up; creates the optimizer's state
        step(small_batch)
        if device.type == "cuda":                                           # kernels are chosen for a batch's shape
            for chosen in chain(*rounds):
                step(masked_batch(examples, chosen, device) if MASKED in way else
                     examples.batch(chosen, PADDED_LENGTH, device))
    for indices in rounds:
        padded = [examples.batch(indices[0], PADDED_LENGTH).to(device)]
        masked = [masked_batch(examples, chosen, device) for chosen in indices]
        for way, step in steps.items():
            batches = masked if MASKED in way else padded
            common.set_process(way, device, tf32=way.startswith("ours") and "bf16" in way)
            spent = [seconds(lambda: repeat(step, batch, device), device) for batch in batches]  # noqa: B023
            times[way].append(statistics.mean(spent) / size / STEPS[device.type])
        say(f"  masked: length {' and '.join(str(batch.input_ids.shape[1]) for batch in masked)}; ms per example: "
            + ", ".join(f"{way} {1000 * spent[-1]:.0f}" for way, spent in times.items()))
    used, configs = np.concatenate(sum(rounds, [])), (read_config(student), read_config(teacher))
    return {"batch_size": size, "mean_length": float(examples.lengths[used].mean()), "times": times,
            "widths": sorted(int(examples.lengths[batch].max()) for pair in rounds for batch in pair),
            "loss_difference": difference, "rates": common.best_rates(device, configs[1].hidden_size, args.quick),
            "flops": common.step_flops(*configs, [PADDED_LENGTH]),
            "masked_flops": common.step_flops(*configs, examples.lengths[used]) / len(used)}


def steps_table(name: str, teacher: str, measured: dict) -> str:
    rows, original_times = [], measured["times"][ORIGINAL]
    for way, times in measured["times"].items():
        rate = measured["masked_flops" if MASKED in way else "flops"] / statistics.median(times)
        best = measured["rates"]["bf16" if BF16 in way else "float32"]
        rows.append([way, common.spread([1000 * spent for spent in times]), common.ratio(original_times, times),
                     f"{rate / 1e9:,.0f}", f"{100 * rate / best:.0f} %"])
    return (f"## Student {name}, teacher {teacher}\n\nBatches of {measured['batch_size']} pairs, "
            f"{measured['mean_length']:.0f} tokens on average; masked batches have a sequence length of "
            f"{', '.join(map(str, measured['widths']))}, all others {PADDED_LENGTH}. Relative difference "
            f"of the losses (reference padding, no dropout): {measured['loss_difference']:.1e}. Matrix products on "
            f"this machine at the teacher's hidden size: {common.describe_rates(measured['rates'])}.\n\n"
            + markdown(["way", "ms per example", "× original", "GFLOP/s", "of the rate"], rows))


def measure_memory(args: argparse.Namespace, student: Path, teacher: Path,
                   device: torch.device) -> dict[str, dict[int, float]]:
    """Return the MiB that a step adds: {way: {length: MiB}}."""
    added: dict[str, dict[int, float]] = {}
    ways = [ORIGINAL, OURS, OURS + BF16] if device.type == "cuda" or args.bf16 else [ORIGINAL, OURS]
    for length in LENGTHS[:1] if args.quick else LENGTHS:
        for way in ways:
            command = [sys.executable, "-m", "benchmarks.step_memory", way, length, args.memory_pairs, student,
                       teacher, device]
            done = subprocess.run(list(map(str, command)), cwd=common.ROOT, env=os.environ | RETURN_FREED_MEMORY,
                                  capture_output=True, text=True, check=True)
            added.setdefault(way, {})[length] = json.loads(done.stdout) / 2 ** 20
        say(f"  length {length}: " + ", ".join(f"{way} {sizes[length]:,.0f} MiB" for way, sizes in added.items()))
    return added


def memory_table(name: str, added: dict[str, dict[int, float]], pairs: int) -> str:
    others = [way for way in added if way != ORIGINAL]
    rows = [[f"{length}", *(f"{sizes[length]:,.0f}" for sizes in added.values()),
             *(f"{100 * added[way][length] / original:.0f} %" for way in others)]
            for length, original in added[ORIGINAL].items()]
    return (f"## Memory that a step adds, MiB: student {name}, {pairs} pairs\n\n"
            "Gradients and activations are counted. Weights and optimizer moments are not: they exist before the "
            "step.\n\n" + markdown(["sequence length", *added, *(f"{way} / original" for way in others)], rows))


def draw(path: Path, measured: dict[str, dict], memory: dict[str, dict[int, float]], title: str) -> None:
    panels = []
    if measured:
        bars = {f"student\n{name}": {way: 1000 * statistics.median(times) for way, times in found["times"].items()}
                for name, found in measured.items()}
        panels.append(pictures.Panel("Time of a distillation step", "ms per example", bars=bars))
    if memory:
        panels.append(pictures.Panel(title, "MiB", "sequence length", lines=memory))
    if panels:
        pictures.draw(path, panels)


def main() -> None:
    args = parse_args()
    device = common.set_up(args)
    warn_if_slow(torch.bfloat16 if args.bf16 else None, device)
    hardware, sections, measured, memory = machine(device) | common.packing(device), [], {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = ours.vocabulary_directory(Path(scratch) / "vocabulary", args.vocab_file)
        teacher = ours.make_model(Path(scratch) / "teacher", args.teacher, vocabulary)
        students = {name: ours.make_model(Path(scratch) / f"student-{name}", name, vocabulary, dropout=args.dropout,
                                          teacher_size=int(args.teacher.split("x")[1])) for name in args.students}
        if "steps" in args.parts:
            for name, directory in students.items():
                measured[name] = measure_steps(args, name, directory, teacher, vocabulary, device)
                sections.append(steps_table(name, args.teacher, measured[name]))
                common.write_results("Distillation", hardware, sections, args, {"steps": measured})
        if "memory" in args.parts:
            first = args.students[0]
            memory = measure_memory(args, students[first], teacher, device)
            sections.append(memory_table(first, memory, args.memory_pairs))
            common.write_results("Distillation", hardware, sections, args, {"steps": measured, "memory": memory})
    common.print_results(args)
    draw(args.output_dir / "distillation.png", measured, memory, f"Memory of a step, {args.students[0]}")


if __name__ == "__main__":
    run_main(main)
