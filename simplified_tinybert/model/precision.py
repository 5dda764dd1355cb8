"""Mixed precision: float16, bfloat16, or plain float32. (Loss scaling for float16 is in training/optimizer.py.)"""
import argparse
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from simplified_tinybert.common.files import Problems, say, warn
from simplified_tinybert.model.bert import CrossEncoder

PRECISIONS = ("fp16", "bf16", "tf32", "int8")           # flags that choose a precision other than float32
NEEDED_DEVICE = {"fp16": "cuda", "tf32": "cuda", "int8": "cpu", "compile": "cuda"}
# Environment variables that disable CPU instructions in PyTorch or oneDNN
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
EMULATION_FACTOR = 1.5                  # if the instructions are unknown, a slowdown above this means emulation


def select_precision(args: argparse.Namespace, device: torch.device, problems: Problems) -> torch.dtype | None:
    """Return the dtype of --fp16 or --bf16; None for --tf32, --int8 and plain float32. Errors are added to `problems`.

    A script may have only some of these flags.
    """
    chosen = [name for name in PRECISIONS if vars(args).get(name)]
    if len(chosen) > 1:
        problems.add(f"{' and '.join(f'--{name}' for name in chosen)}: choose one of them")
    for name, needed in NEEDED_DEVICE.items():
        if vars(args).get(name) and needed != device.type:
            problems.add(f"--{name} needs a {needed.upper()} device; leave it out, or choose another --device")
    return torch.float16 if "fp16" in chosen else torch.bfloat16 if "bf16" in chosen else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Return a context for mixed precision in `dtype`, or for plain float32 if it is None."""
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def to_half(model: CrossEncoder, dtype: torch.dtype) -> None:
    """Convert a model for inference to `dtype`, in place, except pooler and classifier."""
    model.bert.embeddings.to(dtype)
    model.bert.encoder.to(dtype)


def cast_linear_layers(model: CrossEncoder, dtype: torch.dtype) -> None:
    """Convert the linear layers of an encoder in place. `autocast` would do it in every step, with the same outputs."""
    for layer in model.bert.encoder.modules():
        if isinstance(layer, nn.Linear):
            layer.to(dtype)


def warn_if_slow(dtype: torch.dtype | None, device: torch.device, advice: str = "leave the flag out") -> None:
    """Warn if `dtype` is bfloat16 and the device only emulates it, or if it is None and a GPU could do much better."""
    native = native_bf16(device)
    if device.type == "cuda":
        if dtype is None and native and torch.get_float32_matmul_precision() == "highest":
            say("note         float32: --bf16 would be several times as fast on this GPU")
        if dtype == torch.bfloat16 and not native:
            warn("--bf16: this GPU has no bfloat16 instructions; leave the flag out, or use --fp16 where there is one")
    elif dtype == torch.bfloat16 and not native and is_emulated(native, factor := slowdown(dtype)):
        warn(f"--bf16: bfloat16 is emulated on this CPU: matrix products take {factor:.2g} times as long as in "
             f"float32; {advice}")


def native_bf16(device: torch.device) -> bool | None:
    """Whether a device has bfloat16 instructions; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return has_bf16(getattr(torch.cpu, "get_capabilities", dict)(), any(os.environ.get(name) for name in ISA_LIMITS))


def has_bf16(capabilities: Mapping[str, object], limited: bool) -> bool | None:
    """Whether a CPU of these `capabilities` has bfloat16 instructions; None: unknown, or perhaps `limited`."""
    if capabilities.get("architecture") != "x86_64":                    # on ARM, it also depends on PyTorch's kernels
        return None
    if not capabilities.get("avx512_bf16") and not capabilities.get("amx_bf16"):
        return False
    return None if limited or not torch.backends.mkldnn.is_available() else True


def has_amx() -> bool:
    """Whether the CPU has matrix instructions for bfloat16, which score about twice as fast as float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16")) and not any(map(os.environ.get, ISA_LIMITS))


def is_emulated(native: bool | None, factor: float) -> bool:
    """Whether bfloat16 is emulated, and slower than float32. native: from `has_bf16`; factor: from `slowdown`."""
    return not native and factor > (1.0 if native is False else EMULATION_FACTOR)


def slowdown(dtype: torch.dtype) -> float:
    """Return the time of a CPU's matrix product in `dtype` relative to float32: medians of five of a millisecond."""
    operands = {kind: (torch.ones(128, 384, dtype=kind), torch.ones(384, 384, dtype=kind))
                for kind in (torch.float32, dtype)}
    times: dict[torch.dtype, list[float]] = {kind: [] for kind in operands}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(1 + 5):                          # the first round is a warm-up
            for kind, pair in operands.items():
                start = time.thread_time()              # excludes other load
                F.linear(*pair)
                times[kind].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return median(times[dtype][1:]) / max(median(times[torch.float32][1:]), 1e-9)
