"""compression.py: exact where nothing is cut, least squares where something is, nearer with more width and depth."""
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


def model(spread=0.2, seed=0, **changes):
    """Weights large enough that attention is not even, norms and biases away from ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    built = new_cross_encoder(BertConfig(**SIZES | {"initializer_range": spread} | changes), generator)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return built


def distance(student, teacher, batch):
    with torch.no_grad():
        terms = loss_terms(student, teacher, batch, {"attention": 1.0, "hidden": 1.0}, padding="masked")
    return {name: terms[name].item() for name in ("att_loss", "rep_loss")}


def compressed(teacher, seen, **changes):
    student = new_cross_encoder(BertConfig(**SIZES | changes), torch.Generator().manual_seed(1))
    fit_projections(student, SIZES["hidden_size"], torch.Generator().manual_seed(1))
    compression.compress(student, teacher, seen)
    return student


def test_where_nothing_is_cut_the_student_is_the_teacher():
    teacher, seen = model(), batches()
    new = batches(5)[-1]                                    # which it was not fitted to
    student, nothing = compressed(teacher, seen), new_cross_encoder(teacher.config, torch.Generator())
    fit_projections(nothing, SIZES["hidden_size"], torch.Generator())
    nothing = distance(nothing, teacher, new)
    assert distance(student, teacher, new)["att_loss"] < 1e-9 * nothing["att_loss"]
    assert distance(student, teacher, new)["rep_loss"] < 1e-9
    assert student.training is False and all(torch.isfinite(parameter).all() for parameter in student.parameters())


def test_the_more_is_kept_the_nearer():
    teacher, seen = model(), batches()
    new = batches(5)[-1]
    for several in (({}, {"hidden_size": 40, "intermediate_size": 80}, {"hidden_size": 24, "intermediate_size": 48}),
                    ({}, {"num_hidden_layers": 2}), ({}, {"intermediate_size": 80}, {"intermediate_size": 40})):
        found = [sum(distance(compressed(teacher, seen, **changes), teacher, new).values()) for changes in several]
        assert found == sorted(found), several


def test_words_that_were_not_seen_are_in_the_same_basis():
    """Every row of the tables is mapped alike, and the projection leads back."""
    teacher, seen = model(), batches()
    student = compressed(teacher, seen, hidden_size=24, intermediate_size=48)
    basis = student.projections[0].weight.double()                                                       # (48, 24)
    assert torch.allclose(basis.T @ basis, torch.eye(24, dtype=torch.float64), atol=1e-5)
    scale = teacher.bert.embeddings.LayerNorm.weight.double()
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        mine, theirs = (getattr(each.bert.embeddings, name).weight.double() for each in (student, teacher))
        assert torch.allclose(mine, (theirs * scale) @ basis, atol=1e-5), name


def test_principal_directions_keep_the_most():
    states = [torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 13.0))]
    basis = compression.principal_directions(states, 4)
    covariance = torch.cov(states[0].double().T)
    kept = (basis.T @ covariance @ basis).trace()
    assert kept.item() == pytest.approx(torch.linalg.eigvalsh(covariance)[-4:].sum().item(), rel=1e-9)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2 ** 32 - 1))
def test_least_squares_and_low_rank_are_the_best_there_is(rows, columns, seed):
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
        lost = torch.linalg.svdvals(matrix)[rank:].square().sum()
        assert (matrix - left @ right.T).square().sum().item() == pytest.approx(lost.item(), abs=1e-9)


def test_layer_norms_are_fitted():
    inputs = torch.randn(300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm, fitted = nn.LayerNorm(8), nn.LayerNorm(8)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 9.0))
        norm.bias.copy_(torch.arange(8.0))
        goal = norm(inputs.float()).double()
        result = compression.fit_norm(fitted, inputs, goal)
    assert torch.allclose(fitted.weight, norm.weight, rtol=1e-4) and torch.allclose(fitted.bias, norm.bias, atol=1e-4)
    assert torch.allclose(result, goal, atol=1e-4)
