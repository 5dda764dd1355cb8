"""Memory of a training step of Simplified TinyBERT: what autograd keeps grows linearly with the sequence length."""
import argparse

import pytest
import torch
from transformers import BertConfig

from distill import objective
from simplified_tinybert.checkpoints import fit_projections
from simplified_tinybert.modeling import Batch, CrossEncoder


def model(layers, width, heads):
    torch.manual_seed(0)
    return CrossEncoder(BertConfig(vocab_size=100, hidden_size=width, num_hidden_layers=layers,
                                   num_attention_heads=heads, intermediate_size=4 * width, max_position_embeddings=512,
                                   hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def kept_for_backward(student, teacher, length):
    """Bytes of distinct tensors that one forward pass keeps, parameters left out."""
    generator = torch.Generator().manual_seed(length)
    mask = (torch.arange(length) < torch.tensor([[length], [length // 2]])).long()
    batch = Batch(torch.randint(100, (2, length), generator=generator), torch.zeros(2, length, dtype=torch.long), mask,
                  torch.tensor([0, 1]))
    parameters = {parameter.data_ptr() for parameter in student.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    args = argparse.Namespace(distill_model="simplified", temperature=1.0, alpha=0.5, padding="reference")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(student, teacher, batch, args)["loss"]
    total = sum(kept.values())
    loss.backward()
    return total


def test_training_memory_is_linear_in_the_length():
    student, teacher = model(2, 64, 8).train(), model(4, 128, 8).eval().requires_grad_(False)
    fit_projections(student, 128, torch.Generator().manual_seed(0))
    kept = [kept_for_backward(student, teacher, length) for length in (128, 256, 512)]
    print(f"kept for the backward pass at 128, 256, 512 positions: {kept} bytes")
    assert kept[1] / kept[0] == pytest.approx(2, rel=0.1)
    assert kept[2] / kept[1] == pytest.approx(2, rel=0.1)
    one_score_matrix = 2 * 8 * 512 * 512 * 4
    assert kept[2] < one_score_matrix * 2 * (2 + 2)      # far less than the four score matrices of the direct form
