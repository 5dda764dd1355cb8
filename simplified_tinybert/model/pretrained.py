"""Load, initialise and save models: teachers, general students and finished students.

The loader reads Hugging Face's layout (config.json with model.safetensors or pytorch_model.bin) and the original's
(bert_config.json with pytorch_model.bin). Models are saved in Hugging Face's layout. The projections, which only
distillation uses, are saved in a separate file, fit_dense.safetensors.
"""
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import BertConfig

from simplified_tinybert.common.files import Problems, UserError, atomic_writer, reason, warn
from simplified_tinybert.model.bert import CrossEncoder, uniform_layer_map
from simplified_tinybert.model.configuration import read_config, reversed_labels
from simplified_tinybert.model.hub import PROJECTION_FILE
from simplified_tinybert.model.weights import abbreviate, read_weights
from simplified_tinybert.tokenization.tokenizer_files import has_vocabulary, marks_passages, save_tokenizer

BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids)$")           # constants that older library versions saved
PRETRAINING_HEADS = ("cls.", "qa_outputs.")
HEAD = ("bert.pooler.", "classifier.")
# Configuration setting → tensor and dimension that have this size
SIZES = {"vocab_size": ("bert.embeddings.word_embeddings.weight", 0),
         "hidden_size": ("bert.embeddings.word_embeddings.weight", 1),
         "max_position_embeddings": ("bert.embeddings.position_embeddings.weight", 0),
         "type_vocab_size": ("bert.embeddings.token_type_embeddings.weight", 0),
         "intermediate_size": ("bert.encoder.layer.0.intermediate.dense.weight", 0)}
PARAMETERS_PER_LAYER = 16
# Settings of the original model that do not apply to a saved one
DROPPED_SETTINGS = ("sentence_transformers", "sbert_ce_default_activation_function", "auto_map", "return_dict")


def load_cross_encoder(directory: Path, config: BertConfig | None = None, new_head: torch.Generator | None = None,
                       dtype: torch.dtype = torch.float32) -> tuple[CrossEncoder, list[str]]:
    """Return the model of a directory in evaluation mode, and notes on ignored and newly initialised parameters.

    Raises UserError if any parameter or tensor is missing, unexpected or of the wrong shape. With `new_head` (for
    general students), a missing pooler or two-class classifier is initialised from this generator.
    """
    config = config or read_config(directory)
    weights = {name: tensor for name, tensor in read_weights(directory).items() if not BUFFERS.search(name)}
    check_sizes(weights, config, directory)
    if "classifier.weight" in weights and weights["classifier.weight"].dim() == 2:
        config.num_labels = weights["classifier.weight"].shape[0]
    elif new_head and "classifier.weight" not in weights:
        config.id2label = {0: "not relevant", 1: "relevant"}
    ignored = sorted(name for name in weights if name.startswith(PRETRAINING_HEADS))
    weights = {name: tensor for name, tensor in weights.items() if name not in ignored}
    try:
        with _SkipInitialisation():
            model = CrossEncoder(config)
            add_projections(model, weights)
    except Exception as error:                          # impossible sizes
        raise UserError(f"{directory}: cannot build a model with this configuration: {reason(error)}") from error
    model.to(dtype)
    notes = [f"{len(ignored)} tensors of pre-training heads are not used ({ignored[0]}, ...)"] if ignored else []
    notes += _fill(model, weights, directory, new_head)
    if not marks_passages(directory):
        give_one_segment(model)
        warn(f"{directory}: its tokenizer gives query and passage the same segment, because model_input_names lacks "
             f"token_type_ids (by default in transformers 5, unless the class is BertTokenizer), and so do these "
             f"scripts; if the model was trained with two segments, add \"model_input_names\": [\"input_ids\", "
             f"\"token_type_ids\", \"attention_mask\"] to tokenizer_config.json")
    return model.eval(), notes


def give_one_segment(model: CrossEncoder) -> None:
    """Let the embedding of segment 1 equal that of segment 0, as if all tokens had segment 0."""
    with torch.no_grad():
        segments = model.bert.embeddings.token_type_embeddings.weight
        segments[1] = segments[0]


class _SkipInitialisation(TorchFunctionMode):
    """Modules created in this context draw no random numbers. (The meta device would take seconds.)"""

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return function(*args, **(kwargs or {}))


def check_sizes(weights: dict[str, Tensor], config: BertConfig, directory: Path) -> None:
    """Raise UserError for each size in the configuration that differs from the weights."""
    problems = Problems()
    for setting, (name, dimension) in SIZES.items():
        expected = getattr(config, setting)
        if name in weights and weights[name].dim() == 2 and weights[name].shape[dimension] != expected:
            problems.add(f"{directory}: {name} has shape {list(weights[name].shape)}, so {setting} is "
                         f"{weights[name].shape[dimension]}; the configuration says {expected}")
    layers = Counter(found[1] for found in map(re.compile(r"bert\.encoder\.layer\.(\d+)\.").match, weights) if found)
    if set(layers.values()) == {PARAMETERS_PER_LAYER} and len(layers) != config.num_hidden_layers:
        problems.add(f"{directory}: the weights have {len(layers)} layers, so num_hidden_layers is {len(layers)}; the "
                     f"configuration says {config.num_hidden_layers}")
    problems.raise_if_any()


def _fill(model: CrossEncoder, weights: dict[str, Tensor], directory: Path,
          new_head: torch.Generator | None) -> list[str]:
    """Copy all weights into the model, and return notes. Raises UserError for names or shapes that do not fit."""
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    missing = sorted(expected.keys() - weights.keys())
    initialised = [name for name in missing if new_head and name.startswith(HEAD)]
    problems = Problems()
    _check_names([name for name in missing if name not in initialised], sorted(weights.keys() - expected.keys()),
                 directory, problems)
    for name in sorted(expected.keys() & weights.keys()):
        if expected[name] != weights[name].shape:
            problems.add(f"{directory}: {name} has shape {list(weights[name].shape)}; expected {list(expected[name])} "
                         f"by the configuration")
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for dtype in sorted({tensor.dtype for tensor in weights.values()}.difference(floats), key=str):
        names = sorted(name for name, tensor in weights.items() if tensor.dtype == dtype)
        problems.add(f"{directory}: the weights hold {dtype} in {abbreviate(names)}; expected 16- to 64-bit floating "
                     f"point; fetch or save the model without quantization")
    problems.raise_if_any()
    for name in initialised:
        initialise(model.get_parameter(name), model.config.initializer_range, new_head)
    model.load_state_dict(weights, strict=False)
    return [f"newly initialised: {', '.join(initialised)}"] if initialised else []


def _check_names(missing: list[str], unexpected: list[str], directory: Path, problems: Problems) -> None:
    if missing:
        hint = "; the model was not fine-tuned for ranking" \
            if not unexpected and all(name.startswith(HEAD) for name in missing) else ""
        problems.add(f"{directory}: the weights lack {abbreviate(missing)}{hint}")
    if unexpected:
        hint = "; " + ("if these are the missing parameters, rename them" if missing else
                       "remove them from the file, if the model works without them")
        if any(".lora_" in name for name in unexpected):
            hint = "; merge the LoRA weights into the model first (merge_and_unload of peft)"
        problems.add(f"{directory}: the weights hold {abbreviate(unexpected)}, not expected in this model{hint}")


def load_ranker(directory: Path, config: BertConfig | None = None,
                new_head: torch.Generator | None = None) -> tuple[CrossEncoder, list[str]]:
    """Load a model with two classes (0: not relevant, 1: relevant), as `load_cross_encoder` does. Raises UserError.

    A model with one logit z gets the logits (0, z), whose softmax is the sigmoid of z. Warns if the configuration
    gives the classes names in reverse order.
    """
    model, notes = load_cross_encoder(directory, config, new_head)
    if model.config.num_labels == 1:
        notes.append(f"{directory}: {split_logit(model)}")
    elif model.config.num_labels != 2:
        raise UserError(f"{directory}: the model has {model.config.num_labels} classes; expected 2 (not relevant, "
                        f"relevant), or 1 logit")
    elif labels := reversed_labels(model.config):
        warn(f"{directory}: {labels} in its configuration, but class 1 is taken as relevant; if the names are right, "
             f"rankings are reversed; then swap the two rows of classifier.weight and of classifier.bias")
    return model, notes


def split_logit(model: CrossEncoder) -> str:
    """Replace the logit z of a model by the two logits (0, z), in place. Returns a note for the user."""
    head = model.classifier
    head.weight, head.bias = (nn.Parameter(torch.cat([torch.zeros_like(tensor), tensor.detach()]))
                              for tensor in (head.weight, head.bias))
    head.out_features = model.config.num_labels = 2
    kind, model.config.problem_type = model.config.problem_type, None
    return "its logit z is replaced by the two logits (0, z); z is taken as the log-odds of relevance, " + (
        "but its configuration says regression: the order of passages is right, but their probabilities may be wrong"
        if kind == "regression" else "as in models trained with a sigmoid")


def initialise(parameter: nn.Parameter, std: float, generator: torch.Generator) -> None:
    """Initialise a parameter as BERT does: matrices normal with standard deviation `std`, biases zero."""
    with torch.no_grad():
        parameter.normal_(std=std, generator=generator) if parameter.dim() > 1 else parameter.zero_()


def new_cross_encoder(config: BertConfig, generator: torch.Generator) -> CrossEncoder:
    """Return a model with BERT's random initial weights; the embedding of [PAD] is zero."""
    model = CrossEncoder(config)
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:                     # a LayerNorm starts as the identity
            initialise(parameter, config.initializer_range, generator)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[config.pad_token_id or 0] = 0.0
    return model.eval()


def copy_teacher_layers(student: CrossEncoder, teacher: CrossEncoder) -> None:
    """Copy embeddings, pooler and every k-th layer of the teacher into a student of the same hidden size."""
    sources = uniform_layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    student.bert.embeddings.load_state_dict(teacher.bert.embeddings.state_dict())
    student.bert.pooler.load_state_dict(teacher.bert.pooler.state_dict())
    for layer, source in zip(student.bert.encoder.layer, sources):
        layer.load_state_dict(teacher.bert.encoder.layer[source - 1].state_dict())


def add_projections(model: CrossEncoder, weights: dict[str, Tensor]) -> None:
    """Add the projections of a checkpoint: one, or one for each hidden state (TinyBERT v2)."""
    count = len({name.split(".")[1] for name in weights if name.startswith("projections.")})
    for number in range(count):
        matrix = weights.get(f"projections.{number}.weight")
        if matrix is not None and matrix.dim() == 2:
            model.projections.append(nn.Linear(matrix.shape[1], matrix.shape[0]))


def fit_projections(model: CrossEncoder, teacher_size: int, generator: torch.Generator) -> list[str]:
    """Replace projections that do not map to the teacher's hidden size by a new, shared one. Returns notes."""
    states = model.config.num_hidden_layers + 1
    kept = [(layer.in_features, layer.out_features) for layer in model.projections]
    if kept and set(kept) == {(model.config.hidden_size, teacher_size)} and len(kept) in (1, states):
        return [] if len(kept) == 1 else [f"fit_denses: one projection for each of the {states} hidden states"]
    model.projections = nn.ModuleList([nn.Linear(model.config.hidden_size, teacher_size)])
    model.projections.to(model.classifier.weight.dtype)
    for parameter in model.projections.parameters():
        initialise(parameter, model.config.initializer_range, generator)
    why = f" (the checkpoint's {len(kept)} of shape {kept[0]} do not fit)" if kept else ""
    return [f"newly initialised: fit_dense, {model.config.hidden_size} → {teacher_size}{why}"]


def save_cross_encoder(model: CrossEncoder, directory: Path, tokenizer_directory: Path | None, lower_case: bool,
                       card: str = "", general: bool = False) -> None:
    """Write a Hugging Face directory. A `general` student is saved without its classifier."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
               if not (general and name.startswith("classifier."))}
    projections = {name: tensors.pop(name) for name in list(tensors) if name.startswith("projections.")}
    if projections:
        name = "fit_dense." if len(model.projections) == 1 else "fit_denses.0."
        renamed = {key.replace("projections.0.", name).replace("projections.", "fit_denses."): tensor
                   for key, tensor in projections.items()}
        _save_tensors(renamed, directory / PROJECTION_FILE)
    else:
        (directory / PROJECTION_FILE).unlink(missing_ok=True)           # left over from another model
    config = {key: value for key, value in model.config.to_dict().items() if key not in DROPPED_SETTINGS}
    config |= {"architectures": ["BertModel" if general else "BertForSequenceClassification"], "model_type": "bert",
               "dtype": str(model.classifier.weight.dtype).removeprefix("torch.")}
    if model.config.num_labels == 2 and not general:
        config |= {"id2label": {"0": "not relevant", "1": "relevant"}, "label2id": {"not relevant": 0, "relevant": 1}}
    with atomic_writer(directory / "config.json") as handle:
        handle.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if tokenizer_directory and has_vocabulary(tokenizer_directory):
        save_tokenizer(tokenizer_directory, directory, lower_case, model.config.max_position_embeddings)
    if card:
        with atomic_writer(directory / "README.md") as handle:
            handle.write(card)
    _save_tensors(tensors, directory / "model.safetensors")


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    with atomic_writer(path, "wb") as handle:
        handle.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
