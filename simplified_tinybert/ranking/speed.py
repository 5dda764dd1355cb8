"""Measure how many pairs per second several models score on the same pairs, and describe the machine."""
import datetime
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from simplified_tinybert.common.files import say
from simplified_tinybert.data.features import Examples, joined, read_chunks
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.ranking.scoring import score_all

SPEED_PAIRS = {"cpu": 256, "cuda": 16384}


def machine(device: torch.device) -> dict[str, str]:
    """Return hardware, system and package versions, as needed to judge a measured speed."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    found = {"CPU": names[0] if names else platform.processor() or platform.machine(),
             "instructions": torch.backends.cpu.get_cpu_capability(),
             "cores": f"{os.cpu_count()}, threads used: {torch.get_num_threads()}",
             "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2 ** 30:.0f} GiB",
             "huge pages": " ".join(_lines("/sys/kernel/mm/transparent_hugepage/enabled")) or "unknown",
             "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "none used",
             "system": platform.platform(), "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "sentence-transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["load before"] = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return found | {"date": datetime.date.today().isoformat()}


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).is_file() else []


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall-clock time of a call, including what it leaves running on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def sample_pairs(paths: list[Path], total: int, count: int) -> Examples:
    """Return `count` evenly spaced pairs of the `total` pairs in feature files; all of them if there are fewer."""
    count = min(count, total)
    chosen, seen, samples = np.arange(count) * total // count, 0, []
    for path in paths:
        for chunk in read_chunks(path):
            indices = chosen[(chosen >= seen) & (chosen < seen + len(chunk))] - seen
            if len(indices):
                samples.append(chunk.take(indices))
            seen += len(chunk)
    return joined(samples)


def measure(models: dict[str, CrossEncoder], pairs: Examples, device: torch.device, rounds: int) \
        -> dict[str, list[float]]:
    """Return the pairs per second of each model in each round, after a warm-up pass.

    The models must be on the device and prepared for scoring. They run in turn (A B C A B C ...), so that other load on
    the machine affects all of them. Raises UserError for logits that are not finite.
    """
    for model in models.values():
        score_all(model, pairs)
    rates = {name: [] for name in models}
    for number in range(1, rounds + 1):
        for name, model in models.items():
            rates[name].append(len(pairs) / seconds(partial(score_all, model, pairs), device))
        say(f"round {number}      " + ", ".join(f"{name} {values[-1]:,.1f} pairs/s" for name, values in rates.items()))
    return rates
