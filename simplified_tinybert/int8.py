"""8-bit matrix products for scoring on CPUs.

Weights are rounded once, with a scale for each output; the inputs of a layer are rounded as they come, with one scale
for the whole batch, so that a pair's score depends a little on the pairs beside it. Products are summed in 32 bits.
Embeddings, attention, layer norms, pooler and classifier stay in float32.
"""
import warnings

import torch
from torch import Tensor, nn

from simplified_tinybert.modeling import CrossEncoder


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
        self.reduce_range = reduce_range

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(inputs, self.packed, self.reduce_range)


def quantize_linear_layers(model: CrossEncoder) -> None:
    """Replace all linear layers of the encoder by 8-bit ones, in place."""
    reduce_range = saturates()
    for layer in model.bert.encoder.layer:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child, reduce_range))


def saturates() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, as those without VNNI do: sums then overflow."""
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
        return not torch.allclose(Int8Linear(layer, False)(torch.ones(1, 64)), torch.tensor(64.0), rtol=0.05)
