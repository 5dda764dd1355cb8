"""A pretended CUDA device: code for GPUs runs on tensors that have shapes, types and devices, but no numbers.

The device guard (cuda_guard.py) must be loaded before torch. Within `pretended_cuda`, new tensors are FakeTensors. An
operation then raises an error if it mixes devices, if it needs a number from the device, or if its shape depends on
numbers. `Watch` records what a GPU would be asked to do. Values, memory, races and real kernels are not tested by this.
"""
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations on a GPU's tensors that start no kernel
NO_KERNEL = {"alias", "detach", "device", "empty", "empty_like", "empty_strided", "_unsafe_view"}
PRODUCTS = {"_addmm_activation", "addmm", "baddbmm", "bmm", "linear", "mm"}


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
                    dropout_p: float = 0.0, scale: float | None = None) -> torch.Tensor:
    """What PyTorch does on a GPU with a batch that has padding. FakeTensors alone would take a slow way."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    assert query.shape[-1] % 8 == 0, f"heads of {query.shape[-1]} have no fast kernel"
    if attn_mask is not None:
        assert attn_mask.dtype == query.dtype, f"each layer converts the attention mask from {attn_mask.dtype}"
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled() and query.requires_grad, dropout_p, scale=scale)[0]


def replace_parameters(module: torch.nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """nn.Module.to, which PyTorch does by swapping tensors in place. FakeTensors cannot be swapped."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(convert(parameter.detach()), parameter.requires_grad))
    return module


def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.device.type == "cpu", f"a tensor on {tensor.device} cannot be pinned"
    assert torch._debug_has_internal_overlap(tensor) != 1, "an expanded tensor cannot be pinned"
    return tensor


def array_of_zeros(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.device.type == "cpu", f"a tensor on {tensor.device} has no array"
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """Context in which `cuda:0`, its autocast and its GradScaler exist. Yields the device."""
    with ExitStack() as stack:
        for place, name, replacement in (
                (torch.nn.Module, "_apply", replace_parameters), (torch.Tensor, "pin_memory", pin_memory),
                (FakeTensor, "numpy", array_of_zeros), (F, "scaled_dot_product_attention", fused_attention),
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
                (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
                (torch.cuda, "get_device_capability", lambda device: (9, 0)),
                (torch.backends.cuda, "is_flash_attention_available", lambda: True),
                (torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8)),
                (torch.cuda, "set_rng_state", lambda state, device: None),
                (torch.cuda, "current_stream", lambda device: None)):
            stack.enter_context(patch.object(place, name, replacement, create=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield torch.device("cuda", 0)


class Watch(TorchDispatchMode):
    """What a GPU is asked to do while this mode is active."""

    def __init__(self):
        super().__init__()
        self.kernels: Counter = Counter()               # by operation
        self.to_host: list[str] = []                    # operations that copy from the device and wait for it
        self.waits = 0                                  # for copies from the device that were started earlier
        self.products: Counter = Counter()              # matrix products by type
        self.grams: set[torch.dtype] = set()            # types of products of a tensor with itself
        self.scaler_steps = 0                           # each of them asks the device whether gradients are finite

    def __enter__(self) -> "Watch":
        self.patches = ExitStack()
        self.patches.enter_context(patch.object(torch.amp.GradScaler, "_maybe_opt_step",
                                                lambda scaler, *inputs: self.step_of_scaler(*inputs)))
        self.patches.enter_context(patch.object(torch.cuda, "Event", lambda: Event(self)))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.patches.close()
        super().__exit__(*error)

    def step_of_scaler(self, optimizer: torch.optim.Optimizer, state: dict, *args: object) -> object:
        assert state["found_inf_per_device"], "GradScaler has not looked at the gradients"
        self.scaler_steps += 1
        return optimizer.step()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
                       for tree in ((args, kwargs), result))
        name = function._schema.name.split("::")[1]
        sources, targets = ({tensor.device.type for tensor in tensors} for tensors in (given, made))
        converts = name == "to" and made[0].dtype != given[0].dtype         # how inference mode shows it
        if "cuda" in sources | targets and (converts or not function.is_view) and name not in NO_KERNEL:
            self.kernels[name] += kernels_of(name, args)
        if "cuda" in sources and "cpu" in targets and not is_asynchronous(function, args, kwargs):
            self.to_host.append(name)
        if "cuda" in targets and name in PRODUCTS:
            self.products[made[0].dtype] += 1
            if name == "bmm" and len({tensor.untyped_storage()._cdata for tensor in given}) == 1:
                self.grams.add(made[0].dtype)
        return result


class Event:
    """A place in the queue of the device."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        self.watch.waits += 1


def is_asynchronous(function: Callable, args: tuple, kwargs: dict | None) -> bool:
    """Whether a copy was called with non_blocking=True."""
    names = [argument.name for argument in function._schema.arguments]
    return bool((dict(zip(names, args)) | (kwargs or {})).get("non_blocking"))


def kernels_of(name: str, args: tuple) -> int:
    """Kernels that an operation starts. Only lists of tensors of equal shapes share a kernel."""
    lists = [value for value in args if isinstance(value, (list, tuple)) and value and hasattr(value[0], "shape")]
    shared = all([tensor.shape for tensor in tensors] == [tensor.shape for tensor in lists[0]] for tensors in lists)
    return len(lists[0]) if name.startswith("_foreach") and not shared else 1
