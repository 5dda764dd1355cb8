"""Print the peak memory that one distillation step adds, in bytes. distillation.py runs this in separate processes.

    python -m benchmarks.step_memory WAY LENGTH PAIRS STUDENT_DIR TEACHER_DIR DEVICE

A short first step allocates what does not depend on the length: optimizer moments and library buffers. On CUDA, the
figure comes from the allocator. On a CPU, it is the peak of the process minus its memory before the step.
"""
import resource
import sys
from pathlib import Path

import torch

from benchmarks.distillation import BF16, ORIGINAL, original_step
from benchmarks.original import OriginalBert
from benchmarks.ours import Step, load_model
from simplified_tinybert.model.batch import Batch


def random_batch(pairs: int, length: int, device: torch.device) -> Batch:
    """Pairs with three positions of padding."""
    mask = (torch.arange(length) < length - 3).long().repeat(pairs, 1)      # not expand: pinning would fail
    ids = torch.randint(5, 1000, (pairs, length)) * mask
    return Batch(ids, torch.zeros_like(ids), mask, torch.arange(pairs) % 2).to(device)


def reset_peak() -> int:
    """Reset the peak and return the memory in use. Only Linux can reset it; other systems return the peak so far."""
    if not Path("/proc/self/clear_refs").is_file():
        return peak()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def peak() -> int:
    if Path("/proc/self/clear_refs").is_file():
        return status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    way, length, pairs, student, teacher, device = sys.argv[1:]
    device = torch.device(device)
    if way == ORIGINAL:
        original_teacher = OriginalBert(Path(teacher)).to(device).eval().requires_grad_(False)
        step = original_step(OriginalBert(Path(student)).to(device).train(), original_teacher)
    else:
        step = Step(load_model(Path(student), device).train(), load_model(Path(teacher), device), "reference",
                    torch.bfloat16 if way.endswith(BF16) else None)
    step(random_batch(2, 8, device))
    batch = random_batch(int(pairs), int(length), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(batch)
        print(torch.cuda.max_memory_allocated(device) - before)
    else:
        before = reset_peak()
        step(batch)
        print(peak() - before)


if __name__ == "__main__":
    main()
