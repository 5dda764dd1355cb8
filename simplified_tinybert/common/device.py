"""On which device a script computes, and how it fetches what it works on."""
import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from simplified_tinybert.common.files import UserError, process_count, process_number, warn

Item = TypeVar("Item")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                   # of glibc's malloc.h


def select_device(name: str, no_cuda: bool = False) -> torch.device:
    """Device of --device: auto, cpu, cuda, cuda:1, or a CUDA index as the original took it. Raises UserError.

    As in the original a bare index on a machine without CUDA means the CPU; `cuda` asked for by name is an error there.
    Of several processes on a machine each takes the CUDA device of its own number.
    """
    available = 0 if no_cuda or not torch.cuda.is_available() else torch.cuda.device_count()
    if name == "cpu" or no_cuda or (name == "auto" and not available):
        return torch.device("cpu")
    index = str(process_number("LOCAL_RANK")) if name in ("auto", "cuda") else name.removeprefix("cuda:")
    if not index.isdecimal():
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:1, or the index of one CUDA device")
    if process_count() > 1:
        _check_devices(name, available)
    if not available and name == index:
        warn(f"--device {name}: no CUDA device here, computing on the CPU")
        return torch.device("cpu")
    if int(index) >= available:
        raise UserError(f"--device {name}: {available} CUDA devices can be used here; --device cpu works everywhere")
    return torch.device("cuda", int(index))


def _check_devices(name: str, available: int) -> None:
    """Raise UserError, in all processes of a machine alike, if they cannot have a CUDA device each."""
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name}: names one device for {process_count()} processes; leave the flag out, and "
                        f"each takes one of its own (of those that CUDA_VISIBLE_DEVICES admits)")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if processes > available:
        raise UserError(f"--device {name}: {available} CUDA devices can be used here, for {processes} processes; start "
                        f"as many as there are devices (--nproc_per_node), or compute with --device cpu")


def keep_freed_memory(device: torch.device) -> None:
    """Keep the C library from returning large tensors' memory to the system, which hands it out again page by page.

    Worth 5 to 40 % of the time of large batches on a CPU. Only glibc has the setting; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if device.type == "cpu" and mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; a thread fetches the next one while the caller works on the present one."""
    with ThreadPoolExecutor(1) as pool:
        end = object()
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item
