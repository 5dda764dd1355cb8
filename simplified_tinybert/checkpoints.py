"""Reading and writing model folders: one loader for teachers, general students and finished students.

Two layouts are read: config.json with model.safetensors or pytorch_model.bin (Hugging Face), and the original's
bert_config.json with pytorch_model.bin. Weights are read without running any code of the file. What is written is a
normal Hugging Face folder; the projections that only distillation needs go into fit_dense.safetensors beside it.
"""
import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import BertConfig

from simplified_tinybert.data.tokenizer_files import has_vocabulary, save_tokenizer
from simplified_tinybert.files import Problems, UserError, atomic_writer
from simplified_tinybert.hub import CONFIG_FILES, PROJECTION_FILE, WEIGHT_FILES
from simplified_tinybert.losses import layer_map
from simplified_tinybert.modeling import ACTIVATIONS, CrossEncoder, activation_named

BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids)$")           # constants that older libraries stored
PRETRAINING_HEADS = ("cls.", "qa_outputs.")


def read_config(folder: Path) -> BertConfig:
    """BERT configuration from config.json or bert_config.json of a folder, or from such a file. Raises UserError."""
    path = folder if folder.is_file() else next((folder / name for name in CONFIG_FILES if (folder / name).is_file()),
                                                None)
    if path is None:
        raise UserError(f"{folder}: holds neither {' nor '.join(CONFIG_FILES)}; is it a model folder?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("model_type", "bert") != "bert":
            raise UserError(f"{path}: is a model of type {content['model_type']}; expected bert")
        if content.get("position_embedding_type", "absolute") != "absolute":
            raise UserError(f"{path}: has {content['position_embedding_type']} positions; expected absolute ones")
        content = {key: value for key, value in content.items() if key not in ("dtype", "torch_dtype", "is_decoder")}
        config = BertConfig(**content)
        try:
            activation_named(config.hidden_act)
        except KeyError as error:
            raise UserError(f"{path}: hidden_act is {error}; expected one of {', '.join(ACTIVATIONS)}, or another one "
                            f"that transformers knows") from error
        if config.hidden_size % config.num_attention_heads:
            raise UserError(f"{path}: hidden_size {config.hidden_size} is no multiple of num_attention_heads "
                            f"{config.num_attention_heads}; these describe no BERT model")
        return config
    except UserError:
        raise
    except Exception as error:        # whatever a malformed file makes the library raise, the file is to blame
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is not a valid BERT configuration: {reason}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's tensors. Raises UserError if there are none."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: holds no weights; expected one of {', '.join(WEIGHT_FILES)}")
    paths = [path]
    if path.name.endswith(".index.json"):
        try:
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            paths = [folder / Path(shard).name for shard in sorted(shards)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is not an index of safetensors files ({error!r}); fetch it again") from error
        absent = [shard.name for shard in paths if not shard.is_file()]
        if absent or not paths:
            raise UserError(f"{path}: names files that are not there ({', '.join(absent)}); fetch them too")
    return paths + [path for path in [folder / PROJECTION_FILE] if path.is_file()]


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the weight files."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder under the names used here. Raises UserError."""
    weights = {}
    for path in weight_files(folder):
        weights.update(read_tensors(path))
    return canonical_names(weights)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a PyTorch file that holds nothing else. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: holds more than tensors, or is damaged; it is refused, because loading it could run "
                        f"code. Have its author save it as safetensors") from error
    except PermissionError:
        raise
    except Exception as error:                          # a damaged file makes the libraries raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is damaged or cut off ({reason}); copy or fetch it again") from error
    if not isinstance(weights, dict) or not all(isinstance(name, str) and _is_plain(value)
                                                for name, value in weights.items()):
        raise UserError(f"{path}: expected a state dict (names and tensors), found {type(weights).__name__}")
    return weights


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def canonical_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename old parameter names: LayerNorm gamma/beta, DataParallel's prefix, a bare encoder's missing prefix."""
    renamed = {}
    for name, tensor in weights.items():
        name = name.removeprefix("module.")
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = "bert." + name
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        name = re.sub(r"^fit_dense\.", "projections.0.", re.sub(r"^fit_denses\.", "projections.", name))
        renamed[name] = tensor
    return renamed


def load_cross_encoder(folder: Path, config: BertConfig | None = None, new_head: torch.Generator | None = None,
                       dtype: torch.dtype = torch.float32) -> tuple[CrossEncoder, list[str]]:
    """Model of a folder in evaluation mode, with notes for the user on what was ignored or newly initialised.

    Every parameter must be in the checkpoint and every tensor of the checkpoint must have a place, or a UserError
    lists what does not fit. With `new_head` (general students) pooler and classifier may be missing: they are then
    drawn from this generator.
    """
    config = config or read_config(folder)
    weights = {name: tensor for name, tensor in read_weights(folder).items() if not BUFFERS.search(name)}
    if "classifier.weight" in weights and weights["classifier.weight"].dim() == 2:
        config.num_labels = weights["classifier.weight"].shape[0]
    ignored = sorted(name for name in weights if name.startswith(PRETRAINING_HEADS))
    weights = {name: tensor for name, tensor in weights.items() if name not in ignored}
    try:
        with _WithoutInitialisation():                  # all of it is filled below
            model = CrossEncoder(config)
            add_projections(model, weights)
    except Exception as error:                          # sizes that no model can have; which, the library says
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder}: its configuration describes no possible model: {reason}") from error
    model.to(dtype)
    notes = [f"{len(ignored)} tensors of pre-training heads are not used ({ignored[0]}, ...)"] if ignored else []
    notes += _fill(model, weights, folder, new_head)
    return model.eval(), notes


class _WithoutInitialisation(TorchFunctionMode):
    """Modules that are made in this context draw no random numbers."""

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) \
            -> object:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return function(*args, **(kwargs or {}))


def _fill(model: CrossEncoder, weights: dict[str, Tensor], folder: Path, new_head: torch.Generator | None) -> list[str]:
    """Copy all weights into the model; complain about every name or shape that does not fit."""
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    missing = sorted(expected.keys() - weights.keys())
    fresh = [name for name in missing if new_head and name.startswith(("bert.pooler.", "classifier."))]
    problems = Problems()
    for name in missing:
        if name not in fresh:
            hint = "; the model was not fine-tuned for ranking" if name.startswith("classifier.") else ""
            problems.add(f"{folder}: the weights lack {name}{hint}")
    for name in sorted(weights.keys() - expected.keys()):
        problems.add(f"{folder}: the weights hold {name}, which has no place in this model")
    for name in sorted(expected.keys() & weights.keys()):
        if expected[name] != weights[name].shape:
            problems.add(f"{folder}: {name} has shape {list(weights[name].shape)}; expected {list(expected[name])} "
                         f"by the configuration")
        elif not weights[name].is_floating_point():
            problems.add(f"{folder}: {name} holds {weights[name].dtype}; expected floating-point numbers")
    problems.raise_if_any()
    for name in fresh:
        initialise(model.get_parameter(name), model.config.initializer_range, new_head)
    model.load_state_dict(weights, strict=False)
    return [f"newly initialised: {', '.join(fresh)}"] if fresh else []


def initialise(parameter: nn.Parameter, spread: float, generator: torch.Generator) -> None:
    """BERT's way: matrices normal with standard deviation `spread`, biases zero."""
    with torch.no_grad():
        parameter.normal_(std=spread, generator=generator) if parameter.dim() > 1 else parameter.zero_()


def new_cross_encoder(config: BertConfig, generator: torch.Generator) -> CrossEncoder:
    """A model with BERT's random initial weights; the embedding of [PAD] is zero."""
    model = CrossEncoder(config)
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:                     # which start as the identity
            initialise(parameter, config.initializer_range, generator)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[config.pad_token_id or 0] = 0.0
    return model.eval()


def copy_teacher_layers(student: CrossEncoder, teacher: CrossEncoder) -> None:
    """Start a student of the teacher's width from its embeddings, its pooler and every k-th of its layers."""
    sources = layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    student.bert.embeddings.load_state_dict(teacher.bert.embeddings.state_dict())
    student.bert.pooler.load_state_dict(teacher.bert.pooler.state_dict())
    for layer, source in zip(student.bert.encoder.layer, sources):
        layer.load_state_dict(teacher.bert.encoder.layer[source - 1].state_dict())


def add_projections(model: CrossEncoder, weights: dict[str, Tensor]) -> None:
    """Give the model the projections that its checkpoint holds (one shared, or TinyBERT v2's one per hidden state)."""
    count = len({name.split(".")[1] for name in weights if name.startswith("projections.")})
    for number in range(count):
        matrix = weights.get(f"projections.{number}.weight")
        if matrix is not None and matrix.dim() == 2:
            model.projections.append(nn.Linear(matrix.shape[1], matrix.shape[0]))


def fit_projections(model: CrossEncoder, teacher_width: int, generator: torch.Generator) -> list[str]:
    """Make sure that the student has projections to `teacher_width`: kept where they fit, else one new shared one."""
    states = model.config.num_hidden_layers + 1
    kept = [(layer.in_features, layer.out_features) for layer in model.projections]
    if kept and set(kept) == {(model.config.hidden_size, teacher_width)} and len(kept) in (1, states):
        return [] if len(kept) == 1 else [f"fit_denses: one projection for each of the {states} hidden states"]
    model.projections = nn.ModuleList([nn.Linear(model.config.hidden_size, teacher_width)])
    model.projections.to(model.classifier.weight.dtype)
    for parameter in model.projections.parameters():
        initialise(parameter, model.config.initializer_range, generator)
    why = f" (the checkpoint's {len(kept)} of shape {kept[0]} do not fit)" if kept else ""
    return [f"newly initialised: fit_dense, {model.config.hidden_size} → {teacher_width}{why}"]


def save_cross_encoder(model: CrossEncoder, folder: Path, tokenizer_folder: Path | None, lower_case: bool,
                       card: str = "", general: bool = False) -> None:
    """Write a Hugging Face folder: config.json, model.safetensors, tokenizer files, a model card, the projections.

    A `general` student has no classifier yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
               if not (general and name.startswith("classifier."))}
    projections = {name: tensors.pop(name) for name in list(tensors) if name.startswith("projections.")}
    if projections:
        name = "fit_dense." if len(model.projections) == 1 else "fit_denses.0."
        renamed = {key.replace("projections.0.", name).replace("projections.", "fit_denses."): tensor
                   for key, tensor in projections.items()}
        _save_tensors(renamed, folder / PROJECTION_FILE)
    else:
        (folder / PROJECTION_FILE).unlink(missing_ok=True)                  # of a model that was here before
    architecture = "BertModel" if general else "BertForSequenceClassification"
    config = model.config.to_dict() | {"architectures": [architecture], "model_type": "bert",
                                       "dtype": str(model.classifier.weight.dtype).removeprefix("torch.")}
    if model.config.num_labels == 2 and not general:
        config |= {"id2label": {"0": "not relevant", "1": "relevant"}, "label2id": {"not relevant": 0, "relevant": 1}}
    _write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    if tokenizer_folder and has_vocabulary(tokenizer_folder):
        save_tokenizer(tokenizer_folder, folder, lower_case, model.config.max_position_embeddings)
    if card:
        _write_text(folder / "README.md", card)
    _save_tensors(tensors, folder / "model.safetensors")


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    with atomic_writer(path, "wb") as handle:
        handle.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def _write_text(path: Path, text: str) -> None:
    with atomic_writer(path) as handle:
        handle.write(text)
