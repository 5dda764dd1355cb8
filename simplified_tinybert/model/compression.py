"""Initialise a student as a compressed version of its teacher, with fewer and narrower layers.

The student's hidden states are coordinates along the principal directions of the teacher's hidden states (`basis`; an
idea of SliceGPT, Ashkboos et al. 2024). Each student layer is fitted in turn to its teacher layer:

- a linear map estimates the input of the teacher layer from the student's hidden states;
- truncated SVDs reduce attention scores and values to the student's head size;
- the strongest intermediate neurons are kept, and least squares fits their output layer;
- least squares fits the layer norms.

All steps are in closed form and in float64; nothing is trained.

Shapes: T tokens; D, D' hidden sizes of student and teacher; d, d' their head sizes.
"""
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.bert import CrossEncoder, Layer, uniform_layer_map

RIDGE = 1e-2            # relative to the inputs' mean square; with less, large weights amplify the noise of dropout


class TeacherStates(NamedTuple):
    """Activations of the teacher for all tokens, without padding, in float32."""
    embedding_sum: Tensor               # (T, D'), before layer norm
    states: list[Tensor]                # embedding output, then attention output and output of each layer; (T, D') each
    neurons: dict[int, Tensor]          # by layer, from 1; (T, intermediate size) each


@torch.no_grad()
def compress(student: CrossEncoder, teacher: CrossEncoder, batches: Iterable[Batch]) -> None:
    """Set the student's weights. It needs the teacher's number of heads, and a k-th of the teacher's layers."""
    batches = [batch.to(teacher.classifier.weight.device) for batch in batches]
    layer_map = uniform_layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    teacher_states = observe(teacher, batches, layer_map)
    basis = principal_directions(teacher_states.states, student.config.hidden_size)                      # (D', D)
    hidden = compress_embeddings(student, teacher, teacher_states, basis)                                # (T, D)
    for layer, number in zip(student.bert.encoder.layer, layer_map):
        source = teacher.bert.encoder.layer[number - 1]
        layer_input, attention, output = (
            state.double() for state in teacher_states.states[2 * number - 2:2 * number + 1])
        compress_attention(layer, source, hidden, layer_input, basis)
        hidden = fit_norm(layer.attention.output.LayerNorm, attention_output(layer, hidden, batches) + hidden,
                          attention @ basis)
        hidden = compress_neurons(layer, source, hidden, teacher_states.neurons[number].double(), attention, basis)
        hidden = fit_norm(layer.output.LayerNorm, hidden, output @ basis)
    pooler = teacher.bert.pooler.dense
    student.bert.pooler.dense.weight.copy_(basis.T @ pooler.weight.double() @ basis)
    student.bert.pooler.dense.bias.copy_(pooler.bias.double() @ basis)
    for projection in student.projections:
        projection.weight.copy_(basis)
        projection.bias.zero_()


def observe(teacher: CrossEncoder, batches: list[Batch], layer_map: list[int]) -> TeacherStates:
    """Run the teacher and collect its activations. Neurons are collected only in the layers of `layer_map` (from 1)."""
    layers = teacher.bert.encoder.layer
    sums, states, neurons = [], [[] for _ in range(2 * len(layers) + 1)], {number: [] for number in layer_map}
    for batch in batches:
        is_token, hidden = batch.attention_mask.bool(), teacher.bert.embeddings(batch)
        sums.append(teacher.bert.embeddings.summed(batch)[is_token])
        states[0].append(hidden[is_token])
        for number, layer in enumerate(layers, start=1):
            attention = layer.attention.output(attention_context(layer, hidden, batch), hidden)
            active = layer.activation(layer.intermediate.dense(attention))
            hidden = layer.output(active, attention)
            states[2 * number - 1].append(attention[is_token])
            states[2 * number].append(hidden[is_token])
            if number in neurons:
                neurons[number].append(active[is_token])
    return TeacherStates(torch.cat(sums), list(map(torch.cat, states)),
                         {number: torch.cat(active) for number, active in neurons.items()})


def attention_context(layer: Layer, hidden: Tensor, batch: Batch) -> Tensor:
    return layer.attention_context(hidden, batch.attention_mask[:, None, None, :].bool(), hidden)[0]


def principal_directions(states: list[Tensor], size: int) -> Tensor:
    """Return orthonormal directions (D', size) in which the states vary most, each state weighted equally."""
    if size == states[0].shape[1]:                      # with the coordinate axes, the student equals the teacher
        return torch.eye(size, dtype=torch.float64, device=states[0].device)
    covariances = [torch.cov(state.double().T) for state in states]
    _, directions = torch.linalg.eigh(sum(each / each.trace() for each in covariances))      # ascending
    return directions[:, -size:].flip(1)


def compress_embeddings(student: CrossEncoder, teacher: CrossEncoder, states: TeacherStates, basis: Tensor) -> Tensor:
    """Project the embeddings, scaled by the teacher's layer norm. Returns the student's embedding output (T, D)."""
    embeddings, source = student.bert.embeddings, teacher.bert.embeddings
    scale = source.LayerNorm.weight.double()[:, None]
    scaled = basis if basis.shape[0] == basis.shape[1] else scale * basis                                # (D', D)
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        getattr(embeddings, name).weight.copy_(getattr(source, name).weight.double() @ scaled)
    return fit_norm(embeddings.LayerNorm, states.embedding_sum.double() @ scaled, states.states[0].double() @ basis)


def compress_attention(layer: Layer, source: Layer, hidden: Tensor, target: Tensor, basis: Tensor) -> None:
    """Fit the attention of a layer to `source`, head by head, with inputs `hidden` (T, D) in place of `target` (T, D').

    Of all projections of the student's head size, these give the least mean squared error of scores and of values.
    """
    projections, source_projections = layer.attention["self"], source.attention["self"]
    inputs = with_ones(hidden)                                                                           # (T, D + 1)
    estimate = least_squares(inputs, target, with_zeros(basis.T))                                        # (D + 1, D')
    whiten, colour = roots(inputs.T @ inputs / len(inputs))
    size = projections.query.out_features // layer.heads
    source_size = source_projections.query.out_features // source.heads
    output = source.attention.output.dense.weight.double()
    layer.attention.output.dense.bias.copy_(basis.T @ source.attention.output.dense.bias.double())
    for head in range(layer.heads):
        rows, source_rows = (slice(head * width, (head + 1) * width) for width in (size, source_size))
        query, key, value = (compose(estimate, source_projections[name], source_rows)
                             for name in ("query", "key", "value"))                                      # (D + 1, d')
        left, right = low_rank(colour @ query @ key.T @ colour, size)
        scale = (size / source_size) ** 0.25            # attention divides scores by the root of the head size
        set_linear(projections.query, rows, scale * whiten @ left)
        set_linear(projections.key, rows, scale * whiten @ right)
        left, right = low_rank(basis.T @ output[:, source_rows] @ value.T @ colour, size)
        layer.attention.output.dense.weight[:, rows] = left.to(projections.value.weight.dtype)
        set_linear(projections.value, rows, whiten @ right)


def attention_output(layer: Layer, hidden: Tensor, batches: list[Batch]) -> Tensor:
    """Return the output of the student's attention before the residual connection: (T, D) → (T, D)."""
    outputs, start = [], 0
    for batch in batches:
        is_token = batch.attention_mask.bool()
        padded = hidden.new_zeros(*is_token.shape, hidden.shape[1], dtype=layer.intermediate.dense.weight.dtype)
        count = int(is_token.sum())
        padded[is_token] = hidden[start:start + count].to(padded.dtype)
        start += count
        outputs.append(layer.attention.output.dense(attention_context(layer, padded, batch))[is_token])
    return torch.cat(outputs).double()


def compress_neurons(layer: Layer, source: Layer, hidden: Tensor, neurons: Tensor, target: Tensor,
                     basis: Tensor) -> Tensor:
    """Keep the neurons that change the output most, and fit their output layer. Returns (T, D), before layer norm.

    hidden (T, D) and target (T, D'): inputs of the feed-forward layer in student and teacher.
    """
    inner, outer = source.intermediate.dense, source.output.dense
    strength = neurons.std(dim=0) * (basis.T @ outer.weight.double()).norm(dim=0)
    kept = strength.topk(layer.intermediate.dense.out_features).indices.sort().values
    estimate = least_squares(with_ones(hidden), target, with_zeros(basis.T))                             # (D + 1, D')
    inner_matrix = compose(estimate, inner, kept)
    set_linear(layer.intermediate.dense, slice(None), inner_matrix)
    active = with_ones(layer.activation(with_ones(hidden) @ inner_matrix))
    prior = torch.cat([outer.weight[:, kept].double().T @ basis, outer.bias.double()[None] @ basis])
    output = neurons @ outer.weight.double().T + outer.bias.double() + target
    outer_matrix = least_squares(active, output @ basis - hidden, prior)                                 # (kept + 1, D)
    set_linear(layer.output.dense, slice(None), outer_matrix)
    return active @ outer_matrix + hidden


def fit_norm(norm: nn.LayerNorm, inputs: Tensor, target: Tensor) -> Tensor:
    """Fit weight and bias of a layer norm so that it maps `inputs` to `target`, (T, D) each; returns its output."""
    normal = nn.functional.layer_norm(inputs, inputs.shape[1:], eps=norm.eps)
    centred, target_mean = normal - normal.mean(dim=0), target.mean(dim=0)
    weight = (centred * (target - target_mean)).mean(dim=0) / centred.square().mean(dim=0).clamp_min(1e-12)
    norm.weight.copy_(weight)
    norm.bias.copy_(target_mean - weight * normal.mean(dim=0))
    return normal * weight + target_mean - weight * normal.mean(dim=0)


def with_ones(inputs: Tensor) -> Tensor:
    """Append a column of ones, the input of a bias: (T, D) → (T, D + 1)."""
    return nn.functional.pad(inputs, (0, 1), value=1.0)


def with_zeros(matrix: Tensor) -> Tensor:
    """Append a row of zeros, a bias of zero: (D, n) → (D + 1, n)."""
    return nn.functional.pad(matrix, (0, 0, 0, 1))


def compose(estimate: Tensor, linear: nn.Linear, rows: slice | Tensor) -> Tensor:
    """Compose a map (D + 1, D') with rows of a linear layer of the teacher: (D + 1, rows), bias in the last row."""
    matrix = estimate @ linear.weight[rows].double().T
    matrix[-1] += linear.bias[rows].double()
    return matrix


def least_squares(inputs: Tensor, target: Tensor, prior: Tensor) -> Tensor:
    """Solve ridge regression from inputs (T, m) to target (T, n), shrunk towards `prior` (m, n)."""
    gram = inputs.T @ inputs / len(inputs)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return prior + torch.linalg.solve(gram, inputs.T @ (target - inputs @ prior) / len(inputs))


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse and the direct square root of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(1e-10 * values.max())
    return vectors * values.rsqrt() @ vectors.T, vectors * values.sqrt() @ vectors.T


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (m, rank) and (n, rank) of the best approximation of a matrix (m, n) of this rank."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank].sqrt(), right[:rank].T * values[:rank].sqrt()


def set_linear(linear: nn.Linear, rows: slice, matrix: Tensor) -> None:
    """Set rows of a linear layer from a matrix (inputs + 1, rows), whose last row is the bias."""
    linear.weight[rows] = matrix[:-1].T.to(linear.weight.dtype)
    linear.bias[rows] = matrix[-1].to(linear.bias.dtype)
