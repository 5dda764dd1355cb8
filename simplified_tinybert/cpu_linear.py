"""Faster linear layers for models that are not trained, on CPUs: the same in float32, or rounded to 8 bits.

PackedLinear: the same products by oneDNN, with weights laid out in its order beforehand and GELU computed on the way:
10 to 25 % less time than PyTorch's linear layers, results equal up to float32 rounding.

Int8Linear: weights are rounded once, with a scale for each output; the inputs of a layer are rounded as they come, with
one scale for the whole batch, so that a pair's score depends a little on the pairs beside it. Products are summed in 32
bits. Embeddings, attention, layer norms, pooler and classifier stay in float32.
"""
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplified_tinybert.files import UserError
from simplified_tinybert.modeling import CrossEncoder


class PackedLinear(nn.Module):
    """A float32 linear layer of oneDNN's kernels, with GELU after it on request."""

    def __init__(self, layer: nn.Linear, gelu: bool = False):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self.bias, self.after = layer.bias.detach(), "gelu" if gelu else "none"

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, self.after, [], "none")


class Int8Linear(nn.Module):
    """A linear layer of PyTorch's quantized kernels. With `reduce_range` inputs have 7 bits: see `saturates`."""

    def __init__(self, layer: nn.Linear, reduce_range: bool):
        super().__init__()
        weight = layer.weight.detach()                                                   # (outputs, inputs)
        scales = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12).double()
        with warnings.catch_warnings():
            # PyTorch plans to move quantized tensors to another package; the pinned version still has them.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation", category=UserWarning)
            rounded = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.int64), 0,
                                                 torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, layer.bias.detach())
        self.outputs, self.reduce_range = len(weight), reduce_range

    def forward(self, inputs: Tensor) -> Tensor:
        if not torch.isfinite(inputs.sum()):            # which rounding would turn into plausible numbers
            return inputs.new_full((*inputs.shape[:-1], self.outputs), torch.nan)
        return torch.ops.quantized.linear_dynamic(inputs, self.packed, self.reduce_range)


def pack_linear_layers(model: CrossEncoder) -> None:
    """Replace the encoder's linear layers by packed ones, in place.

    Models that are not float32 on a CPU stay as they are, and all where PyTorch was built without oneDNN.
    """
    weight = model.classifier.weight
    offered = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not offered or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return
    for layer in model.bert.encoder.layer:
        if layer.activation is F.gelu:
            layer.intermediate["dense"] = PackedLinear(layer.intermediate["dense"], gelu=True)
            layer.activation = nn.Identity()
    _replace(model, PackedLinear)


def quantize_linear_layers(model: CrossEncoder) -> None:
    """Replace the linear layers of the encoder by 8-bit ones, in place. Raises UserError if weights are not numbers."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"--int8: the model's {name} holds values that are not numbers; the weights are broken")
    reduce_range = saturates()
    _replace(model, lambda layer: Int8Linear(layer, reduce_range))


def saturates() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, as those without VNNI do: sums then overflow."""
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
        return not torch.allclose(Int8Linear(layer, False)(torch.ones(1, 64)), torch.tensor(64.0), rtol=0.05)


def _replace(model: CrossEncoder, make: Callable[[nn.Linear], nn.Module]) -> None:
    for parent in list(model.bert.encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(child))
