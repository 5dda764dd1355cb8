"""How many pairs a second models score, beside each other on the same pairs; and on what machine.

Models run in turn (A B C A B C ...), so that whatever else the machine does meets all of them.
"""
import datetime
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from simplified_tinybert.common.files import say
from simplified_tinybert.data.features import Examples, joined, read_chunks
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.ranking.scoring import BatchLimits, check_finite, score_chunk, token_batches


def machine(device: torch.device) -> dict[str, str]:
    """What a reader must know to judge a figure."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    facts = {"CPU": names[0] if names else platform.processor() or platform.machine(),
             "instructions": torch.backends.cpu.get_cpu_capability(),
             "cores": f"{os.cpu_count()}, threads used: {torch.get_num_threads()}",
             "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2 ** 30:.0f} GiB",
             "huge pages": " ".join(_lines("/sys/kernel/mm/transparent_hugepage/enabled")) or "unknown",
             "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "none used",
             "system": platform.platform(), "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "sentence-transformers"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["load before"] = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return facts | {"date": datetime.date.today().isoformat()}


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).is_file() else []


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def sample_pairs(paths: list[Path], total: int, count: int) -> Examples:
    """`count` of the `total` pairs of feature files, or all if there are fewer, at equal distances."""
    count = min(count, total)
    wanted, seen, parts = np.arange(count) * total // count, 0, []
    for path in paths:
        for chunk in read_chunks(path):
            here = wanted[(wanted >= seen) & (wanted < seen + len(chunk))] - seen
            if len(here):
                parts.append(_take(chunk, here))
            seen += len(chunk)
    return joined(parts)


def _take(examples: Examples, indices: np.ndarray) -> Examples:
    tokens = [examples.tokens[examples.offsets[index]:examples.offsets[index + 1]] for index in indices]
    return Examples(np.concatenate(tokens), examples.lengths[indices], examples.query_lengths[indices],
                    examples.labels[indices], [examples.ids[index] for index in indices])


def measure(models: dict[str, CrossEncoder], pairs: Examples, device: torch.device, rounds: int) \
        -> dict[str, list[float]]:
    """Pairs per second of each model in each round, after a pass that is not counted. Raises UserError for bad logits.

    The models are prepared for scoring, and on the device.
    """
    def score(model: CrossEncoder) -> np.ndarray:
        batches = token_batches(pairs.lengths, BatchLimits.of(device))
        return score_chunk(model, pairs, batches, device, tqdm(disable=True))

    for model in models.values():
        check_finite(pairs, score(model))
    rates = {name: [] for name in models}
    for turn in range(rounds):
        for name, model in models.items():
            rates[name].append(len(pairs) / seconds(lambda: score(model), device))  # noqa: B023
        say(f"round {turn + 1}      " + ", ".join(f"{name} {found[-1]:,.1f} pairs/s" for name, found in rates.items()))
    return rates
