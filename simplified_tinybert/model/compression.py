"""A student that starts as its teacher compressed: fewer layers, narrower ones, fitted to what the teacher computes.

The student's hidden states live in the directions in which the teacher's vary most (`basis`; principal components, an
idea of SliceGPT, Ashkboos et al. 2024). Its layers are fitted one after the other, each to the teacher's layer that it
is mapped to, on the hidden states that the student itself has by then: a linear map estimates from them what enters the
teacher's layer; attention scores and values are cut down to the student's head width by singular values; of the
intermediate neurons the strongest are kept, and their output map is fitted by least squares, as are the layer norms.
Everything is in closed form and in float64: nothing is trained.

Shapes: T tokens, D and D' widths of student and teacher, d and d' of their heads.
"""
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simplified_tinybert.model.bert import Batch, CrossEncoder, Layer, attend, uniform_layer_map

RIDGE = 1e-2                # of the inputs' mean square; with less, what dropout changes is blown up by large weights


class Observed(NamedTuple):
    """What the teacher computes at the real tokens of some batches, float32: (T, D'), neurons (T, intermediate)."""
    summed: Tensor                      # embeddings before their layer norm
    states: list[Tensor]                # embedding output, then of each layer the attention's and the layer's output
    neurons: dict[int, Tensor]          # by layer, from 1


def compress(student: CrossEncoder, teacher: CrossEncoder, batches: Iterable[Batch]) -> None:
    """Fill in the student's weights. The two have equally many heads, and layers that can be mapped evenly."""
    with torch.no_grad():
        batches = [batch.to(teacher.classifier.weight.device) for batch in batches]
        depths = uniform_layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
        seen = observe(teacher, batches, depths)
        basis = principal_directions(seen.states, student.config.hidden_size)                            # (D', D)
        stream = compress_embeddings(student, teacher, seen, basis)                                      # (T, D)
        for layer, depth in zip(student.bert.encoder.layer, depths):
            source = teacher.bert.encoder.layer[depth - 1]
            entering, between, leaving = (state.double() for state in seen.states[2 * depth - 2:2 * depth + 1])
            compress_attention(layer, source, stream, entering, basis)
            added = attended(layer, stream, batches)
            middle = fit_norm(layer.attention.output.LayerNorm, added + stream, between @ basis)
            stream = compress_neurons(layer, source, middle, seen.neurons[depth].double(), between, leaving, basis)
        pooler = teacher.bert.pooler.dense
        student.bert.pooler.dense.weight.copy_(basis.T @ pooler.weight.double() @ basis)
        student.bert.pooler.dense.bias.copy_(pooler.bias.double() @ basis)
        for projection in student.projections:          # the way back
            projection.weight.copy_(basis)
            projection.bias.zero_()


def observe(teacher: CrossEncoder, batches: list[Batch], depths: list[int]) -> Observed:
    """Run the teacher and keep what its real tokens get; neurons of the layers `depths` (from 1) alone."""
    embeddings, layers = teacher.bert.embeddings, teacher.bert.encoder.layer
    summed, states, neurons = [], [[] for _ in range(2 * len(layers) + 1)], {depth: [] for depth in depths}
    for batch in batches:
        real, hidden = batch.attention_mask.bool(), teacher.bert.embeddings(batch)
        words = embeddings.word_embeddings(batch.input_ids) + embeddings.token_type_embeddings(batch.token_type_ids)
        summed.append((words + embeddings.position_embeddings.weight[:batch.input_ids.shape[1]])[real])
        states[0].append(hidden[real])
        for number, layer in enumerate(layers):
            middle = layer.attention.output(context(layer, hidden, batch), hidden)
            active = layer.activation(layer.intermediate.dense(middle))
            hidden = layer.output(active, middle)
            states[2 * number + 1].append(middle[real])
            states[2 * number + 2].append(hidden[real])
            if number + 1 in neurons:
                neurons[number + 1].append(active[real])
    return Observed(torch.cat(summed), list(map(torch.cat, states)),
                    {depth: torch.cat(active) for depth, active in neurons.items()})


def context(layer: Layer, hidden: Tensor, batch: Batch) -> Tensor:
    """What the attention of a layer gathers, before its output map: (B, L, D) → (B, L, D)."""
    query, key, value = (layer._split_heads(layer.attention["self"][name](hidden)) for name in (
        "query", "key", "value"))
    mask = batch.attention_mask[:, None, None, :].bool()
    return attend(query, key, value, mask, 0.0).transpose(1, 2).flatten(start_dim=2)


def principal_directions(states: list[Tensor], width: int) -> Tensor:
    """The `width` orthonormal directions (D', D) in which the states vary most, each state counted alike.

    All of them, unturned, where the student is as wide as the teacher.
    """
    if width == states[0].shape[1]:
        return torch.eye(width, dtype=torch.float64, device=states[0].device)
    covariances = [torch.cov(state.double().T) for state in states]
    _, directions = torch.linalg.eigh(sum(each / each.trace() for each in covariances))      # smallest first
    return directions[:, -width:].flip(1)


def compress_embeddings(student: CrossEncoder, teacher: CrossEncoder, seen: Observed, basis: Tensor) -> Tensor:
    """The three tables in the basis, scaled as the teacher's layer norm does; returns the student's output (T, D)."""
    mine, theirs = student.bert.embeddings, teacher.bert.embeddings
    scale = theirs.LayerNorm.weight.double()[:, None]
    scaled = basis if basis.shape[0] == basis.shape[1] else scale * basis                                # (D', D)
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        getattr(mine, name).weight.copy_(getattr(theirs, name).weight.double() @ scaled)
    return fit_norm(mine.LayerNorm, seen.summed.double() @ scaled, seen.states[0].double() @ basis)


def compress_attention(layer: Layer, source: Layer, stream: Tensor, entering: Tensor, basis: Tensor) -> None:
    """Queries, keys, values and their output map, head by head, from the student's stream in place of `entering`.

    Of all matrices of the student's rank the ones whose scores, and whose values, differ least on average.
    """
    theirs, mine = source.attention["self"], layer.attention["self"]
    inputs = with_ones(stream)                                                                           # (T, D + 1)
    estimate = least_squares(inputs, entering, with_zeros(basis.T))                                      # (D + 1, D')
    whiten, colour = roots(inputs.T @ inputs / len(inputs))
    wide, narrow = source.attention["self"].query.out_features // source.heads, mine.query.out_features // layer.heads
    output = source.attention.output.dense.weight.double()
    layer.attention.output.dense.bias.copy_(basis.T @ source.attention.output.dense.bias.double())
    for head in range(layer.heads):
        rows, slots = slice(head * wide, (head + 1) * wide), slice(head * narrow, (head + 1) * narrow)
        query, key, value = (estimate @ theirs[name].weight[rows].double().T + last_row(
            theirs[name].bias[rows].double(), len(estimate)) for name in ("query", "key", "value"))      # (D + 1, d')
        left, right = low_rank(colour @ query @ key.T @ colour, narrow)
        scale = (narrow / wide) ** 0.25                 # scores are divided by the root of the head's width
        set_linear(mine.query, slots, scale * whiten @ left)
        set_linear(mine.key, slots, scale * whiten @ right)
        left, right = low_rank(basis.T @ output[:, rows] @ value.T @ colour, narrow)
        layer.attention.output.dense.weight[:, slots] = left.to(mine.value.weight.dtype)
        set_linear(mine.value, slots, whiten @ right)


def attended(layer: Layer, stream: Tensor, batches: list[Batch]) -> Tensor:
    """What the student's attention adds to its stream: (T, D) → (T, D)."""
    found, start = [], 0
    for batch in batches:
        real = batch.attention_mask.bool()
        hidden = stream.new_zeros(*real.shape, stream.shape[1], dtype=layer.intermediate.dense.weight.dtype)
        hidden[real] = stream[start:start + int(real.sum())].to(hidden.dtype)
        start += int(real.sum())
        found.append(layer.attention.output.dense(context(layer, hidden, batch))[real])
    return torch.cat(found).double()


def compress_neurons(layer: Layer, source: Layer, middle: Tensor, neurons: Tensor, between: Tensor, leaving: Tensor,
                     basis: Tensor) -> Tensor:
    """The neurons that move the output most, and the output map that does best with them; returns the output (T, D)."""
    output = source.output.dense
    goal = (neurons @ output.weight.double().T + output.bias.double() + between) @ basis - middle        # (T, D)
    strength = neurons.std(dim=0) * (basis.T @ output.weight.double()).norm(dim=0)
    kept = strength.topk(layer.intermediate.dense.out_features).indices.sort().values
    estimate = least_squares(with_ones(middle), between, with_zeros(basis.T))                            # (D + 1, D')
    inner = source.intermediate.dense
    entering = estimate @ inner.weight[kept].double().T + last_row(inner.bias[kept].double(), len(estimate))
    set_linear(layer.intermediate.dense, slice(None), entering)
    active = with_ones(layer.activation(with_ones(middle) @ entering))
    prior = torch.cat([output.weight[:, kept].double().T @ basis, output.bias.double()[None] @ basis])
    leading = least_squares(active, goal, prior)                                                         # (kept + 1, D)
    set_linear(layer.output.dense, slice(None), leading)
    return fit_norm(layer.output.LayerNorm, active @ leading + middle, leaving @ basis)


def fit_norm(norm: nn.LayerNorm, inputs: Tensor, goal: Tensor) -> Tensor:
    """Weight and bias with which the norm of `inputs` is nearest to `goal`, (T, D) each; returns what it is."""
    normal = nn.functional.layer_norm(inputs, inputs.shape[1:], eps=norm.eps)
    centred, wanted = normal - normal.mean(dim=0), goal - goal.mean(dim=0)
    weight = (centred * wanted).mean(dim=0) / centred.square().mean(dim=0).clamp_min(1e-12)
    norm.weight.copy_(weight)
    norm.bias.copy_(goal.mean(dim=0) - weight * normal.mean(dim=0))
    return normal * weight + goal.mean(dim=0) - weight * normal.mean(dim=0)


def with_ones(inputs: Tensor) -> Tensor:
    """(T, D) → (T, D + 1): what a bias is multiplied by."""
    return nn.functional.pad(inputs, (0, 1), value=1.0)


def last_row(bias: Tensor, rows: int) -> Tensor:
    """A bias (n) as the last of `rows` rows of zeros."""
    return nn.functional.pad(bias[None], (0, 0, rows - 1, 0))


def with_zeros(matrix: Tensor) -> Tensor:
    """(D, n) → (D + 1, n): without a bias."""
    return nn.functional.pad(matrix, (0, 0, 0, 1))


def least_squares(inputs: Tensor, goal: Tensor, prior: Tensor) -> Tensor:
    """The matrix (m, n) that maps inputs (T, m) nearest to goal (T, n), drawn towards `prior`, the teacher's own."""
    square = inputs.T @ inputs / len(inputs)
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    return prior + torch.linalg.solve(square, inputs.T @ (goal - inputs @ prior) / len(inputs))


def roots(square: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse and direct square root of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(square)
    values = values.clamp_min(1e-10 * values.max())
    return vectors * values.rsqrt() @ vectors.T, vectors * values.sqrt() @ vectors.T


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors (m, rank) and (n, rank) whose product is nearest to a matrix (m, n)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank].sqrt(), right[:rank].T * values[:rank].sqrt()


def set_linear(linear: nn.Linear, rows: slice, matrix: Tensor) -> None:
    """Rows of a linear map from a matrix (inputs + 1, rows), the bias in its last row."""
    linear.weight[rows] = matrix[:-1].T.to(linear.weight.dtype)
    linear.bias[rows] = matrix[-1].to(linear.bias.dtype)
