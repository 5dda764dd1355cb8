"""Faster linear layers for models that are not trained, on CPUs: the same in float32, or rounded to 8 bits.

PackedLinear: the same products by oneDNN, with weights laid out in its order beforehand and GELU computed on the way:
10 to 25 % less time than PyTorch's linear layers, results equal up to float32 rounding.

Int8Linear: inputs are rounded to 8 bits as they come, each row (token) between its own smallest and largest value, so
that a pair's score does not depend on the pairs beside it. Weights are rounded once, with a scale for each output: to 8
bits, or to 7 where the processor adds pairs of products in 16 bits, which 8 would overflow. Products are summed in 32
bits. Embeddings, attention, layer norms, pooler and classifier stay in float32.

Rounding moves an output by at most ½ Σ|w| (high - low) / 255 + ½ Σ|x| max|w| / levels, over the inputs x of its row and
its weights w; levels: 127 or 63. With 7-bit weights, scores of a MiniLM (6/384) with a random head moved by 0.06 to
0.11 of their standard deviation; with one scale for all inputs of a batch by 0.14 to 0.20, and with 7-bit inputs and
8-bit weights by 0.26 to 0.42. The scales for rows cost a sixth of the speed.
"""
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplified_tinybert.common.files import UserError
from simplified_tinybert.model.bert import CrossEncoder

WEIGHT_LEVELS = {8: 127, 7: 63}         # largest of the whole numbers that weights are rounded to; 2 · 255 · 63 < 2¹⁵


class PackedLinear(nn.Module):
    """A float32 linear layer of oneDNN's kernels, with GELU after it on request."""

    def __init__(self, layer: nn.Linear, gelu: bool = False):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self.bias, self.after = layer.bias.detach(), "gelu" if gelu else "none"

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, self.after, [], "none")


class Int8Linear(nn.Module):
    """A linear layer of PyTorch's quantized kernels: (..., inputs) → (..., outputs) in float32."""

    def __init__(self, layer: nn.Linear, bits: int):
        super().__init__()
        weight = layer.weight.detach()                                                   # (outputs, inputs)
        scales = (weight.abs().amax(dim=1) / WEIGHT_LEVELS[bits]).clamp_min(1e-12).double()
        with warnings.catch_warnings():
            # PyTorch plans to move quantized tensors to another package; the pinned version still has them.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation", category=UserWarning)
            rounded = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.int64), 0,
                                                 torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)
        self.bits, self.sums, self.bias = bits, rounded.dequantize().sum(dim=1), layer.bias.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        """W x + b = (W s + low / spread · W 1) · spread + b, where s = (x - low) / spread is 0 to 1 in each row."""
        low, high = inputs.amin(dim=-1, keepdim=True), inputs.amax(dim=-1, keepdim=True)
        spread = high - low
        spread = spread.masked_fill(spread == 0, 1.0)
        shares, finite = (inputs - low).div_(spread), spread.isfinite()
        if not finite.all():                            # rounding would turn such rows into plausible numbers
            shares, spread = shares.where(finite, 0.0), spread.where(finite, torch.nan)
        products = torch.ops.quantized.linear_dynamic(shares, self.packed, False)
        return products.addcmul_(low / spread, self.sums).mul_(spread).add_(self.bias)


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
    if torch.backends.quantized.engine == "none":
        raise UserError("--int8: this PyTorch has no 8-bit kernels for this processor; leave the flag out")
    bits = 7 if saturates() else 8
    _replace(model, lambda layer: Int8Linear(layer, bits))


def saturates() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, as those without VNNI do: sums then overflow."""
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
        inputs = torch.ones(1, 64)
        inputs[0, 0] = 0.0                              # so that the others are rounded to the largest number
        return not torch.allclose(Int8Linear(layer, 8)(inputs), torch.tensor(63.0), rtol=0.05)


def _replace(model: CrossEncoder, make: Callable[[nn.Linear], nn.Module]) -> None:
    for parent in list(model.bert.encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(child))
