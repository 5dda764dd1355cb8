"""Time and memory of a step of distill.py's simplified objective beside the original's, with the same weights.

    python -m benchmarks.distillation
    python -m benchmarks.distillation --students 6x768 --raw_data_file train.tsv --device 0

In: nothing, or own labelled pairs (index <tab> query <tab> passage <tab> label); models have random weights.
Out, in --output_dir: distillation.md (tables), distillation.json (every single time), distillation.png. Compared are

    original         eager attention in teacher and student, scores and hidden states of all layers kept, losses on the
                     L×L score matrices, an optimizer that goes through the parameters one by one; padded to 256
    ours             distill.py --padding reference: the same losses, padded to 256
    ours, masked     distill.py --padding masked: pairs of similar length share a batch; padded to the longest
    ours, bf16; ours, masked, bf16      with --bf16 (always on CUDA; on a CPU with --bf16)

in turn. The cost of the padded ways does not depend on the texts; each round takes one batch for them and two for the
masked ways, one as far above as the other is below the middle by length, of a pool of pairs that was cut into batches
of similar length. Dropout is 0.1, as in the configurations of the published students; losses are compared without it.
Batches should not be much smaller than those of a real training (64): on a CPU, score matrices of more than 32 MiB are
got from the system anew each time, smaller ones are kept for re-use and cost less. Parts (--parts): steps, and memory
(the most that one step adds to what was there before it, in a process of its own for each length).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks import common, ours, pictures, samples
from benchmarks.original import OriginalAdam, OriginalBert, original_losses
from simplified_tinybert.common.device import select_device
from simplified_tinybert.common.files import run_main, say
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.bert import Batch
from simplified_tinybert.model.precision import warn_if_emulated
from simplified_tinybert.model.pretrained import read_config
from simplified_tinybert.ranking.speed import machine, seconds
from simplified_tinybert.ranking.tables import markdown

BATCH = {"cpu": {384: 32, 768: 16}, "cuda": {384: 64, 768: 64}}
WIDTH, LENGTHS = 256, (128, 256, 512)
ORIGINAL, OURS, MASKED, BF16 = "original", "ours", "ours, masked", ", bf16"
RETURN_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}     # freed memory goes back at once


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.common_arguments(parser)
    add = parser.add_argument
    add("--teacher", default="12x768", help="LAYERSxWIDTH (default: 12x768)")
    add("--students", nargs="+", default=["3x384", "6x768"], help="LAYERSxWIDTH (default: 3x384 6x768)")
    add("--batch_size", type=int, help="examples of a step (CPU: 32 at width 384, 16 above; CUDA: 64)")
    add("--memory_pairs", type=int, default=8, help="examples of a step whose memory is measured (default: 8)")
    add("--rounds", type=int, default=3, help="steps of each padded way, half of those of a masked one (default: 3)")
    add("--pool", type=int, default=64, help="batches that are sorted by length together (default: 64, as distill.py)")
    add("--dropout", type=float, default=0.1, help="of the student while training (default: 0.1)")
    add("--bf16", action="store_true", help="measure bfloat16 on a CPU too")
    add("--parts", nargs="+", choices=("steps", "memory"), default=["steps", "memory"], help="(default: both)")
    args = parser.parse_args()
    if args.quick:
        args.teacher, args.students, args.batch_size, args.rounds, args.pool = "2x48", ["1x24"], 2, 1, 4
        args.memory_pairs = 2
    return args


def batch_size(args: argparse.Namespace, student: str, device: torch.device) -> int:
    return args.batch_size or BATCH[device.type].get(int(student.split("x")[1]), 16)


def sample_rounds(args: argparse.Namespace, vocabulary: Path, size: int) -> tuple[Examples, list[list[np.ndarray]]]:
    """Examples, and for each round two batches of similar length, as far above and below the pool's middle."""
    total = args.pool * size
    lines = samples.read_pairs(args.raw_data_file, total) if args.raw_data_file else \
        list(islice(samples.Texts().training_lines(), total))
    examples = ours.tokenizer(vocabulary)(lines, WIDTH)
    batches = [batch for batch in ours.bucketed_batches(examples, size) if len(batch) == size]
    batches.sort(key=lambda batch: examples.lengths[batch].max())
    places = ((np.arange(2 * args.rounds) + 0.5) / (2 * args.rounds) * len(batches)).astype(np.int64)
    return examples, [[batches[places[number]], batches[places[-1 - number]]] for number in range(args.rounds)]


def original_step(student: OriginalBert, teacher: OriginalBert) -> Callable[[Batch], None]:
    optimizer = OriginalAdam(student, 5e-5, lambda step: 1.0)

    def step(batch: Batch) -> None:
        original_losses(student, teacher, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def make_steps(student: Path, teacher: Path, device: torch.device, bf16: bool) -> dict[str, Callable[[Batch], None]]:
    """Each way as a function that takes one optimizer step; all have their own student."""
    old_student, old_teacher = (OriginalBert(directory).to(device) for directory in (student, teacher))
    old_teacher.eval().requires_grad_(False)
    steps = {ORIGINAL: original_step(old_student.train(), old_teacher)}
    for suffix, dtype in (("", None), (BF16, torch.bfloat16))[:2 if bf16 else 1]:
        new_teacher = ours.load_model(teacher, device)                      # which float32 packs
        for name, padding in ((OURS, "reference"), (MASKED, "masked")):
            steps[name + suffix] = ours.Step(ours.load_model(student, device).train(), new_teacher, padding, dtype)
    return steps


def loss_difference(student: Path, teacher: Path, batch: Batch, device: torch.device) -> float:
    """Relative difference of the total loss, without dropout."""
    old = original_losses(OriginalBert(student).eval().to(device), OriginalBert(teacher).eval().to(device), batch)
    new = ours.Step(ours.load_model(student, device), ours.load_model(teacher, device), "reference").losses(batch)
    return abs(new["loss"].item() / old["loss"].item() - 1)


def measure_steps(args: argparse.Namespace, name: str, student: Path, teacher: Path, vocabulary: Path,
                  device: torch.device) -> dict:
    size = batch_size(args, name, device)
    examples, rounds = sample_rounds(args, vocabulary, size)
    few = examples.batch(rounds[0][0][:4], WIDTH).to(device)
    difference = loss_difference(student, teacher, few, device)
    steps = make_steps(student, teacher, device, args.bf16 or device.type == "cuda")
    times: dict[str, list[float]] = {way: [] for way in steps}
    say(f"{name}: batches of {size}")
    for step in steps.values():                                             # warms up, makes the optimizer's state
        step(few)
    for pair in rounds:
        fixed, snug = [examples.batch(pair[0], WIDTH).to(device)], [examples.batch(one).to(device) for one in pair]
        for way, step in steps.items():
            batches = snug if MASKED in way else fixed
            common.set_memory(way, device)
            spent = [seconds(lambda: step(batch), device) for batch in batches]  # noqa: B023
            times[way].append(statistics.mean(spent) / size)
        say(f"  masked {' and '.join(str(batch.input_ids.shape[1]) for batch in snug)} positions, ms per example: "
            + ", ".join(f"{way} {1000 * spent[-1]:.0f}" for way, spent in times.items()))
    used, configs = np.concatenate(sum(rounds, [])), (read_config(student), read_config(teacher))
    return {"batch_size": size, "mean_length": float(examples.lengths[used].mean()), "times": times,
            "widths": sorted(int(examples.lengths[batch].max()) for pair in rounds for batch in pair),
            "loss_difference": difference, "rates": common.best_rates(device, configs[1].hidden_size, args.quick),
            "flops": common.step_flops(*configs, [WIDTH]),
            "masked_flops": common.step_flops(*configs, examples.lengths[used]) / len(used)}


def steps_table(name: str, teacher: str, found: dict) -> str:
    rows, base = [], found["times"][ORIGINAL]
    for way, times in found["times"].items():
        rate = found["masked_flops" if MASKED in way else "flops"] / statistics.median(times)
        best = found["rates"]["bf16" if BF16 in way else "float32"]
        rows.append([way, common.spread([1000 * spent for spent in times]), common.ratio(base, times),
                     f"{rate / 1e9:,.0f}", f"{100 * rate / best:.0f} %"])
    return (f"## Student {name}, teacher {teacher}\n\nBatches of {found['batch_size']} pairs, "
            f"{found['mean_length']:.0f} tokens on average; masked batches are "
            f"{', '.join(map(str, found['widths']))} positions wide, all others {WIDTH}. Relative difference "
            f"of the losses (reference padding, no dropout): {found['loss_difference']:.1e}. Matrix products on this "
            f"machine at the teacher's width: {common.describe_rates(found['rates'])}.\n\n"
            + markdown(["way", "ms per example", "× original", "GFLOP/s", "of the rate"], rows))


def measure_memory(args: argparse.Namespace, student: Path, teacher: Path,
                   device: torch.device) -> dict[str, dict[int, float]]:
    """MiB that a step adds: {way: {length: MiB}}."""
    found: dict[str, dict[int, float]] = {}
    ways = [ORIGINAL, OURS, OURS + BF16] if device.type == "cuda" or args.bf16 else [ORIGINAL, OURS]
    for length in LENGTHS[:1] if args.quick else LENGTHS:
        for way in ways:
            command = [sys.executable, "-m", "benchmarks.step_memory", way, length, args.memory_pairs, student,
                       teacher, device]
            done = subprocess.run(list(map(str, command)), cwd=common.ROOT, env=os.environ | RETURN_MEMORY,
                                  capture_output=True, text=True, check=True)
            found.setdefault(way, {})[length] = json.loads(done.stdout) / 2 ** 20
        say(f"  {length} positions: " + ", ".join(f"{way} {sizes[length]:,.0f} MiB" for way, sizes in found.items()))
    return found


def memory_table(name: str, found: dict[str, dict[int, float]], size: int) -> str:
    rows = [[f"{length}", *(f"{sizes[length]:,.0f}" for sizes in found.values()),
             *(f"{100 * sizes[length] / found[ORIGINAL][length]:.0f} %" for way, sizes in found.items()
               if way != ORIGINAL)] for length in found[ORIGINAL]]
    return (f"## Most memory that a step adds, MiB: student {name}, {size} pairs\n\n"
            "Weights and the optimizer's moments, there before the step, are not counted; gradients are.\n\n"
            + markdown(["positions", *found, *(f"{way} / original" for way in found if way != ORIGINAL)], rows))


def draw(path: Path, measured: dict[str, dict], memory: dict[str, dict[int, float]], title: str) -> None:
    panels = []
    if measured:
        bars = {f"student\n{name}": {way: 1000 * statistics.median(times)
                                     for way, times in found["times"].items()} for name, found in measured.items()}
        panels.append(pictures.Panel("Time of a distillation step", "ms per example", bars=bars))
    if memory:
        panels.append(pictures.Panel(title, "MiB", "positions", lines=memory))
    if panels:
        pictures.draw(path, panels)


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = select_device(args.device)
    warn_if_emulated(torch.bfloat16 if args.bf16 else None, device)
    facts, sections, measured, memory = machine(device) | common.packing(device), [], {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = ours.vocabulary_directory(Path(scratch) / "vocabulary", args.vocab_file)
        sizes = {name: list(map(int, name.split("x"))) for name in [args.teacher, *args.students]}
        teacher = ours.make_model(Path(scratch) / "teacher", *sizes[args.teacher], vocabulary)
        students = {name: ours.make_model(Path(scratch) / f"student-{name}", *sizes[name], vocabulary,
                                          dropout=args.dropout, teacher_width=sizes[args.teacher][1])
                    for name in args.students}
        if "steps" in args.parts:
            measured = {name: measure_steps(args, name, directory, teacher, vocabulary, device)
                        for name, directory in students.items()}
            sections += [steps_table(name, args.teacher, found) for name, found in measured.items()]
        if "memory" in args.parts:
            first = args.students[0]
            memory = measure_memory(args, students[first], teacher, device)
            sections.append(memory_table(first, memory, args.memory_pairs))
    common.write_results(args.output_dir, "distillation", "Distillation", facts, sections, args,
                         {"steps": measured, "memory": memory})
    draw(args.output_dir / "distillation.png", measured, memory, f"Memory of a step, {args.students[0]}")


if __name__ == "__main__":
    run_main(main)
