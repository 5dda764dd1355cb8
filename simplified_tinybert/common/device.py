"""Choice of the device, memory settings, and prefetching."""
import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from simplified_tinybert.common.files import UserError, process_count, process_number, warn

Item = TypeVar("Item")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                   # from glibc's malloc.h


def select_device(name: str, no_cuda: bool = False) -> torch.device:
    """Device for --device: auto, cpu, cuda, cuda:1, or a CUDA index, as in the original. Raises UserError.

    On a machine without CUDA, an index means the CPU, as in the original; `cuda` is an error. With several processes
    per machine, each takes the CUDA device with its local rank.
    """
    available = 0 if no_cuda or not torch.cuda.is_available() else torch.cuda.device_count()
    if name == "cpu" or no_cuda or (name == "auto" and not available):
        return torch.device("cpu")
    index = str(process_number("LOCAL_RANK")) if name in ("auto", "cuda") else name.removeprefix("cuda:")
    if not index.isdecimal():
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:1, or the index of one CUDA device")
    if process_count() > 1:
        if name not in ("auto", "cuda"):
            raise UserError(f"--device {name}: {process_count()} processes cannot share one device; leave the flag "
                            f"out, and each process takes its own device (CUDA_VISIBLE_DEVICES restricts the choice)")
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if processes > available:                       # an error in every process of the machine
            raise UserError(f"--device {name}: {available} CUDA devices are available for {processes} processes; start "
                            f"one process per device (--nproc_per_node), or use --device cpu")
    if not available and name == index:
        warn(f"--device {name}: no CUDA device found, computing on the CPU")
        return torch.device("cpu")
    if int(index) >= available:
        raise UserError(f"--device {name}: {available} CUDA devices are available; use --device cpu")
    return torch.device("cuda", int(index))


def keep_freed_memory(device: torch.device) -> None:
    """Make the C library keep the memory of freed tensors. Otherwise the system must provide it again page by page.

    It saves 5 to 40 % of the time of large batches on the CPU. Only glibc has this setting; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if device.type == "cpu" and mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the same items; a thread fetches the next one while the caller processes the current one."""
    with ThreadPoolExecutor(1) as pool:
        end = object()
        next_item = pool.submit(next, items, end)
        while (item := next_item.result()) is not end:
            next_item = pool.submit(next, items, end)
            yield item
