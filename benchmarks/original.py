"""The baseline: computes as the original implementation does, rewritten from a description of it. Not a command.

Hugging Face modules only hold the weights; every step of the computation is written out here as in the original:
attention by matrix products over padded batches, an additive mask of -10000, GELU with an explicit error function, all
positions of all layers, attention scores and hidden states of every layer, losses on the L×L score matrices, and an
optimizer that loops over the parameters. The original's accidental costs are left out: it converts masks and segments
at every access, leaves the teacher's dropout on, and synchronizes with the device at every step.

Shapes: B examples, L positions, H heads, D hidden size.
"""
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertLayer
from transformers.utils.logging import disable_progress_bar

from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.hub import PROJECTION_FILE

RERANK_BATCH, RERANK_LENGTH = 100, 256


class OriginalBert(nn.Module):
    """Returns logits (B, 2), masked attention scores (B, H, L, L) and hidden states (B, L, D) of all layers."""

    def __init__(self, directory: Path):
        super().__init__()
        disable_progress_bar()
        self.model = BertForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
        self.fit_dense = None
        if (directory / PROJECTION_FILE).is_file():
            weights = load_file(directory / PROJECTION_FILE)
            self.fit_dense = nn.Linear(*reversed(weights["fit_dense.weight"].shape))
            self.fit_dense.load_state_dict({name.removeprefix("fit_dense."): value for name, value in weights.items()})

    def forward(self, batch: Batch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        embeddings = self.model.bert.embeddings
        mask = (1.0 - batch.attention_mask[:, None, None, :].to(embeddings.word_embeddings.weight.dtype)) * -10000.0
        positions = torch.arange(batch.input_ids.shape[1], device=mask.device).expand_as(batch.input_ids)
        hidden = (embeddings.word_embeddings(batch.input_ids) + embeddings.position_embeddings(positions)
                  + embeddings.token_type_embeddings(batch.token_type_ids))
        hidden = embeddings.dropout(embeddings.LayerNorm(hidden))
        all_scores, all_hidden = [], [hidden]
        for layer in self.model.bert.encoder.layer:
            hidden, scores = original_layer(layer, hidden, mask)
            all_scores.append(scores)
            all_hidden.append(hidden)
        pooled = torch.tanh(self.model.bert.pooler.dense(hidden[:, 0]))
        return self.model.classifier(pooled), all_scores, all_hidden


def original_layer(layer: BertLayer, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Apply one layer to all positions. Returns its output and its attention scores before the softmax."""
    attention = layer.attention.self
    heads, head_size = attention.num_attention_heads, attention.attention_head_size

    def split(projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], heads, head_size).permute(0, 2, 1, 3)

    query, key, value = (split(project(hidden)) for project in (attention.query, attention.key, attention.value))
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(head_size) + mask
    context = torch.matmul(attention.dropout(nn.functional.softmax(scores, dim=-1)), value)
    context = context.permute(0, 2, 1, 3).contiguous().view(*hidden.shape[:2], heads * head_size)
    output = layer.attention.output
    attended = output.LayerNorm(output.dropout(output.dense(context)) + hidden)
    inner = layer.intermediate.dense(attended)
    inner = inner * 0.5 * (1.0 + torch.erf(inner / math.sqrt(2.0)))
    return layer.output.LayerNorm(layer.output.dropout(layer.output.dense(inner)) + attended), scores


def original_scores(model: OriginalBert, batches: list[Batch]) -> Tensor:
    """Return probabilities of relevance (N): softmax in float32, class 1."""
    with torch.no_grad():
        return torch.cat([nn.functional.softmax(model(batch)[0], dim=-1)[:, 1] for batch in batches]).cpu()


def original_losses(student: OriginalBert, teacher: OriginalBert, batch: Batch, temperature: float = 1.0) \
        -> dict[str, Tensor]:
    """Return the simplified objective ("loss") and its terms."""
    logits, scores, hidden = student(batch)
    hidden = [student.fit_dense(states) for states in hidden]
    with torch.no_grad():
        teacher_logits, teacher_scores, teacher_hidden = teacher(batch)
    step = len(teacher_scores) // len(scores)
    attention = sum(nn.functional.mse_loss(_zero_padding(own), _zero_padding(teacher_scores[step * layer + step - 1]))
                    for layer, own in enumerate(scores))
    representation = sum(nn.functional.mse_loss(own, teacher_hidden[step * layer]) for layer, own in enumerate(hidden))
    targets = nn.functional.softmax(teacher_logits / temperature, dim=-1)
    soft = (-targets * nn.functional.log_softmax(logits / temperature, dim=-1)).mean()
    hard = nn.functional.cross_entropy(logits, batch.labels)
    return {"loss": attention + representation + soft + hard, "att_loss": attention, "rep_loss": representation,
            "soft_loss": soft, "hard_loss": hard}


def _zero_padding(scores: Tensor) -> Tensor:
    return torch.where(scores <= -1e2, torch.zeros_like(scores), scores)


class OriginalAdam:
    """BertAdam in a loop over the parameters. Each gradient tensor is clipped to norm 1."""

    def __init__(self, model: nn.Module, rate: float, schedule: Callable[[int], float], decay: float = 0.01):
        self.rate, self.schedule, self.decay, self.steps, self.state = rate, schedule, decay, 0, {}
        self.parameters = list(model.named_parameters())

    @torch.no_grad()
    def step(self) -> None:
        rate = self.rate * self.schedule(self.steps)
        self.steps += 1
        for name, parameter in self.parameters:
            if parameter.grad is None:
                continue
            if name not in self.state:
                self.state[name] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            mean, square = self.state[name]
            nn.utils.clip_grad_norm_(parameter, 1.0)
            mean.mul_(0.9).add_(parameter.grad, alpha=0.1)
            square.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
            update = mean / (square.sqrt() + 1e-6)
            if not name.endswith(("bias", "LayerNorm.weight")):
                update += self.decay * parameter
            parameter.add_(-rate * update)

    def zero_grad(self) -> None:
        for _, parameter in self.parameters:
            parameter.grad = None
