"""Mixed precision: float16 with loss scaling (by PyTorch or NVIDIA apex), bfloat16, or plain float32."""
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from simplified_tinybert.common.files import Problems, UserError, warn
from simplified_tinybert.model.bert import CrossEncoder

APEX_HELP = ("--fp16_backend apex: {found}; expected a version of NVIDIA apex with apex.amp, built from NVIDIA's "
             "repository (the package apex on PyPI is something else); --fp16_backend torch needs no apex")
# Environment variables that disable CPU instructions in PyTorch or oneDNN
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
EMULATION_FACTOR = 1.5                  # if the instructions are unknown, a slowdown above this means emulation


def select_precision(fp16: bool, bf16: bool, device: torch.device, problems: Problems) -> torch.dtype | None:
    """Return the dtype of --fp16 or --bf16, or None for plain float32. Input errors are added to `problems`."""
    if fp16 and bf16:
        problems.add("--fp16 and --bf16: choose one of them")
    if fp16 and device.type == "cpu":
        problems.add("--fp16 needs a CUDA device; on a CPU, leave it out (float32) or use --bf16")
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Return a context for mixed precision in `dtype`, or for plain float32 if it is None."""
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def to_half(model: CrossEncoder, dtype: torch.dtype) -> None:
    """Convert a model for inference to `dtype`, in place, except pooler and classifier."""
    model.bert.embeddings.to(dtype)
    model.bert.encoder.to(dtype)


def warn_if_emulated(dtype: torch.dtype | None, device: torch.device, advice: str = "leave the flag out") -> None:
    """Warn if `dtype` is bfloat16 and the device only emulates it."""
    if dtype != torch.bfloat16:
        return
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
        has_bf16(getattr(torch.cpu, "get_capabilities", dict)(), any(os.environ.get(name) for name in ISA_LIMITS))
    if not native and is_emulated(native, factor := slowdown(dtype, device)):
        warn(f"--bf16: bfloat16 is emulated on this device: matrix products take {factor:.2g} times as long as in "
             f"float32; {advice}")


def has_bf16(capabilities: Mapping[str, object], limited: bool) -> bool | None:
    """Whether a CPU of these `capabilities` has bfloat16 instructions; None: unknown, or perhaps `limited`."""
    if capabilities.get("architecture") != "x86_64":                    # on ARM, it also depends on PyTorch's kernels
        return None
    if not capabilities.get("avx512_bf16") and not capabilities.get("amx_bf16"):
        return False
    return None if limited or not torch.backends.mkldnn.is_available() else True


def is_emulated(native: bool | None, factor: float) -> bool:
    """Whether bfloat16 is emulated, and slower than float32. native: from `has_bf16`; factor: from `slowdown`."""
    return not native and factor > (1.0 if native is False else EMULATION_FACTOR)


def slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """Return the time of a matrix product in `dtype` relative to float32: medians of five products of a millisecond."""
    operands = {kind: (torch.ones(128, 384, dtype=kind, device=device),
                       torch.ones(384, 384, dtype=kind, device=device)) for kind in (torch.float32, dtype)}
    clock = time.thread_time if device.type == "cpu" else time.perf_counter     # thread_time excludes other load
    times: dict[torch.dtype, list[float]] = {kind: [] for kind in operands}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(1 + 5):                          # the first round is a warm-up
            for kind, pair in operands.items():
                start = clock()
                F.linear(*pair).sum().item()            # item() waits for a GPU
                times[kind].append(clock() - start)
    finally:
        torch.set_num_threads(threads)
    return median(times[dtype][1:]) / max(median(times[torch.float32][1:]), 1e-9)


def import_apex_amp() -> object:
    """Return NVIDIA's apex.amp. Raises UserError if it is missing."""
    try:
        from apex import amp
    except ImportError as error:
        raise UserError(APEX_HELP.format(found=error)) from error
    if not hasattr(amp, "initialize"):
        raise UserError(APEX_HELP.format(found="the installed apex has no amp.initialize"))
    return amp


class LossScaler(torch.amp.GradScaler):
    """Backward pass and optimizer step, with PyTorch's loss scaling if `dtype` is float16."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None):
        super().__init__(device.type, enabled=dtype == torch.float16)

    def backward(self, loss: Tensor) -> None:
        self.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.unscale_(optimizer)                        # before the optimizer clips
        super().step(optimizer)
        self.update()


class ApexScaler:
    """Does the same as LossScaler with apex, which casts operations itself and needs no autocast context."""

    def __init__(self, student: CrossEncoder, optimizer: torch.optim.Optimizer, opt_level: str):
        self.amp, self.optimizer = import_apex_amp(), optimizer
        self.state_dict, self.load_state_dict = self.amp.state_dict, self.amp.load_state_dict
        self.amp.initialize(student, optimizer, opt_level=opt_level)

    def backward(self, loss: Tensor) -> None:
        with self.amp.scale_loss(loss, self.optimizer) as scaled:
            scaled.backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
