"""compression.py: exact at full size, least squares below it, and closer to the teacher for larger students."""
import numpy as np
import pytest
import torch
from conftest import loss_terms, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig

from simplified_tinybert.data.features import Examples
from simplified_tinybert.model import compression
from simplified_tinybert.model.pretrained import fit_projections, new_cross_encoder

SIZES = {"vocab_size": 200, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "intermediate_size": 96, "max_position_embeddings": 64}


def batches(count=4):
    rows = random_rows(16 * count, seed=3)
    lengths = np.array([len(row[1]) for row in rows], np.uint16)
    examples = Examples(np.concatenate([row[1] for row in rows]).astype(np.uint16), lengths,
                        np.array([row[2] for row in rows], np.uint16), np.zeros(len(rows), np.int8),
                        [row[0] for row in rows])
    return [examples.batch(np.arange(start, start + 16)) for start in range(0, len(rows), 16)]


def random_teacher():
    """A model with uneven attention, and with layer norms and biases that differ from one and zero."""
    generator = torch.Generator().manual_seed(0)
    model = new_cross_encoder(BertConfig(**SIZES, initializer_range=0.2), generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def distance(student, teacher, batch):
    with torch.no_grad():
        terms = loss_terms(student, teacher, batch, {"attention": 1.0, "hidden": 1.0}, padding="masked")
    return {name: terms[name].item() for name in ("att_loss", "rep_loss")}


def compressed(teacher, seen, **changes):
    student = new_cross_encoder(BertConfig(**SIZES | changes), torch.Generator().manual_seed(1))
    fit_projections(student, SIZES["hidden_size"], torch.Generator().manual_seed(1))
    compression.compress(student, teacher, seen)
    return student


def test_a_student_of_full_size_equals_the_teacher():
    teacher, seen = random_teacher(), batches()
    new = batches(5)[-1]                                    # not used for fitting
    student, untrained = compressed(teacher, seen), new_cross_encoder(teacher.config, torch.Generator())
    fit_projections(untrained, SIZES["hidden_size"], torch.Generator())
    assert distance(student, teacher, new)["att_loss"] < 1e-9 * distance(untrained, teacher, new)["att_loss"]
    assert distance(student, teacher, new)["rep_loss"] < 1e-9
    assert student.training is False and all(torch.isfinite(parameter).all() for parameter in student.parameters())


def test_larger_students_are_closer_to_the_teacher():
    teacher, seen = random_teacher(), batches()
    new = batches(5)[-1]
    for sizes in (({}, {"hidden_size": 40, "intermediate_size": 80}, {"hidden_size": 24, "intermediate_size": 48}),
                    ({}, {"num_hidden_layers": 2}), ({}, {"intermediate_size": 80}, {"intermediate_size": 40})):
        found = [sum(distance(compressed(teacher, seen, **changes), teacher, new).values()) for changes in sizes]
        assert found == sorted(found), sizes


def test_all_embeddings_are_projected():
    """This includes tokens that did not occur. The student's projection is the inverse."""
    teacher, seen = random_teacher(), batches()
    student = compressed(teacher, seen, hidden_size=24, intermediate_size=48)
    basis = student.projections[0].weight.double()                                                       # (48, 24)
    assert torch.allclose(basis.T @ basis, torch.eye(24, dtype=torch.float64), atol=1e-5)
    scale = teacher.bert.embeddings.LayerNorm.weight.double()
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        embeddings, expected = (getattr(each.bert.embeddings, name).weight.double() for each in (student, teacher))
        assert torch.allclose(embeddings, (expected * scale) @ basis, atol=1e-5), name


def test_principal_directions_maximize_the_variance():
    states = [torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 13.0))]
    basis = compression.principal_directions(states, 4)
    covariance = torch.cov(states[0].double().T)
    kept = (basis.T @ covariance @ basis).trace()
    assert kept.item() == pytest.approx(torch.linalg.eigvalsh(covariance)[-4:].sum().item(), rel=1e-9)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2 ** 32 - 1))
def test_least_squares_and_low_rank_are_optimal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, goal = (torch.randn(40, size, generator=generator, dtype=torch.float64) for size in (rows, columns))
    square = inputs.T @ inputs / 40
    damping = (compression.RIDGE * square.diagonal().mean() * 40).sqrt()
    prior = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([inputs, damping * torch.eye(rows, dtype=torch.float64)]),
                              torch.cat([goal, damping * prior])).solution
    assert torch.allclose(compression.least_squares(inputs, goal, prior), best)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    for rank in range(1, min(rows, columns) + 1):
        left, right = compression.low_rank(matrix, rank)
        assert left.shape == (rows, rank) and right.shape == (columns, rank)
        residual = torch.linalg.svdvals(matrix)[rank:].square().sum()
        assert (matrix - left @ right.T).square().sum().item() == pytest.approx(residual.item(), abs=1e-9)


def test_fit_norm_recovers_a_layer_norm():
    inputs = torch.randn(300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm, fitted = nn.LayerNorm(8), nn.LayerNorm(8)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 9.0))
        norm.bias.copy_(torch.arange(8.0))
        goal = norm(inputs.float()).double()
        result = compression.fit_norm(fitted, inputs, goal)
    assert torch.allclose(fitted.weight, norm.weight, rtol=1e-4) and torch.allclose(fitted.bias, norm.bias, atol=1e-4)
    assert torch.allclose(result, goal, atol=1e-4)
