"""Weight files of a model directory: which there are, the tensors in them, and what a file is that holds none.

Tensors get the names of BertForSequenceClassification, whatever a training tool made of these. No code of a file runs.
"""
import hashlib
import json
import pickle
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from simplified_tinybert.common.files import UserError, reason, shorten
from simplified_tinybert.model.hub import PROJECTION_FILE, WEIGHT_FILES

# Segments of a name that PyTorch's wrappers add anywhere in it; no parameter of BERT has one
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module",
            "_forward_module"}
# Attributes that hold a bare encoder; before "bert." any other name is as good, for that one says what follows
HOLDERS = {"model", "net", "network", "bert_model", "auto_model", "base_model", "encoder", "backbone", "transformer",
           "student", "teacher", "0"}
PARAMETER = re.compile(r"((?:[^.]+\.)*?)(bert\.)?(?:embeddings\.(?:\w+_embeddings|LayerNorm)\.|encoder\.layer\.\d+\.|"
                       r"pooler\.dense\.)")
KINDS_OF_PARAMETERS = {"weight", "bias", "gamma", "beta"}
DEPTH = 4                                               # of dictionaries in a checkpoint of a training tool

CONVERTED = "load it with transformers 4 (from_{}=True) and save it by save_pretrained"
EXPORTED = "fetch the weights it was made of, model.safetensors or pytorch_model.bin"
OTHER_FORMATS = [("*.index", "a TensorFlow checkpoint", "convert it: python convert_tf_checkpoint.py --help"),
                 ("*.h5", "TensorFlow weights", CONVERTED.format("tf")),
                 ("*.msgpack", "Flax weights", CONVERTED.format("flax")),
                 *[(pattern, "an exported model", EXPORTED) for pattern in ("*.onnx", "onnx/*.onnx", "*.gguf",
                                                                            "*.tflite", "*.ot", "openvino_model.*")],
                 ("*-of-*", "a part of sharded weights", "fetch their index too (*.index.json)"),
                 ("*.safetensors", "safetensors", "if it is the model, rename it to model.safetensors"),
                 *[(pattern, "a PyTorch file", "if it is the model, rename it to pytorch_model.bin")
                   for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")]]
NO_MODELS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", PROJECTION_FILE)
MAGIC = {b"\x89HDF": "an HDF5 file, which TensorFlow writes", b"GGUF": "a GGUF file", b"\x1f\x8b": "compressed (gzip)",
         b"\xfd7zXZ": "compressed (xz)", b"BZh": "compressed (bzip2)", b"\x28\xb5\x2f\xfd": "compressed (zstd)"}


def identify(path: Path, text: bool = False) -> str | None:
    """What a file is that was fetched in place of another, and the way out; None if it is nothing of this kind.

    text: a JSON file is expected, not weights.
    """
    with open(path, "rb") as handle:
        start = handle.read(1024)
    if not start.strip():
        return "is empty; fetch it again"
    start = start.removeprefix(b"\xef\xbb\xbf")          # a byte order mark
    if re.match(rb"version https://[\w.-]+/spec/v1\b", start):
        size = re.search(rb"^size (\d+)", start, re.MULTILINE)
        return (f"is a Git LFS pointer to the file, of {int(size[1]) if size else 0:,} bytes, not the file itself; "
                f"fetch that: git lfs pull in the clone, or hf download")
    if re.match(rb"\s*<(!doctype|html|head|body|\?xml|error|!--)", start, re.IGNORECASE):
        return ("is a web page (HTML or XML), not the file itself; fetch that by hf download, or from the address "
                "with /resolve/ in place of /blob/; a private model needs a login")
    if text:
        return None
    if not start.strip(b"\0"):
        return "holds zeros in place of data, as an interrupted download does; fetch it again"
    if words := _text(start).strip():
        return f"holds text, {shorten(words)}, perhaps a server's answer in place of the file; fetch it again"
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            return f"is {what}, under a name that is not its own; expected a file of tensors"
    return _misnamed(path, start)


def _text(start: bytes) -> str:
    """The start of a file as text; "" if it is none."""
    try:
        decoded = getincrementaldecoder("utf-8")().decode(start)            # the last character may be cut
    except UnicodeDecodeError:
        return ""
    return decoded if all(char.isprintable() or char in "\t\r\n" for char in decoded) else ""


def _misnamed(path: Path, start: bytes) -> str | None:
    if path.suffix == ".safetensors" and start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a PyTorch file, not safetensors; rename it to pytorch_model.bin"
    if path.suffix != ".safetensors" and start[5:9] == b"\0\0\0{":
        return "is a safetensors file under another name; rename it to model.safetensors"
    return None


def read_json(path: Path, what: str) -> dict:
    """A JSON object from a file. Raises UserError, which says that it is no `what`."""
    instead = identify(path, text=True)
    if instead:
        raise UserError(f"{path}: {instead}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not a valid {what}: {reason(error)}; fetch or write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a valid {what}: holds a {type(content).__name__}; expected a JSON object")
    return content


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's tensors. Raises UserError if there are none."""
    path = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if path is None:
        raise UserError(f"{directory}: holds no weights; expected one of {', '.join(WEIGHT_FILES)}"
                        f"{_other_formats(directory)}")
    paths = [path]
    if path.name.endswith(".index.json"):
        try:
            shards = set(read_json(path, "index of weight files")["weight_map"].values())
            paths = [directory / Path(shard).name for shard in sorted(shards)]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is not an index of weight files ({error!r}); fetch it again") from error
        absent = [shard.name for shard in paths if not shard.is_file()]
        if absent or not paths:
            raise UserError(f"{path}: names files that are not there ({', '.join(absent)}); fetch them too")
    return paths + [path for path in [directory / PROJECTION_FILE] if path.is_file()]


def _other_formats(directory: Path) -> str:
    """What stands there instead of readable weights, with the way out of each."""
    found, named = [], set()
    for pattern, what, way_out in OTHER_FORMATS:
        names = sorted(str(path.relative_to(directory)) for path in directory.glob(pattern)
                       if not path.name.startswith(NO_MODELS) and path not in named)
        named |= {directory / name for name in names}
        if names:
            found.append(f"; found {some(names)}, {what}: {way_out}")
    return "".join(found)


def some(names: Iterable[str], shown: int = 3) -> str:
    """A few of the names, and how many there are."""
    names = list(names)
    return ", ".join(names[:shown]) + (f", ... ({len(names)} in all)" if len(names) > shown else "")


def weights_checksum(directory: Path) -> str:
    """SHA-256 over the weight files."""
    digest = hashlib.sha256()
    for path in weight_files(directory):
        with open(path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model directory under the names used here. Raises UserError."""
    weights, projections = {}, {}
    for path in weight_files(directory):
        (projections if path.name == PROJECTION_FILE else weights).update(read_tensors(path))
    try:
        return canonical_names(weights) | canonical_names(projections)
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a PyTorch file that holds plain data. Raises UserError."""
    instead = identify(path)
    if instead:
        raise UserError(f"{path}: {instead}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {found[1]}, which is no tensor," if found else "holds more than tensors, or is damaged,"
        raise UserError(f"{path}: {what} and is refused, because loading it could run code. Have its author save the "
                        f"state dict alone, as safetensors") from error
    except PermissionError:
        raise
    except Exception as error:                          # a damaged file makes the libraries raise almost anything
        raise UserError(f"{path}: is damaged or cut off after {path.stat().st_size:,} bytes "
                        f"({reason(error).split('. ')[0]}); copy or fetch it again") from error
    return _state_dict(content, path)


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """The one set of parameters in what was saved: the state dict itself, or an entry of a tool's checkpoint."""
    found = _parameter_sets(content, "", DEPTH)
    if len(found) > 1:
        raise UserError(f"{path}: expected a state dict, found several ({some(name or 'itself' for name in found)}); "
                        f"save the one that is meant in a file of its own")
    if not found:
        keys = f" of {some(map(str, content))}" if isinstance(content, dict) and content else ""
        raise UserError(f"{path}: expected a state dict (names and tensors), found {type(content).__name__}{keys}")
    tensors = next(iter(found.values()))
    for name, value in tensors.items():
        if not (isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta):
            raise UserError(f"{path}: expected a state dict (names and tensors), found {type(value).__name__} as "
                            f"{name}{' without dense numbers' if isinstance(value, Tensor) else ''}")
    return tensors


def _parameter_sets(content: object, where: str, depth: int) -> dict[str, dict]:
    """Where there are parameters (keys, joined by dots) → these, by their names."""
    if not isinstance(content, dict) or not depth:
        return {}
    found, named = {}, {name: value for name, value in content.items() if isinstance(name, str)}
    if any(name.rpartition(".")[2] in KINDS_OF_PARAMETERS for name in named):
        found[where] = {name: value for name, value in named.items()
                        if isinstance(value, Tensor) or name.rpartition(".")[2] in KINDS_OF_PARAMETERS}
    for name, value in named.items():
        found |= _parameter_sets(value, f"{where}.{name}" if where else name, depth - 1)
    return found


def canonical_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under BertForSequenceClassification's names.

    What training tools put before or into names is taken off where that is certain, a bare encoder gets its "bert.",
    LayerNorm's gamma and beta become weight and bias. Raises ValueError if two tensors would get one name.
    """
    bare = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in weights}
    prefix = _common_prefix(bare.values())
    renamed, origins = {}, {}
    for origin, name in bare.items():
        name = name.removeprefix(prefix)
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = "bert." + name
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        name = re.sub(r"^fit_dense\.", "projections.0.", re.sub(r"^fit_denses\.", "projections.", name))
        if name in renamed:
            raise ValueError(f"the weights hold both {origins[name]} and {origin}, which are one parameter; keep the "
                             f"right one")
        renamed[name], origins[name] = weights[origin], origin
    return renamed


def _common_prefix(names: Iterable[str]) -> str:
    """What stands before BERT's own name in every one of the names; "" where it is not the same in all."""
    names = list(names)
    found = [match for match in map(PARAMETER.match, names) if match]
    prefixes = {match[1] for match in found}
    if len(prefixes) != 1 or not all(name.startswith(tuple(prefixes)) for name in names):
        return ""
    prefix = prefixes.pop()
    certain = any(match[2] for match in found) or HOLDERS.issuperset(prefix.split(".")[:-1])
    return prefix if certain else ""
