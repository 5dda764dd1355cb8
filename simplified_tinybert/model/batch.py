"""Batches of examples as tensors, made on the device from flat arrays of tokens.

Shapes: B examples, L positions. A packed batch is one row of T tokens.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the examples of a packed batch are."""
    starts: Tensor                                      # (B + 1) int32; the last one is the end
    positions: Tensor                                   # (1, T): position of each token in its example
    longest: int                                        # tokens of the longest example


@dataclass
class Batch:
    """Examples as tensors: padded, or packed one after the other into one row."""
    input_ids: Tensor                                   # (B, L)
    token_type_ids: Tensor                              # (B, L)
    attention_mask: Tensor | None                       # (B, L): 1 for tokens, 0 for padding; None if packed
    labels: Tensor | None = None                        # (B)
    has_padding: bool = True                            # known without waiting for the device
    teacher_scores: Tensor | None = None                # (B), log-odds from a file
    queries: Tensor | None = None                       # (B), equal numbers for passages of the same query
    packing: Packing | None = None

    @classmethod
    def of_tokens(cls, arrays: tuple[np.ndarray, ...], length: int, device: torch.device) -> "Batch":
        """Pad examples with zeros to `length` on `device`, from as few bytes as possible.

        arrays: the tokens of all examples, one after the other; the examples' lengths, lengths of the first segment
        ([CLS] query [SEP]) and labels, (B) each.
        """
        assert arrays[1].max() <= length, f"{arrays[1].max()} tokens do not fit into {length} positions"
        tokens, lengths, first_lengths, labels = (to_device(torch.from_numpy(array), device) for array in arrays)
        positions = torch.arange(length, device=device)
        mask = positions < lengths[:, None]                                                   # (B, L)
        index = (lengths.cumsum(0) - lengths)[:, None] + positions
        input_ids = tokens[index.clamp_(max=len(tokens) - 1)].long() * mask
        segments = mask & (positions >= first_lengths[:, None])
        return cls(input_ids, segments.long(), mask.long(), labels, has_padding=bool(arrays[1].min() < length))

    @classmethod
    def packed(cls, arrays: tuple[np.ndarray, ...], device: torch.device) -> "Batch":
        """Put all tokens into one row, without padding, for scores on a GPU. arrays: as for `of_tokens`."""
        tokens, lengths, first_lengths, labels = (to_device(torch.from_numpy(array), device) for array in arrays)
        starts = F.pad(lengths.cumsum(0), (1, 0))                                             # (B + 1)
        example = torch.repeat_interleave(lengths, output_size=len(arrays[0]))                # (T): 0 0 0 1 1 2 ...
        positions = torch.arange(len(arrays[0]), device=device) - starts[example]
        segments = (positions >= first_lengths[example]).long()
        packing = Packing(starts.int(), positions[None], int(arrays[1].max()))
        return cls(tokens.long()[None], segments[None], None, labels, has_padding=False, packing=packing)

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: to_device(value, device) if isinstance(value, Tensor) else value
                        for name, value in vars(self).items()})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to `device`. Copies to a GPU are asynchronous, from page-locked memory."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
