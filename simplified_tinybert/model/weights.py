"""Read the weight files of a model directory, and recognise files that hold no weights.

Tensors get the names of BertForSequenceClassification, whatever names a training tool gave them. No code in a file is
executed.
"""
import hashlib
import os
import pickle
import re
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from simplified_tinybert.common.files import UserError, reason, shorten
from simplified_tinybert.common.records import sha256_of
from simplified_tinybert.common.text import archive_kind, failed_download, read_json
from simplified_tinybert.model.hub import CONFIG_FILES, PROJECTION_FILE, TOKENIZER_FILES, WEIGHT_FILES

# Name segments that wrappers of PyTorch insert; no parameter of BERT has one
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module",
            "_forward_module"}
# Attributes that hold a bare encoder. Before "bert." any attribute name is accepted.
ENCODER_ATTRIBUTES = {"model", "net", "network", "bert_model", "auto_model", "base_model", "encoder", "backbone",
                      "transformer", "student", "teacher", "0"}
BERT_PARAMETER = re.compile(r"((?:[^.]+\.)*?)(bert\.)?(?:embeddings\.(?:\w+_embeddings|LayerNorm)\.|"
                            r"encoder\.layer\.\d+\.|pooler\.dense\.)")
PARAMETER_KINDS = {"weight", "bias", "gamma", "beta"}
MAX_NESTING = 4         # of dictionaries in a checkpoint

CONVERT = "load it with transformers 4 (from_{}=True) and save it with save_pretrained"
EXPORTED = ("an exported model", "fetch the original weights, model.safetensors or pytorch_model.bin")
PYTORCH = ("a PyTorch file", "if it is the model, rename it to pytorch_model.bin")
OTHER_FORMATS = {"*.index": ("a TensorFlow checkpoint", "convert it: python convert_tf_checkpoint.py --help"),
                 "*.h5": ("TensorFlow weights", CONVERT.format("tf")),
                 "*.msgpack": ("Flax weights", CONVERT.format("flax")),
                 "*.onnx": EXPORTED, "onnx/*.onnx": EXPORTED, "*.gguf": EXPORTED, "*.tflite": EXPORTED,
                 "*.ot": EXPORTED, "openvino_model.*": EXPORTED,
                 "*-of-*": ("a shard of the weights", "fetch the index, too (*.index.json)"),
                 "*.safetensors": ("safetensors", "if it is the model, rename it to model.safetensors"),
                 "*.bin": PYTORCH, "*.pt": PYTORCH, "*.pth": PYTORCH, "*.ckpt": PYTORCH}
TRAINING_FILES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", PROJECTION_FILE)


def wrong_weight_file(path: Path) -> str | None:
    """Return an error message if the first bytes show that a file holds no tensors, else None."""
    if error := failed_download(path):
        return error
    with open(path, "rb") as handle:
        start = handle.read(1024).removeprefix(BOM_UTF8)
    if not start.strip(b"\0"):
        return "holds zeros instead of data, as an interrupted download does; fetch it again"
    if text := _printable_text(start).strip():
        return f"holds text, {shorten(text)}, perhaps an error message of a server; fetch it again"
    is_zip = start.startswith(b"PK\x03\x04")            # PyTorch's own format is a zip archive
    binary = {b"\x89HDF": "an HDF5 file of TensorFlow", b"GGUF": "a GGUF file", b"\x1f\x8b": "compressed by gzip"}
    archive = None if is_zip else archive_kind(start)
    kind = archive[0] if archive else next((kind for magic, kind in binary.items() if start.startswith(magic)), None)
    if kind:
        return f"is {kind}; expected a file of tensors"
    if path.suffix == ".safetensors" and (is_zip or start.startswith(b"\x80\x02")):
        return "is a PyTorch file, not safetensors; rename it to pytorch_model.bin"
    if path.suffix != ".safetensors" and start[5:9] == b"\0\0\0{":
        return "is a safetensors file under another name; rename it to model.safetensors"
    return None


def _printable_text(start: bytes) -> str:
    try:
        decoded = getincrementaldecoder("utf-8")().decode(start)        # the last character may be incomplete
    except UnicodeDecodeError:
        return ""
    return decoded if all(char.isprintable() or char in "\t\r\n" for char in decoded) else ""


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold a model's tensors. Raises UserError if there are none."""
    path = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if path is None:
        raise UserError(f"{directory}: holds no weights; expected one of {', '.join(WEIGHT_FILES)}"
                        f"{_other_formats(directory)}")
    paths = [path]
    if path.name.endswith(".index.json"):
        try:
            shards = set(read_json(path, "index of weight files")["weight_map"].values())
            paths = [directory / shard for shard in sorted(shards)]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is not a valid index of weight files ({error!r}); fetch it again") from error
        outside = [shard for shard in sorted(shards)
                   if os.path.isabs(shard) or os.path.normpath(shard).startswith(os.pardir)]
        if outside:
            raise UserError(f"{path}: lists files outside its directory ({abbreviate(outside)}); fetch it again")
        missing = [shard.name for shard in paths if not shard.is_file()]
        if missing or not paths:
            raise UserError(f"{path}: lists missing files ({', '.join(missing)}); fetch them, too")
    projections = directory / PROJECTION_FILE
    return [*paths, projections] if projections.is_file() else paths


def _other_formats(directory: Path) -> str:
    """Describe weights of formats that cannot be read, and how to convert each."""
    described, seen = [], set()
    for pattern, (kind, remedy) in OTHER_FORMATS.items():
        paths = sorted(path for path in directory.glob(pattern)
                       if not path.name.startswith(TRAINING_FILES) and path not in seen)
        seen.update(paths)
        if paths:
            names = abbreviate(str(path.relative_to(directory)) for path in paths)
            described.append(f"; found {names}, {kind}: {remedy}")
    return "".join(described)


def abbreviate(names: Iterable[str]) -> str:
    """Join the first three names. If there are more, add their total number."""
    names = list(names)
    return ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")


def weights_checksum(directory: Path) -> str:
    """Return a SHA-256 over the weight files."""
    return hashlib.sha256(b"".join(bytes.fromhex(sha256_of(path)) for path in weight_files(directory))).hexdigest()


def settings_checksum(directory: Path) -> str:
    """Return a SHA-256 over the configuration and tokenizer files, which also decide what a model computes."""
    files = {name: sha256_of(directory / name) for name in (*CONFIG_FILES, *TOKENIZER_FILES)
             if (directory / name).is_file()}
    return hashlib.sha256(repr(files).encode()).hexdigest()


def model_checksum(directory: Path) -> str:
    return hashlib.sha256((weights_checksum(directory) + settings_checksum(directory)).encode()).hexdigest()


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a model directory under canonical names. Raises UserError."""
    weights, projections = {}, {}
    for path in weight_files(directory):
        (projections if path.name == PROJECTION_FILE else weights).update(read_tensors(path))
    try:
        return canonical_names(weights) | canonical_names(projections)
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or a PyTorch file that holds plain data only. Raises UserError."""
    if error := wrong_weight_file(path):
        raise UserError(f"{path}: {error}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {found[1]}, which is not a tensor" if found else "holds more than tensors, or is damaged"
        raise UserError(f"{path}: {what}; it is refused, because loading it could run code; ask its author to save the "
                        f"state dict alone, as safetensors") from error
    except PermissionError:
        raise
    except Exception as error:                          # the libraries raise almost any error for a damaged file
        raise UserError(f"{path}: is damaged or truncated at {path.stat().st_size:,} bytes "
                        f"({reason(error).split('. ')[0]}); copy or fetch it again") from error
    return _state_dict(content, path)


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """Return the only state dict in a PyTorch file: the content itself, or an entry of a training checkpoint."""
    found = _state_dicts(content, "", MAX_NESTING)
    if len(found) > 1:
        names = abbreviate(name or "top level" for name in found)
        raise UserError(f"{path}: expected a state dict, found several ({names}); save the right one to its own file")
    if not found:
        keys = f" of {abbreviate(map(str, content))}" if isinstance(content, dict) and content else ""
        raise UserError(f"{path}: expected a state dict (names and tensors), found {type(content).__name__}{keys}")
    tensors = next(iter(found.values()))
    for name, value in tensors.items():
        if not (isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta):
            raise UserError(f"{path}: expected a state dict (names and tensors), found {type(value).__name__} as "
                            f"{name}{' without dense values' if isinstance(value, Tensor) else ''}")
    return tensors


def _state_dicts(content: object, location: str, nesting: int) -> dict[str, dict]:
    """Return every dictionary of parameters in `content`, by its location (keys joined by dots)."""
    if not isinstance(content, dict) or not nesting:
        return {}
    found, entries = {}, {name: value for name, value in content.items() if isinstance(name, str)}
    parameters = {name for name in entries if name.rpartition(".")[2] in PARAMETER_KINDS}
    if parameters:
        found[location] = {name: value for name, value in entries.items()
                           if name in parameters or isinstance(value, Tensor)}
    for name, value in entries.items():
        found |= _state_dicts(value, f"{location}.{name}" if location else name, nesting - 1)
    return found


def canonical_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to the names of BertForSequenceClassification.

    Prefixes and name segments of training tools are removed if they are unambiguous. A bare encoder gets the prefix
    "bert.". gamma and beta become weight and bias. Raises ValueError if two tensors would get the same name.
    """
    unwrapped = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in weights}
    prefix = _common_prefix(list(unwrapped.values()))
    renamed, origins = {}, {}
    for origin, name in unwrapped.items():
        name = name.removeprefix(prefix)
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = "bert." + name
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        name = re.sub(r"^fit_dense\.", "projections.0.", re.sub(r"^fit_denses\.", "projections.", name))
        if name in renamed:
            raise ValueError(f"the weights hold both {origins[name]} and {origin}, which are the same parameter; keep "
                             f"the right one")
        renamed[name], origins[name] = weights[origin], origin
    return renamed


def _common_prefix(names: list[str]) -> str:
    """Return the prefix of all names before BERT's own name; "" if it differs between them."""
    matches = [match for match in map(BERT_PARAMETER.match, names) if match]
    prefixes = {match[1] for match in matches}
    if len(prefixes) != 1 or not all(name.startswith(tuple(prefixes)) for name in names):
        return ""
    prefix = prefixes.pop()
    unambiguous = any(match[2] for match in matches) or ENCODER_ATTRIBUTES.issuperset(prefix.split(".")[:-1])
    return prefix if unambiguous else ""
