"""Choice of the device, memory settings, and prefetching."""
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from simplified_tinybert.common.files import UserError, process_count, process_number, reason, warn

Item = TypeVar("Item")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                   # from glibc's malloc.h
FULL_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")     # in errors of CUDA, its libraries, the CPU
NVIDIA_DRIVER = "/proc/driver/nvidia/version"           # exists where the driver is loaded


def select_device(name: str, no_cuda: bool = False) -> torch.device:
    """Device for --device: auto, cpu, cuda, cuda:1, or a CUDA index, as in the original. Raises UserError.

    On a machine without CUDA, an index means the CPU, as in the original; `cuda` is an error. With several processes
    per machine, each takes the CUDA device with its local rank, or the only one that its job manager shows to it.
    """
    if name == "cpu" or no_cuda:
        return torch.device("cpu")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not available and name == "auto":
        if os.path.exists(NVIDIA_DRIVER):
            warn(f"there is an NVIDIA driver, but PyTorch {torch.__version__} cannot use a GPU ({why_no_cuda()}); "
                 f"computing on the CPU")
        return torch.device("cpu")
    alone = available == 1 and not os.environ.get("LOCAL_WORLD_SIZE")       # SLURM can show each task only its own GPU
    index = name.removeprefix("cuda:")
    if name in ("auto", "cuda"):
        index = "0" if alone else str(process_number("LOCAL_RANK"))
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


def why_no_cuda() -> str:
    """Return PyTorch's reason why it cannot use CUDA, such as a driver that is too old."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:     # AssertionError: PyTorch was built without CUDA
        return reason(error)
    return "it finds no device"


@contextmanager
def explain_full_memory(advice: str) -> Iterator[None]:
    """Turn PyTorch's error about memory that cannot be allocated, on a GPU or not, into a UserError with advice."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in FULL_MEMORY):
            raise
        raise UserError(f"the memory is full ({reason(error)}); {advice}") from error


def prepare_device(device: torch.device, tf32: bool = False) -> None:
    """Set PyTorch up for the device, for the whole process. tf32: let float32 products on a GPU use TF32.

    Raises UserError if PyTorch has no kernels for the GPU.
    """
    if device.type == "cpu":
        keep_freed_memory()
        return
    torch.cuda.set_device(device)                       # PyTorch chooses kernels by the properties of this device
    check_kernels(device)
    torch.backends.cuda.enable_cudnn_sdp(False)         # cuDNN plans attention for each new shape, up to a second
    if tf32:
        torch.set_float32_matmul_precision("high")


def check_kernels(device: torch.device) -> None:
    """Raise UserError if the GPU is older than all those that PyTorch was built for."""
    built_for = [int(number) for name in torch.cuda.get_arch_list() for number in re.findall(r"^sm_(\d+)", name)]
    major, minor = torch.cuda.get_device_capability(device)
    if built_for and 10 * major + minor < min(built_for):
        raise UserError(f"PyTorch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} (compute "
                        f"capability {major}.{minor}); install a build for an older CUDA version (see pytorch.org), or "
                        f"use --device cpu")


def padded_length(longest: int, device: torch.device, limit: int) -> int:
    """Return the length to pad a batch to: on a GPU a multiple of 16 for the fast kernels, but not above `limit`."""
    return longest if device.type == "cpu" else max(longest, min(-(-longest // 16) * 16, limit))


def keep_freed_memory() -> None:
    """Make the C library keep the memory of freed tensors. Otherwise the system must provide it again page by page.

    It saves 5 to 40 % of the time of large batches on the CPU. Only glibc has this setting; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
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
