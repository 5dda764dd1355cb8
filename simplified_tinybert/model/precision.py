"""Mixed precision: float16 with loss scaling (PyTorch's, or NVIDIA apex's), bfloat16, or plain float32."""
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

APEX_HELP = ("--fp16_backend apex: {found}; expected NVIDIA apex of a version that still has apex.amp, built from "
             "NVIDIA's repository (the package named apex on PyPI is something else). --fp16_backend torch does the "
             "same without it")

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")         # as torch.cpu.get_capabilities names them
# Variables that keep PyTorch or oneDNN from instructions that the processor has
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
TRIAL, TRIALS = (128, 384), 5           # rows and columns of a product that takes a millisecond; how often it is timed
MUCH_SLOWER = 1.5       # from here on a product that could as well be native is taken for an emulated one


def select_precision(fp16: bool, bf16: bool, device: torch.device, problems: Problems) -> torch.dtype | None:
    """Type of --fp16 or --bf16, None for plain float32; combinations that cannot work are added to `problems`."""
    if fp16 and bf16:
        problems.add("--fp16 and --bf16: choose one of them")
    if fp16 and device.type == "cpu":
        problems.add("--fp16 needs a CUDA device; on a CPU leave it out (float32) or use --bf16")
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Context of mixed precision in `dtype`, or of plain float32 if it is None."""
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def to_half(model: CrossEncoder, dtype: torch.dtype) -> None:
    """Turn a model that only scores into `dtype` outright, in place; pooler and classifier stay as they are."""
    model.bert.embeddings.to(dtype)
    model.bert.encoder.to(dtype)


def warn_if_emulated(dtype: torch.dtype | None, device: torch.device, otherwise: str = "leave the flag out") -> None:
    """Say so, before the work starts, where the device computes bfloat16 in detours. otherwise: the way out."""
    if dtype != torch.bfloat16:
        return
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
        has_bf16(getattr(torch.cpu, "get_capabilities", dict)(), any(os.environ.get(name) for name in ISA_LIMITS))
    if native:
        return
    factor = slowdown(dtype, device)
    if is_emulated(native, factor):
        warn(f"--bf16: bfloat16 is emulated on this device: matrix products take {factor:.2g} times as long as in "
             f"float32; {otherwise}")


def has_bf16(capabilities: Mapping[str, object], limited: bool) -> bool | None:
    """Whether a processor multiplies bfloat16 numbers itself; None where its instruction set does not tell.

    capabilities: what torch.cpu.get_capabilities finds.  limited: whether some of the instructions may not be used.
    """
    if capabilities.get("architecture") != "x86_64":                    # on ARM it depends on PyTorch's kernels too
        return None
    if not any(capabilities.get(name) for name in BF16_INSTRUCTIONS):
        return False
    return None if limited or not torch.backends.mkldnn.is_available() else True


def is_emulated(native: bool | None, factor: float) -> bool:
    """`native` as of `has_bf16`. factor: of `slowdown`. Who gains from bfloat16 has nothing to be warned of."""
    return not native and factor > (1.0 if native is False else MUCH_SLOWER)


def slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """How many times as long as in float32 a product takes in `dtype`: medians of a few, of milliseconds, in turn.

    On a CPU one thread's own time is counted, which other work on the machine does not lengthen.
    """
    rows, columns = TRIAL
    operands = {kind: (torch.ones(rows, columns, dtype=kind, device=device),
                       torch.ones(columns, columns, dtype=kind, device=device)) for kind in (torch.float32, dtype)}
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    times: dict[torch.dtype, list[float]] = {kind: [] for kind in operands}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(TRIALS + 1):
            for kind, pair in operands.items():
                start = clock()
                F.linear(*pair).sum().item()            # item() waits for a GPU
                times[kind].append(clock() - start)
    finally:
        torch.set_num_threads(threads)
    taken, base = (median(times[kind][1:]) for kind in (dtype, torch.float32))      # the first of each warms up
    return taken / max(base, 1e-9)


def import_apex_amp() -> object:
    """NVIDIA's apex.amp. Raises UserError where it is missing, with what to do."""
    try:
        from apex import amp
    except ImportError as error:
        raise UserError(APEX_HELP.format(found=error)) from error
    if not hasattr(amp, "initialize"):
        raise UserError(APEX_HELP.format(found="the installed apex has no amp.initialize"))
    return amp


class LossScaler:
    """Backward pass and optimizer step with PyTorch's loss scaling where float16 needs it."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None):
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)                 # before the optimizer clips
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.scaler.load_state_dict(state)


class ApexScaler:
    """The same through apex: it casts the model's operations itself, so no autocast context is needed."""

    def __init__(self, student: CrossEncoder, optimizer: torch.optim.Optimizer, opt_level: str):
        self.amp, self.optimizer = import_apex_amp(), optimizer
        self.amp.initialize(student, optimizer, opt_level=opt_level)

    def backward(self, loss: Tensor) -> None:
        with self.amp.scale_loss(loss, self.optimizer) as scaled:
            scaled.backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def state_dict(self) -> dict:
        return self.amp.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.amp.load_state_dict(state)
