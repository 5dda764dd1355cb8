"""The one model of all scripts: a BERT cross-encoder with a linear classifier on its pooled output.

Parameter names are those of Hugging Face's BertForSequenceClassification. The model itself stands here, because
distillation needs the query and key projections of mapped layers, ranking needs only the [CLS] position of the last
one, and importing the library's model takes longer than scoring a hundred pairs.

Shapes: B examples, L positions, D hidden width, H heads, d = D / H head width, C classes.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh,
               "gelu_new": lambda hidden: F.gelu(hidden, approximate="tanh"),
               "gelu_pytorch_tanh": lambda hidden: F.gelu(hidden, approximate="tanh")}
QUERY_BLOCK = 64        # positions


@dataclass
class Batch:
    """Padded examples as tensors; attention_mask holds 1 for tokens and 0 for padding; labels (B) if there are any."""
    input_ids: Tensor                                   # (B, L)
    token_type_ids: Tensor                              # (B, L)
    attention_mask: Tensor                              # (B, L)
    labels: Tensor | None = None                        # (B)
    has_padding: bool = True                            # known without asking the device

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; to a GPU from page-locked memory, so that nobody waits for the copy."""
        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or device.type != "cuda":
                return tensor
            return tensor.pin_memory().to(device, non_blocking=True)

        return Batch(move(self.input_ids), move(self.token_type_ids), move(self.attention_mask), move(self.labels),
                     self.has_padding)


@dataclass
class LayerOutputs:
    """What layer-wise distillation looks at: logits (B, C), hidden states and projections by layer.

    hidden_states: {0: embedding output, 1: output of layer 1, ...}, each (B, L, D).
    queries, keys: {1: projections of layer 1, ...}, each (B, H, L, d).
    """
    logits: Tensor
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """hidden_act of a configuration. Raises KeyError for what the library does not know either."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    from transformers.activations import ACT2FN  # takes a second, and hardly any BERT needs it
    return ACT2FN[name]


class Embeddings(nn.Module):
    """Word, segment and position embeddings, summed and normalised: (B, L) → (B, L, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, batch: Batch) -> Tensor:
        words = self.word_embeddings(batch.input_ids) + self.token_type_embeddings(batch.token_type_ids)
        return self.dropout(self.LayerNorm(words + self.position_embeddings.weight[:batch.input_ids.shape[1]]))


class AddNorm(nn.Module):
    """The end of both halves of a layer: linear map, dropout, sum with the residual, layer norm."""

    def __init__(self, inputs: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width = config.hidden_size
        self.heads, self.activation = config.num_attention_heads, activation_named(config.hidden_act)
        self.attention_dropout = Dropout(config.attention_probs_dropout_prob)      # its probability; see `attend`
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
            "output": AddNorm(width, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.intermediate_size)})
        self.output = AddNorm(config.intermediate_size, config)

    def forward(self, hidden: Tensor, mask: Tensor | None, cls_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) → output (B, L, D), queries and keys (B, H, L, d).

        With cls_only everything but keys and values is computed for the first position alone: output (B, 1, D),
        queries (B, H, 1, d). mask (B, 1, 1, L) is True at tokens, or None if nothing is padded.
        """
        projection = self.attention["self"]
        residual = hidden[:, :1] if cls_only else hidden
        query = self._split_heads(projection.query(residual))
        key = self._split_heads(projection.key(hidden))
        value = self._split_heads(projection.value(hidden))
        context = attend(query, key, value, mask, self.attention_dropout.p if self.training else 0.0)
        attended = self.attention.output(context.transpose(1, 2).flatten(start_dim=2), residual)     # (B, L, D)
        return self.output(self.activation(self.intermediate.dense(attended)), attended), query, key

    def _split_heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)                      # (B, L, D) → (B, H, L, d)


class CrossEncoder(nn.Module):
    """classifier(pooled), or classifier(relu(pooled)) where config.pooled_relu says so (the original's training head).

    Dropout on the pooled output is applied only if config.classifier_dropout asks for it. `projections` maps student
    hidden states to the teacher's width: one shared Linear, one per hidden state, or none.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self.bert = nn.ModuleDict({"embeddings": Embeddings(config), "encoder": nn.ModuleDict({"layer": layers}),
                                   "pooler": pooler})
        self.dropout = Dropout(config.classifier_dropout or 0.0)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.projections = nn.ModuleList()

    def forward(self, batch: Batch, layers: list[int] | None = None) -> LayerOutputs:
        """Logits alone, computing only the [CLS] row of the last layer; with `layers` also what is named there.

        `layers` (from 1) asks for the queries and keys of these layers, and for their hidden states and the embedding
        output's; the last layer is then computed in full.
        """
        hidden = self.bert.embeddings(batch)                                                  # (B, L, D)
        mask = batch.attention_mask[:, None, None, :].bool() if batch.has_padding else None   # (B, 1, 1, L)
        outputs = LayerOutputs(logits=hidden)
        if layers is not None:
            outputs.hidden_states[0] = hidden
        last = len(self.bert.encoder.layer)
        for number, layer in enumerate(self.bert.encoder.layer, start=1):
            hidden, query, key = layer(hidden, mask, cls_only=layers is None and number == last)
            if layers is not None and number in layers:
                outputs.hidden_states[number], outputs.queries[number], outputs.keys[number] = hidden, query, key
        outputs.logits = self.classify(hidden[:, 0])
        return outputs

    def classify(self, hidden: Tensor) -> Tensor:
        """Logits (B, C) from the last layer's output at [CLS] (B, D); never in half precision, so as not to tie."""
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = self.dropout(torch.tanh(self.bert.pooler.dense(hidden.to(self.classifier.weight.dtype))))
            return self.classifier(F.relu(pooled) if getattr(self.config, "pooled_relu", False) else pooled)

    def project(self, index: int, hidden: Tensor) -> Tensor:
        """Student hidden state number `index` (0: embedding output) in the teacher's width: (B, L, D) → (B, L, D')."""
        return self.projections[index if len(self.projections) > 1 else 0](hidden)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(QKᵀ/√d)V, (B, H, L, d), in memory that grows linearly with L.

    PyTorch's fused kernels see to that, but on a CPU they have no dropout: there, queries go through in blocks, and a
    block's scores are computed again in the backward pass instead of being kept.
    """
    if dropout == 0.0 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    blocks = [checkpoint(_attend_block, block, key, value, mask, dropout, use_reentrant=False)
              for block in query.split(QUERY_BLOCK, dim=2)]
    return torch.cat(blocks, dim=2)


def _attend_block(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)       # half precision would cost a digit here
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(wide) * query.shape[-1] ** -0.5) @ key.to(wide).transpose(-1, -2)   # (B, H, block, L)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (drop(F.softmax(scores, dim=-1), dropout) @ value.to(wide)).to(value.dtype)


def drop(inputs: Tensor, probability: float) -> Tensor:
    """Dropout as in training. On a CPU 16 random bits decide on each number: five times faster than PyTorch's own.

    The probability is rounded to a multiple of 2⁻¹⁶, and the rest scaled by what that leaves.
    """
    if probability == 0.0 or inputs.device.type != "cpu":
        return F.dropout(inputs, probability)
    dropped = round(probability * 2 ** 16)
    bits = torch.empty(-(-inputs.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
    kept = bits.view(torch.int16)[:inputs.numel()].view(inputs.shape) >= dropped - 2 ** 15
    return (inputs * kept).mul_(2 ** 16 / (2 ** 16 - dropped) if dropped < 2 ** 16 else 0.0)


class Dropout(nn.Dropout):
    """`drop` while training, nothing otherwise."""

    def forward(self, inputs: Tensor) -> Tensor:
        return drop(inputs, self.p) if self.training else inputs


def uniform_layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher layer (from 1) that each student layer 1, 2, ... learns from: every k-th.

    Raises ValueError if the depths do not divide.
    """
    if teacher_layers % student_layers:
        raise ValueError(f"{teacher_layers} teacher layers cannot be shared evenly among {student_layers}")
    step = teacher_layers // student_layers
    return [step * (layer + 1) for layer in range(student_layers)]


def count_parameters(model: CrossEncoder) -> int:
    """Parameters that scoring needs: projections, which serve distillation alone, are left out."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("projections."))


def describe(model: CrossEncoder) -> str:
    config = model.config
    return (f"{config.num_hidden_layers} layers, hidden width {config.hidden_size}, "
            f"{config.num_attention_heads} heads, {count_parameters(model):,} parameters")
