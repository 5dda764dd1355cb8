"""The model of all scripts: a BERT cross-encoder with a linear classifier on its pooled output.

Parameter names are those of Hugging Face's BertForSequenceClassification. It is implemented here for three reasons:
distillation needs the query and key projections of some layers, ranking needs only the [CLS] position of the last
layer, and importing the library's model takes longer than scoring a hundred pairs.

Shapes: B batch size, L sequence length, D hidden size, H heads, d = D / H head size, C classes. A packed batch
(batch.py) has 1 instead of B, and its number of tokens T instead of L.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig

from simplified_tinybert.model.batch import Batch, Packing


def tanh_gelu(hidden: Tensor) -> Tensor:
    return F.gelu(hidden, approximate="tanh")


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh,
               "gelu_new": tanh_gelu, "gelu_pytorch_tanh": tanh_gelu}


@dataclass
class LayerOutputs:
    """Logits, and what layer-wise distillation compares, by layer number: hidden states, queries and keys."""
    logits: Tensor                                                          # (B, C)
    hidden_states: dict[int, Tensor] = field(default_factory=dict)          # 0: embedding output; (B, L, D) each
    queries: dict[int, Tensor] = field(default_factory=dict)                # from 1; (B, H, L, d) each
    keys: dict[int, Tensor] = field(default_factory=dict)


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function for `hidden_act` of a configuration. Raises KeyError for an unknown name."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    from transformers.activations import ACT2FN  # takes a second to import, and few models need it
    return ACT2FN[name]


class Embeddings(nn.Module):
    """Sum of word, segment and position embeddings, with layer norm: (B, L) → (B, L, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, batch: Batch) -> Tensor:
        return self.dropout(self.LayerNorm(self.summed(batch)))

    def summed(self, batch: Batch) -> Tensor:
        """Return the sum of the embeddings, before layer norm."""
        words = self.word_embeddings(batch.input_ids) + self.token_type_embeddings(batch.token_type_ids)
        if batch.packing:
            return words + self.position_embeddings(batch.packing.positions)
        return words + self.position_embeddings.weight[:batch.input_ids.shape[1]]


class AddNorm(nn.Module):
    """Linear layer, dropout, residual connection and layer norm, after attention and after the feed-forward layer."""

    def __init__(self, input_size: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: BertConfig):
        super().__init__()
        size = config.hidden_size
        self.heads, self.activation = config.num_attention_heads, activation_function(config.hidden_act)
        self.attention_dropout = Dropout(config.attention_probs_dropout_prob)      # holds the probability for `attend`
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(size, size) for name in ("query", "key", "value")}),
            "output": AddNorm(size, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(size, config.intermediate_size)})
        self.output = AddNorm(config.intermediate_size, config)

    def forward(self, hidden: Tensor, mask: Tensor | Packing | None,
                cls_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, L, D) to output (B, L, D), queries and keys (B, H, L, d).

        mask (B, 1, 1, L) is from `padding_mask`; None means no padding. With cls_only, output (B, 1, D) and queries
        (B, H, 1, d) are computed for the first position only; in a packed batch (1, B, D) and (1, H, B, d).
        """
        residual = hidden
        if cls_only:
            residual = hidden[:, mask.starts[:-1]] if isinstance(mask, Packing) else hidden[:, :1]
        context, query, key = self.attention_context(hidden, mask, residual)
        attended = self.attention.output(context, residual)                                          # (B, L, D)
        return self.output(self.activation(self.intermediate.dense(attended)), attended), query, key

    def attention_context(self, hidden: Tensor, mask: Tensor | Packing | None,
                          queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the attention from `queries` to `hidden` (B, L, D), before the output layer; queries and keys."""
        shared = cast_once(hidden)
        query, key, value = (
            self.attention["self"][name](inputs).unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, H, L, d)
            for name, inputs in (("query", shared if queries is hidden else queries), ("key", shared),
                                 ("value", shared)))
        context = attend(query, key, value, mask, self.attention_dropout.p if self.training else 0.0)
        return context.transpose(1, 2).flatten(start_dim=2), query, key


class CrossEncoder(nn.Module):
    """BERT with a classifier on the pooled output.

    With config.pooled_relu, a ReLU precedes the classifier, as when the original trains. The pooled output has dropout
    only if config.classifier_dropout is set. `projections` maps hidden states of a student to the teacher's hidden
    size: one shared Linear, one for each hidden state, or none.
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
        self.packs_batches = False                      # whether it scores packed batches

    def forward(self, batch: Batch, layers: list[int] | None = None) -> LayerOutputs:
        """Return logits; with `layers` (from 1), also the embedding output, and states, queries, keys of the layers.

        `layers` must be None if the batch is packed.
        """
        hidden = self.bert.embeddings(batch)                                                  # (B, L, D)
        mask = padding_mask(batch, hidden.dtype) if batch.has_padding else batch.packing      # (B, 1, 1, L)
        states, queries, keys = {} if layers is None else {0: hidden}, {}, {}
        for number, layer in enumerate(self.bert.encoder.layer, start=1):
            is_last = number == len(self.bert.encoder.layer)        # only its output at [CLS] is needed
            hidden, query, key = layer(hidden, mask, cls_only=layers is None and is_last)
            if layers is not None and number in layers:
                states[number], queries[number], keys[number] = hidden, query, key
        return LayerOutputs(self.classify(hidden[0] if batch.packing else hidden[:, 0]), states, queries, keys)

    def classify(self, hidden: Tensor) -> Tensor:
        """Map the last layer's output at [CLS], (B, D), to logits (B, C). Half precision would make scores tie."""
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = self.dropout(torch.tanh(self.bert.pooler.dense(hidden.to(self.classifier.weight.dtype))))
            return self.classifier(F.relu(pooled) if getattr(self.config, "pooled_relu", False) else pooled)

    def project(self, index: int, hidden: Tensor) -> Tensor:
        """Project hidden state `index` (0: embedding output) to the teacher's hidden size: (B, L, D) → (B, L, D')."""
        return self.projections[index if len(self.projections) > 1 else 0](hidden)


def cast_once(hidden: Tensor) -> Tensor:
    """Convert the input of several linear layers to autocast's type. Each layer would do it again, with equal results.

    Not with gradients: their sum would then be rounded to that type.
    """
    device = hidden.device.type
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
        return hidden
    return hidden.to(torch.get_autocast_dtype(device))


def padding_mask(batch: Batch, dtype: torch.dtype) -> Tensor:
    """Return the mask (B, 1, 1, L) for `attend`: True at tokens, or on a GPU what is added to the attention scores.

    A GPU's kernels need the latter. From a boolean mask, PyTorch would make it again in each layer.
    """
    tokens = batch.attention_mask[:, None, None, :].bool()
    if tokens.device.type == "cpu":
        return tokens
    if torch.is_autocast_enabled(tokens.device.type):
        dtype = torch.get_autocast_dtype(tokens.device.type)
    return torch.zeros(tokens.shape, dtype=dtype, device=tokens.device).masked_fill_(~tokens, -torch.inf)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Packing | None, dropout: float) -> Tensor:
    """Return softmax(QKᵀ/√d)V, (B, H, L, d), using memory linear in L.

    PyTorch's fused kernels do this, but not with dropout on a CPU. In that case, queries are processed in blocks, and
    the attention scores of a block are recomputed in the backward pass.
    """
    if isinstance(mask, Packing):
        return _attend_packed(query, key, value, mask)
    if query.device.type != "cpu":
        return _attend_on_gpu(query, key, value, mask, dropout)
    if dropout == 0.0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    blocks = [checkpoint(_attend_block, block, key, value, mask, dropout, use_reentrant=False)
              for block in query.split(64, dim=2)]
    return torch.cat(blocks, dim=2)


def _attend_on_gpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """`attend` with PyTorch's fused kernels. They need head sizes that are multiples of 8, so others are padded."""
    size = query.shape[-1]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)                     # differs only with apex, which casts operations itself
    query, key, value = (pad_heads(tensor) for tensor in (query, key, value))
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=size ** -0.5)
    return context[..., :size]


def pad_heads(heads: Tensor) -> Tensor:
    """Pad (B, H, L, d) with zeros to the next multiple of 8 in d."""
    return F.pad(heads, (0, -heads.shape[-1] % 8)) if heads.shape[-1] % 8 else heads


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """`attend` for a packed batch, with FlashAttention on a GPU. The queries are those of all or the first tokens."""
    from torch.nn.attention.varlen import varlen_attn  # since PyTorch 2.10
    starts, longest = packing.starts, packing.longest
    if query.shape[2] < key.shape[2]:
        starts, longest = torch.arange(len(starts), dtype=torch.int32, device=starts.device), 1
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))         # (T, H, d)
    context = varlen_attn(query, key, value, starts, packing.starts, longest, packing.longest)
    return context.transpose(0, 1)[None]                                                      # (1, H, T, d)


def _attend_block(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)      # half precision would be less accurate
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(dtype) * query.shape[-1] ** -0.5) @ key.to(dtype).transpose(-1, -2)   # (B, H, block, L)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (drop(F.softmax(scores, dim=-1), dropout) @ value.to(dtype)).to(value.dtype)


def drop(inputs: Tensor, probability: float) -> Tensor:
    """Dropout. On a CPU with 16 random bits per value: 5 times as fast as PyTorch, probability rounded to 2⁻¹⁶."""
    if probability == 0.0 or inputs.device.type != "cpu":
        return F.dropout(inputs, probability)
    dropped = round(probability * 2 ** 16)
    bits = torch.empty(-(-inputs.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
    kept = bits.view(torch.int16)[:inputs.numel()].view(inputs.shape) >= dropped - 2 ** 15
    return (inputs * kept).mul_(2 ** 16 / (2 ** 16 - dropped) if dropped < 2 ** 16 else 0.0)


class Dropout(nn.Dropout):
    """`drop` in training, identity in evaluation."""

    def forward(self, inputs: Tensor) -> Tensor:
        return drop(inputs, self.p) if self.training else inputs


def uniform_layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """Return the teacher layer (from 1) for each student layer: every k-th. Raises ValueError if k is not whole."""
    if teacher_layers % student_layers:
        raise ValueError(f"{teacher_layers} teacher layers are not a multiple of {student_layers} student layers")
    step = teacher_layers // student_layers
    return list(range(step, teacher_layers + 1, step))


def count_parameters(model: CrossEncoder) -> int:
    """Count the parameters used for scoring, without projections, which only distillation uses."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("projections."))


def describe(model: CrossEncoder) -> str:
    config = model.config
    return (f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
            f"{config.num_attention_heads} heads, {count_parameters(model):,} parameters")
