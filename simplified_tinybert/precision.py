"""Mixed precision: float16 with loss scaling (PyTorch's, or NVIDIA apex's), bfloat16, or plain float32."""
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from simplified_tinybert.files import Problems, UserError
from simplified_tinybert.modeling import CrossEncoder

APEX_HELP = ("--fp16_backend apex: {found}; expected NVIDIA apex of a version that still has apex.amp, built from "
             "NVIDIA's repository (the package named apex on PyPI is something else). --fp16_backend torch does the "
             "same without it")


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
